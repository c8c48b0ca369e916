"""The arms of finetuning: which networks are trained, on what they stand, and how fast each part learns.

Predictor arms use the world model as a part of the classifier: the whole image as context, the null action, mask tokens
at all positions, an attentive head on what is predicted. The head sits behind the projection to the encoder's width,
where the tokens are those that pretraining asked for; so heads of all attentive arms are alike, and arms differ in
nothing but what is under them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwm_fast.config.finetuning import TuneTask
from iwm_fast.config.run import OptimConfig, RunConfig
from iwm_fast.engines.optimizer import scaled_optimizer
from iwm_fast.evals.datasets import tensors_digest
from iwm_fast.evals.finetuning.layer_decay import layer_of, top_layer
from iwm_fast.evals.finetuning.mixup import Mixing, soft_cross_entropy
from iwm_fast.evals.finetuning.networks import Encode, frozen, networks, seeded
from iwm_fast.evals.finetuning.task import Job
from iwm_fast.models.encoder import Encoder
from iwm_fast.models.heads import AttentiveHead, LinearHead, PatchHead
from iwm_fast.models.layers import set_drop_path_
from iwm_fast.models.predictor import IdentityPredictor, Predictor
from iwm_fast.models.student import Student
from iwm_fast.pipelines.annotations.labels import Labels
from iwm_fast.pipelines.batch import Batch, RaggedIndex
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.world_model import WorldModel

Head = LinearHead | AttentiveHead | PatchHead

WITH_PREDICTOR = ("predictor", "random_predictor", "end_to_end")
WITH_ENCODER = ("encoder", "end_to_end")


@dataclass(frozen=True, kw_only=True)
class ArmInputs:
    """A micro-batch as an arm's network takes it."""

    view: Float[Tensor, "B 3 H W"] | None
    """Normalised images, where the encoder is trained."""
    tokens: Float[Tensor, "B N D"] | None
    """The frozen encoder's, where it is not."""
    action: Float[Tensor, "B A"]
    """Null: nothing is to change."""
    everything: RaggedIndex
    """All patches: context and target alike."""
    label: Float[Tensor, "B K"] | None = None
    """Shares of classes, in training."""


