"""A rank of test_feature_cache.py, `python ranks_features.py RUN [kill]`: evaluates, or is killed while writing."""

import os
import signal
import sys
from dataclasses import asdict

from iwm_fast.config.evaluation import AttentiveConfig, KnnConfig, LinearConfig
from iwm_fast.evals.probing.attentive import evaluate_attentive
from iwm_fast.evals.probing.knn import evaluate_knn
from iwm_fast.evals.probing.linear import evaluate_linear
from iwm_fast.runtime import distributed
from iwm_fast.runtime.process import end_process


def main(run, rank_info):
    evaluations = (
        (evaluate_knn, KnnConfig(run=run)),
        (evaluate_linear, LinearConfig(run=run, epochs=3)),
        (evaluate_attentive, AttentiveConfig(run=run, epochs=2, batch_size=32)),
    )
    for evaluate, config in evaluations:
        result = evaluate(config, rank_info)
        rows = [asdict(row) | {"time_s": None, "images_per_s": None} for row in result.rows]
        print(rows, result.details, flush=True)


def kill_before_manifest(event, arguments):
    # At this point all features are written, but the manifest, which makes them valid, is not.
    if event == "open" and "/features/" in str(arguments[0]) and str(arguments[0]).endswith("manifest.json"):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    rank_info = distributed.start("cpu")
    if sys.argv[2:]:
        sys.addaudithook(kill_before_manifest)
    main(sys.argv[1], rank_info)
    distributed.stop()
    end_process()
