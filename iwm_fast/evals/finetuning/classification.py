"""Finetunes variants of a run for classification, to measure what its predictor is worth and what training costs.

All variants share data, augmentation, number of steps and heads, and differ in the networks that are trained.
Hyperparameters come from the settings alone, the weights of the last step are evaluated, and the validation images are
used only once, after training.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.nn import functional

from iwm_fast.config.finetuning import ARMS, FinetuneConfig
from iwm_fast.evals.datasets import LabelledSets, label_sets, require_readable, result_name, tensors_digest
from iwm_fast.evals.finetuning.mixup import BatchAugmentation
from iwm_fast.evals.finetuning.networks import build_networks, load_model
from iwm_fast.evals.finetuning.run import (
    FinetuneContext,
    TrainedVariant,
    free_memory,
    map_validation_images,
    open_context,
    split_global_batch,
    task_folder,
    train_job,
)
from iwm_fast.evals.finetuning.task import LABELS_ENTRY, Job
from iwm_fast.evals.finetuning.timm_baseline import build_timm_variant, build_vit, vit_run_config
from iwm_fast.evals.finetuning.variants import (
    PREDICTOR_VARIANTS,
    Variant,
    build_variant,
    describe_origin,
    require_arms_fit,
)
from iwm_fast.evals.results import Result, accuracy_gain, mean_row, name_with_choices, save_result
from iwm_fast.models.heads import AttentiveHead, LinearHead
from iwm_fast.pipelines.annotations.labels import Labels
from iwm_fast.pipelines.config import MAX_PIXELS, require
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero, single_process
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.runtime.preemption import Preemption
from iwm_fast.world_model import WorldModel

log = logging.getLogger(__name__)

PRETRAINED, CONTROL = "predictor", "random_predictor"


@dataclass(frozen=True, kw_only=True)
class FinetuneSource:
    """The networks that finetuning starts from: those of a run or a model from timm."""

    context: FinetuneContext
    build: Callable[[str, int], Variant]
    """Builds a variant, given its name and the number of classes."""
    origin: dict[str, Any]
    """Values besides the settings that decide the result."""


def evaluate_finetune(
    config: FinetuneConfig, rank_info: RankInfo | None = None, preemption: Preemption | None = None
) -> Result:
    """Train or resume the variants, and return and save their accuracies. Collective: every rank must call it.

    Raises:
        ValueError: if the variants, run, shards, weights or batch sizes do not fit.
        FileNotFoundError, CheckpointError: if run, weights or shards cannot be read, or a variant has other settings.
        ShardError: if a sample has no label, or a validation sample has a label that no training sample has.
        PreemptedError: if a rank was asked to stop; calling this again resumes.
    """
    rank_info = rank_info or single_process(config.runtime.device)
    with same_error_on_all_ranks():
        split_global_batch(config, rank_info.world_size)
        source = (_open_timm if config.timm else _open_run)(config, rank_info, preemption)
    context = source.context
    sets = broadcast_from_rank_zero(lambda: _read_label_sets(config, context))
    trained = {}
    for name in ARMS:
        if name in config.chosen_arms:
            trained[name] = _train_variant(name, source, sets)
            free_memory(rank_info.device)
    result = _make_result(context, sets, trained)
    broadcast_from_rank_zero(lambda: save_result(config.run or config.to, result))
    return result


def _open_run(config: FinetuneConfig, rank_info: RankInfo, preemption: Preemption | None) -> FinetuneSource:
    model = load_model(config, rank_info)
    needs_predictor = any(name in PREDICTOR_VARIANTS for name in config.chosen_arms)
    is_identity = model.config.model.predictor.depth == 0
    require(not (is_identity and needs_predictor), "arms", config.arms,
          "be encoder, attentive or both for a run with the identity predictor")  # fmt: skip
    require_arms_fit(config.chosen_arms, config.tune, model.config.model)
    context = open_context(result_name("finetune", config.data), config, model, rank_info, preemption)
    return FinetuneSource(
        context=context,
        build=lambda name, num_classes: build_classification_variant(name, model, context, num_classes),
        origin=describe_origin(model.step, model.encoder, model.predictor),
    )


def build_classification_variant(name: str, model: WorldModel, context: FinetuneContext, num_classes: int) -> Variant:
    """Build a classifier from the run's encoder and predictor, with the same weights on every rank."""
    head = functools.partial(LinearHead if name == "encoder" else AttentiveHead, num_classes=num_classes)
    return build_variant(name, build_networks(model, context.settings, context.rank_info, name), context, head)