class ArmNetwork(nn.Module):
    """What an arm trains: a head, on a predictor or none, on an encoder or frozen tokens."""

    def __init__(self, head: Head, *, predictor: Predictor | None = None, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.encoder, self.predictor, self.head = encoder, predictor, head

    def forward(self, inputs: ArmInputs) -> Float[Tensor, "B *rest"]:
        """Return what the head says of each image: one score for each class, or that of each patch."""
        tokens = inputs.tokens
        if self.encoder is not None:
            assert inputs.view is not None
            tokens = self.encoder(inputs.view, None).unflatten(0, (len(inputs.view), -1))
        assert tokens is not None
        if self.predictor is not None:
            everything = inputs.everything
            predicted = self.predictor(tokens.flatten(0, 1), inputs.action, everything, everything)
            tokens = predicted.unflatten(0, tokens.shape[:2])
        return self.head(tokens)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to learn the task, ready to be trained and asked."""

    job: Job
    call: Callable[[Batch], Float[Tensor, "B K"]]
    """Scores of clean images."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What all arms have in common."""

    task: TuneTask
    config: RunConfig
    """See `iwm_fast.evals.finetuning.run.run_config`."""
    labels: Labels
    """Of the training samples."""
    rank_info: RankInfo

    @property
    def num_classes(self) -> int:
        """How many classes the training samples have."""
        return len(self.labels.classes)


def build_arm(name: str, model: WorldModel, lesson: Lesson) -> Arm:
    """Build an arm of classification from the run's teacher and predictor; the same on every rank.

    Raises:
        ValueError: if images are to be mixed and a micro-batch is of odd size.
    """
    head = functools.partial(LinearHead if name == "encoder" else AttentiveHead, num_classes=lesson.num_classes)
    parts = build_parts(name, model, lesson.task, lesson.rank_info, head)
    optimizer = parts.optimizer(lesson.config.optim)
    origin = origin_of(model.step, model.encoder, model.predictor)
    return arm_of(name, parts.module, optimizer, lesson, encode=parts.encode, origin=origin)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The networks of an arm, of any task."""

    name: str
    module: ArmNetwork
    """What is trained."""
    encode: Encode | None
    """The frozen encoder; None where images go into the network."""
    student: Student
    """Encoder and predictor as the arm begins with them."""
    task: TuneTask
    model: WorldModel

    def optimizer(self, config: OptimConfig) -> torch.optim.AdamW:
        """Return AdamW over the trained parameters, each part at its own rate."""
        scales = functools.partial(lr_scale, arm=self.name, task=self.task, model=self.model)
        return scaled_optimizer(self.module, config, scales)


def build_parts(
    name: str, model: WorldModel, task: TuneTask, rank_info: RankInfo, make_head: Callable[[int], Head]
) -> Parts:
    """Build an arm's networks from the run's teacher and predictor; the same on every rank.

    Args:
        name: of the arm: random_predictor has a predictor, untrained_head an encoder as before training.
        model: the run.
        task: settings.
        rank_info: this process.
        make_head: from the width of the encoder to a head with new weights.
    """
    student = networks(model, task, rank_info)
    if name == "random_predictor":
        student.predictor = networks(model, task, rank_info, is_new=True).predictor
    if name == "untrained_head":
        student.encoder = networks(model, task, rank_info, is_new=True).encoder
    with seeded(task.seed):
        head = make_head(student.encoder.dim)
    is_trained = name in WITH_ENCODER
    predictor = student.predictor if name in WITH_PREDICTOR else None
    # arms that need one are refused before
    assert not isinstance(predictor, IdentityPredictor)
    module = ArmNetwork(head, predictor=predictor, encoder=student.encoder if is_trained else None)
    set_drop_path_(module, task.tune.drop_path)
    return Parts(
        name=name,
        module=module,
        encode=None if is_trained else frozen(student.encoder, rank_info),
        student=student,
        task=task,
        model=model,
    )


def arm_of(
    name: str,
    module: nn.Module,
    optimizer: torch.optim.AdamW,
    lesson: Lesson,
    *,
    encode: Encode | None,
    origin: dict[str, Any],
) -> Arm:
    """Put a network that takes `ArmInputs` to its data.

    Args:
        name: of the arm.
        module: what is trained.
        optimizer: over its parameters.
        lesson: what all arms have in common.
        encode: the frozen encoder; None where images go into the network.
        origin: what the outcome depends on beside the settings.
    """
    mixing = Mixing(lesson.task, lesson.num_classes, lesson.rank_info.world_size)

    def inputs(view: Float[Tensor, "B 3 H W"], batch: Batch, label: Tensor | None = None) -> ArmInputs:
        return ArmInputs(
            view=view if encode is None else None,
            tokens=None if encode is None else encode(view),
            action=torch.zeros_like(batch.action),
            everything=batch.context,
            label=label,
        )

    def prepare(batch: Batch) -> ArmInputs:
        view, label = mixing(batch.source_view, lesson.labels.of(batch.sample))
        return inputs(view, batch, label)

    def loss(scores: Float[Tensor, "B K"], given: ArmInputs) -> Float[Tensor, ""]:
        assert given.label is not None
        return soft_cross_entropy(scores, given.label)

    job = Job(name=name, module=module, prepare=prepare, loss=loss, optimizer=optimizer, origin=origin)
    return Arm(job=job, call=lambda batch: module(inputs(batch.source_view, batch)))


def lr_scale(parameter: str, *, arm: str, task: TuneTask, model: WorldModel) -> float:
    """Return a parameter's peak learning rate over tune.lr."""
    tune, networks_of = task.tune, model.config.model
    is_head = parameter.startswith("head.")
    if arm == "encoder":
        depth = networks_of.encoder.depth
        below = top_layer(depth) - layer_of(parameter, depth)
        return tune.encoder_lr / tune.lr * tune.layer_decay**below
    if arm == "end_to_end":
        depths = networks_of.encoder.depth, networks_of.predictor.depth
        below = top_layer(*depths) - layer_of(parameter, *depths)
        return (1.0 if is_head else tune.pretrained_lr_factor) * tune.end_to_end_layer_decay**below
    return tune.pretrained_lr_factor if arm == "predictor" and not is_head else 1.0


def origin_of(step: int, *networks: nn.Module) -> dict[str, Any]:
    """Return which networks a job starts from: the step of their checkpoint and a digest of their weights."""
    weights = (tensor for network in networks for tensor in network.state_dict().values())
    return {"run.step": step, "run.weights": tensors_digest(weights)}
