"""One rank of test_tasks_ranks.py: `python ranks_tasks.py RUN TASKS NAME key=value ...`; prints what it measures."""

import sys
from dataclasses import replace

from iwm_fast import distributed
from iwm_fast.evals.multitask import evaluate_multitask
from iwm_fast.evals.segment import evaluate_segment
from iwm_fast.evals.tune_config import AugmentConfig, MultitaskConfig, SegmentConfig
from iwm_fast.messages import end_process
from painted import tuning


def main(run, tasks, name, *settings):
    changes = {key: int(value) if value.isdigit() else value for key, value in (one.split("=") for one in settings)}
    given = {"run": run, "name": name, **tuning(epochs=1.0, **changes)}
    plain = AugmentConfig(rand_augment=False, mixup=0.0, cutmix=0.0, erasing=0.0)
    evaluations = (
        (evaluate_multitask, MultitaskConfig(tasks=tasks, augment=plain, **given)),
        (evaluate_segment, SegmentConfig(arms="head,predictor,encoder", **given)),
    )
    for evaluate, config in evaluations:
        for row in evaluate(config).rows:
            print(replace(row, time_s=None, images_per_s=None), flush=True)


if __name__ == "__main__":
    distributed.start("cpu")
    main(*sys.argv[1:])
    distributed.stop()
    end_process()