def _open_timm(config: FinetuneConfig, rank_info: RankInfo, preemption: Preemption | None) -> FinetuneSource:
    for name in ("train", "val"):
        require(bool(getattr(config.data, name)), f"data.{name}", "", "name shards if timm is set")
    vit, max_pixels = build_vit(config), config.data.max_pixels or MAX_PIXELS
    folder = task_folder(config.to, result_name("finetune", config.data), config.name)
    model_config = vit_run_config(config, vit)
    require_arms_fit(config.chosen_arms, config.tune, model_config.model)
    context = FinetuneContext(
        settings=config,
        model_config=model_config,
        step=0,
        train=broadcast_from_rank_zero(
            lambda: open_shards(config.data.train, config.data.image, max_pixels=max_pixels)
        ),
        val=broadcast_from_rank_zero(lambda: open_shards(config.data.val, config.data.image, max_pixels=max_pixels)),
        folder=folder.with_name(name_with_choices(folder.name, config, 0)),
        rank_info=rank_info,
        preemption=preemption,
    )
    return FinetuneSource(
        context=context,
        build=lambda _, num_classes: build_timm_variant(vit, context, num_classes),
        origin={"timm": config.timm, "timm.weights": tensors_digest(vit.state_dict().values())},
    )


def _read_label_sets(config: FinetuneConfig, context: FinetuneContext) -> LabelledSets:
    sets = label_sets(context.train, context.val, config.data.label)
    accepted = f"name a label with at least two classes in the training shards, which have only {sets.classes}"
    require(len(sets.classes) >= 2, "data.label", config.data.label, accepted)
    # Training replaces bad images.
    require_readable((context.val, sets.val.samples))
    return sets


def _train_variant(name: str, source: FinetuneSource, sets: LabelledSets) -> TrainedVariant:
    """Train or resume a variant and classify the validation images with it. Collective: every rank must call it."""
    context = source.context
    variant = source.build(name, len(sets.classes))
    stats = train_job(build_classification_job(variant, context, sets.train.labels, source.origin), context)
    correct = map_validation_images(variant, context).argmax(dim=1).numpy() == sets.val.number
    log.info("%s: accuracy %.4f, %d steps, %.0f s", name, correct.mean(), stats.steps, stats.time_s)
    return TrainedVariant(per_image=correct, stats=stats)


def build_classification_job(variant: Variant, context: FinetuneContext, labels: Labels, origin: dict[str, Any]) -> Job:
    """Return the job that trains a variant on images augmented according to the settings.

    Raises:
        ValueError: if images are to be mixed and the micro-batch size is odd.
    """
    augmentation = BatchAugmentation(context.settings, len(labels.classes), context.rank_info.world_size)
    loss = functools.partial(functional.cross_entropy, reduction="sum")
    return variant.make_job(
        lambda batch: augmentation(batch.source_view, labels.of(batch.sample)),
        loss,
        origin | {LABELS_ENTRY: labels.digest},
    )


def _make_result(context: FinetuneContext, sets: LabelledSets, trained: dict[str, TrainedVariant]) -> Result:
    seed = context.settings.seed
    correct = {name: variant.per_image for name, variant in trained.items()}
    rows = [
        mean_row(
            name,
            "accuracy",
            correct[name],
            seed,
            control=correct.get(CONTROL) if name == PRETRAINED else None,
            control_name=CONTROL,
            chance=sets.chance,
            **variant.stats.columns(),
        )
        for name, variant in trained.items()
    ]
    details: dict[str, Any] = {
        "num_train_samples": context.train.num_samples,
        "classes": list(sets.classes),
        "steps": {name: variant.stats.steps for name, variant in trained.items()},
    }
    if {PRETRAINED, CONTROL} <= trained.keys():
        details["gain_of_pretraining"] = accuracy_gain(correct[PRETRAINED], correct[CONTROL], seed)
    return context.make_result("finetune", rows, details)
