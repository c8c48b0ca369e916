"""A rank of test_task_ranks.py, `python ranks_tasks.py RUN TASKS NAME key=value ...`: prints the rows."""

import sys
from dataclasses import replace

from fixtures.painted_shards import finetune_settings
from iwm_fast.config.finetuning import AugmentConfig, DecodeConfig, DecoderTuneConfig, MultitaskConfig, SegmentConfig
from iwm_fast.evals.decoding.evaluate import evaluate_decode
from iwm_fast.evals.multitask.evaluate import evaluate_multitask
from iwm_fast.evals.segmentation.evaluate import evaluate_segment
from iwm_fast.runtime import distributed
from iwm_fast.runtime.process import end_process


def main(rank_info, run, tasks, name, *settings):
    changes = {
        key: int(value) if value.isdigit() else value for key, value in (setting.split("=") for setting in settings)
    }
    shared = {"run": run, "name": name, **finetune_settings(epochs=1.0, **changes)}
    plain = AugmentConfig(rand_augment=False, mixup=0.0, cutmix=0.0, erasing=0.0)
    tune = DecoderTuneConfig(steps=20, global_batch_size=8, precision="fp32")
    evaluations = (
        (evaluate_multitask, MultitaskConfig(tasks=tasks, augment=plain, **shared)),
        (evaluate_segment, SegmentConfig(arms="head,predictor,encoder", **shared)),
        (evaluate_decode, DecodeConfig(controls=False, **shared | {"tune": tune})),
    )
    for evaluate, config in evaluations:
        for row in evaluate(config, rank_info).rows:
            print(replace(row, time_s=None, images_per_s=None), flush=True)


if __name__ == "__main__":
    main(distributed.start("cpu"), *sys.argv[1:])
    distributed.stop()
    end_process()
