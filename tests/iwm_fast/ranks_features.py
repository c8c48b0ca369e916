"""One rank of test_features.py: `python ranks_features.py RUN [kill]`; evaluates, or dies while it writes features."""

import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from iwm_fast import distributed
from iwm_fast.evals.attentive import evaluate_attentive
from iwm_fast.evals.config import AttentiveConfig, KnnConfig, LinearConfig
from iwm_fast.evals.knn import evaluate_knn
from iwm_fast.evals.linear import evaluate_linear


def main(run):
    evaluations = (
        (evaluate_knn, KnnConfig(run=run)),
        (evaluate_linear, LinearConfig(run=run, epochs=3)),
        (evaluate_attentive, AttentiveConfig(run=run, epochs=2, batch_size=32)),
    )
    for evaluate, config in evaluations:
        result = evaluate(config)
        rows = [asdict(row) | {"time_s": None, "images_per_s": None} for row in result.rows]
        print(rows, {name: value for name, value in result.details.items()}, flush=True)


def die_while_writing(run):
    while not list((Path(run) / "features").glob(".unfinished-*/rows.npy")):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    distributed.start("cpu")
    if sys.argv[2:]:
        threading.Thread(target=die_while_writing, args=sys.argv[1:2], daemon=True).start()
    main(sys.argv[1])
    distributed.stop()
