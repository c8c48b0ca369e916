"""Is the predictor worth keeping? One classification task learnt five ways from one run, and what each has cost.

Arms share data, augmentation, steps and heads; what is tuned differs. Hyperparameters are the settings', the last
step's weights are what counts, and validation images are looked at once, after it.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.nn import functional

from iwm_fast import world_model
from iwm_fast.config.finetuning import ARMS, FinetuneConfig
from iwm_fast.evals.datasets import LabelledSets, label_sets, result_name, tensors_digest
from iwm_fast.evals.finetuning.mixup import Mixing
from iwm_fast.evals.finetuning.networks import networks
from iwm_fast.evals.finetuning.run import (
    FinetuneContext,
    Learnt,
    free_memory,
    micro_batches,
    open_context,
    predict,
    task_folder,
    tune,
)
from iwm_fast.evals.finetuning.task import Job
from iwm_fast.evals.finetuning.timm_baseline import build_timm_arm, build_vit, vit_config
from iwm_fast.evals.finetuning.variants import WITH_PREDICTOR, Arm, build_arm, origin_of
from iwm_fast.evals.results import Result, accuracy_gain, mean_row, save_result
from iwm_fast.models.heads import AttentiveHead, LinearHead
from iwm_fast.pipelines.annotations.labels import Labels
from iwm_fast.pipelines.config import check
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero, single_process
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.runtime.preemption import Preemption
from iwm_fast.world_model import WorldModel

log = logging.getLogger(__name__)

PRETRAINED, CONTROL = "predictor", "random_predictor"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Whose networks are finetuned."""

    context: FinetuneContext
    build: Callable[[str, int], Arm]
    """From the name of an arm and the number of classes."""
    origin: dict[str, Any]
    """What the outcome depends on beside the settings."""


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
        subject = (_timm_model if config.timm else _run)(config, rank_info, preemption)
    context = subject.context
    sets = broadcast_from_rank_zero(lambda: _open(config, context))
    learnt = {}
    for arm in ARMS:
        if arm in config.chosen_arms:
            learnt[arm] = _learn(arm, subject, sets)
            free_memory(rank_info.device)
    result = _report(context, sets, learnt)
    broadcast_from_rank_zero(lambda: save_result(config.run or config.to, result))
    return result


def _run(config: FinetuneConfig, rank_info: RankInfo, preemption: Preemption | None) -> Subject:
    model = world_model.load(config.run, rank_info.device, checkpoint=config.checkpoint)
    needing = [arm for arm in config.chosen_arms if arm in WITH_PREDICTOR]
    is_identity = model.config.model.predictor.depth == 0
    check(not (is_identity and needing), "arms", config.arms,
          "be encoder, attentive or both: this run was trained with the identity predictor")  # fmt: skip
    context = open_context(result_name("finetune", config.data), config, model, rank_info, preemption)
    return Subject(
        context=context,
        build=lambda arm, num_classes: classification_arm(arm, model, context, num_classes),
        origin=origin_of(model.step, model.encoder, model.predictor),
    )


def classification_arm(name: str, model: WorldModel, context: FinetuneContext, num_classes: int) -> Arm:
    """Build an arm of classification from the run's teacher and predictor; the same on every rank."""
    head = functools.partial(LinearHead if name == "encoder" else AttentiveHead, num_classes=num_classes)
    return build_arm(name, networks(model, context.task, context.rank_info, name), context, head)


def _timm_model(config: FinetuneConfig, rank_info: RankInfo, preemption: Preemption | None) -> Subject:
    for name in ("train", "val"):
        check(bool(getattr(config.data, name)), f"data.{name}", "", "name shards where timm is given")
    vit = build_vit(config)
    context = FinetuneContext(
        task=config,
        model_config=vit_config(config, vit),
        step=0,
        train=open_shards(config.data.train),
        val=open_shards(config.data.val),
        folder=task_folder(config.to, result_name("finetune", config.data), config.name),
        rank_info=rank_info,
        preemption=preemption,
    )
    return Subject(
        context=context,
        build=lambda _, num_classes: build_timm_arm(vit, context, num_classes),
        origin={"timm": config.timm, "timm.weights": tensors_digest(vit.state_dict().values())},
    )


def _open(config: FinetuneConfig, context: FinetuneContext) -> LabelledSets:
    sets = label_sets(context.train, context.val, config.data.label)
    check(len(sets.classes) >= 2, "data.label", config.data.label, f"tell classes apart: all are {sets.classes}")
    return sets


def _learn(name: str, subject: Subject, sets: LabelledSets) -> Learnt:
    """Train an arm, or go on with it, and ask it about the validation images; collective."""
    context = subject.context
    arm = subject.build(name, len(sets.classes))
    tuned = tune(classification_job(arm, context, sets.train.labels, subject.origin), context)
    correct = predict(arm, context).argmax(dim=1).numpy() == sets.val.number
    log.info("%s: accuracy %.4f, %d steps, %.0f s", name, correct.mean(), tuned.steps, tuned.time_s)
    return Learnt(measured=correct, tuned=tuned)


def classification_job(arm: Arm, context: FinetuneContext, labels: Labels, origin: dict[str, Any]) -> Job:
    """Return what is to be trained of an arm, on images that are erased and mixed as the settings say.

    Raises:
        ValueError: if images are to be mixed and a micro-batch is of odd size.
    """
    mixing = Mixing(context.task, len(labels.classes), context.rank_info.world_size)
    loss = functools.partial(functional.cross_entropy, reduction="sum")
    return arm.job(lambda batch: mixing(batch.source_view, labels.of(batch.sample)), loss, origin)


def _report(context: FinetuneContext, sets: LabelledSets, learnt: dict[str, Learnt]) -> Result:
    seed = context.task.seed
    correct = {arm: one.measured for arm, one in learnt.items()}
    rows = [
        mean_row(
            arm,
            "accuracy",
            correct[arm],
            seed,
            control=correct.get(CONTROL) if arm == PRETRAINED else None,
            control_name=CONTROL,
            chance=sets.chance,
            **one.tuned.columns(),
        )
        for arm, one in learnt.items()
    ]
    details: dict[str, Any] = {
        "num_train_samples": context.train.num_samples,
        "classes": list(sets.classes),
        "steps": {arm: one.tuned.steps for arm, one in learnt.items()},
    }
    if {PRETRAINED, CONTROL} <= learnt.keys():
        details["gain_of_pretraining"] = accuracy_gain(correct[PRETRAINED], correct[CONTROL], seed)
    return context.result("finetune", rows, details)
