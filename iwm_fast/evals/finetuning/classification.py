"""Is the predictor worth keeping? One classification task learnt five ways from one run, and what each has cost.

Arms share data, augmentation, steps and heads; what is tuned differs. Hyperparameters are the settings', the last
step's weights are what counts, and validation images are looked at once, after it.
"""

import gc
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from iwm_fast import world_model
from iwm_fast.config.finetuning import ARMS, FinetuneConfig
from iwm_fast.config.run import RunConfig
from iwm_fast.evals.datasets import read_both_labels, result_name, training_shards, validation_shards
from iwm_fast.evals.finetuning.run import micro_batches, predict, run_config, task_folder, tune
from iwm_fast.evals.finetuning.timm_baseline import build_timm_arm, build_vit, vit_config
from iwm_fast.evals.finetuning.variants import WITH_PREDICTOR, Arm, Lesson, build_arm
from iwm_fast.evals.results import Result, Row, accuracy_row, bootstrap, save_result
from iwm_fast.pipelines.annotations.labels import Labels
from iwm_fast.pipelines.config import check
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero, single_process
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.runtime.preemption import Preemption
from iwm_fast.training.train_state import TrainStats

log = logging.getLogger(__name__)

PRETRAINED, CONTROL = "predictor", "random_predictor"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Whose networks are finetuned, and on what."""

    config: RunConfig
    step: int
    folder: str
    """Where results go."""
    build: Callable[[str, Lesson], Arm]
    shards: Callable[[], tuple[ShardSet, ShardSet]]
    """Opens training and validation samples."""


@dataclass(frozen=True, kw_only=True)
class Sets:
    """What is learnt and what is asked."""

    train: ShardSet
    val: ShardSet
    known: Labels
    """Of the training samples."""
    asked: Labels
    """Of the validation samples, with the same classes."""


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What an arm has come to."""

    correct: Float64[np.ndarray, "images"]
    """1 for each validation image that is named rightly, 0 for the others."""
    tuned: TrainStats


def evaluate_finetune(
    config: FinetuneConfig, rank_info: RankInfo | None = None, preemption: Preemption | None = None
) -> Result:
    """Train the arms, or go on with them, and report each one's accuracy; collective, saved by rank 0.

    Raises:
        ValueError: if arms, run, shards, weights or sizes of batches do not fit.
        FileNotFoundError, CheckpointError: if the run, the weights or the shards cannot be read, or an arm was trained
            with other settings.
        ShardError: if a sample lacks a label, or a validation sample has one that no training sample has.
        PreemptedError: if a rank was told to stop; the same call goes on.
    """
    rank_info = rank_info or single_process(config.runtime.device)
    with same_error_on_all_ranks():
        micro_batches(config, rank_info.world_size)
        subject = _timm_model(config) if config.timm else _run(config, rank_info)
    sets = broadcast_from_rank_zero(lambda: _open(config, subject))
    learnt = {
        arm: _learn(arm, config, subject, sets, rank_info=rank_info, preemption=preemption)
        for arm in ARMS
        if arm in config.chosen_arms
    }
    result = _report(config, subject, sets, learnt)
    broadcast_from_rank_zero(lambda: save_result(subject.folder, result))
    return result


def _run(config: FinetuneConfig, rank_info: RankInfo) -> Subject:
    model = world_model.load(config.run, rank_info.device)
    needing = [arm for arm in config.chosen_arms if arm in WITH_PREDICTOR]
    is_identity = model.config.model.predictor.depth == 0
    check(not (is_identity and needing), "arms", config.arms,
          "be encoder, attentive or both: this run was trained with the identity predictor")  # fmt: skip
    return Subject(
        config=model.config,
        step=model.step,
        folder=config.run,
        build=lambda arm, lesson: build_arm(arm, model, lesson),
        shards=lambda: (training_shards(model, config.data), validation_shards(model, config.data)),
    )


def _timm_model(config: FinetuneConfig) -> Subject:
    for name in ("train", "val"):
        check(bool(getattr(config.data, name)), f"data.{name}", "", "name shards where timm is given")
    vit = build_vit(config)
    return Subject(
        config=vit_config(config, vit),
        step=0,
        folder=config.to,
        build=lambda _, lesson: build_timm_arm(config, vit, lesson),
        shards=lambda: (open_shards(config.data.train), open_shards(config.data.val)),
    )


def _open(config: FinetuneConfig, subject: Subject) -> Sets:
    train, val = subject.shards()
    known, asked = read_both_labels(train, val, config.data.label)
    check(len(known.classes) >= 2, "data.label", config.data.label, f"tell classes apart: all are {known.classes}")
    return Sets(train=train, val=val, known=known, asked=asked)


def _learn(
    name: str,
    config: FinetuneConfig,
    subject: Subject,
    sets: Sets,
    *,
    rank_info: RankInfo,
    preemption: Preemption | None,
) -> Learnt:
    folder = task_folder(subject.folder, result_name("finetune", config.data), config.name)
    settings = run_config(config, subject.config, folder / name)
    arm = subject.build(name, Lesson(task=config, config=settings, labels=sets.known, rank_info=rank_info))
    tuned = tune(
        arm.job, config, model_config=subject.config, shards=sets.train, rank_info=rank_info, folder=folder,
        preemption=preemption,
    )  # fmt: skip
    scores = predict(arm.call, settings, sets.val, np.arange(sets.val.num_samples), rank_info)
    correct = scores.argmax(dim=1).numpy() == sets.asked.number
    log.info("%s: accuracy %.4f, %d steps, %.0f s", name, correct.mean(), tuned.steps, tuned.time_s)
    del arm, scores
    # engines hold on to themselves in circles, and on to memory
    gc.collect()
    if rank_info.device.type == "cuda":
        torch.cuda.empty_cache()
    return Learnt(correct=correct.astype(np.float64), tuned=tuned)


def _report(config: FinetuneConfig, subject: Subject, sets: Sets, learnt: dict[str, Learnt]) -> Result:
    rows = [_row(arm, learnt, sets, config.seed) for arm in learnt]
    details: dict[str, Any] = {
        "num_train_samples": sets.train.num_samples,
        "classes": list(sets.known.classes),
        "steps": {arm: one.tuned.steps for arm, one in learnt.items()},
    }
    if {PRETRAINED, CONTROL} <= learnt.keys():
        # the same images: their differences vary less than two accuracies
        gain = learnt[PRETRAINED].correct - learnt[CONTROL].correct
        low, high = bootstrap(gain, config.seed)
        details["gain_of_pretraining"] = {"accuracy": float(gain.mean()), "low": low, "high": high}
    return Result(
        task="finetune",
        # as its folder is called
        name=task_folder(subject.folder, result_name("finetune", config.data), config.name).name,
        rows=tuple(rows),
        step=subject.step,
        seed=config.seed,
        settings=asdict(config),
        details=details,
    )


def _row(arm: str, learnt: dict[str, Learnt], sets: Sets, seed: int) -> Row:
    has_control = arm == PRETRAINED and CONTROL in learnt
    return accuracy_row(
        arm,
        learnt[arm].correct,
        seed,
        control=float(learnt[CONTROL].correct.mean()) if has_control else None,
        control_name=CONTROL if has_control else "",
        chance=1 / len(sets.known.classes),
        **learnt[arm].tuned.columns(),
    )
