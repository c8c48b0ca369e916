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

from iwm_fast.config.finetuning import TuneConfig
from iwm_fast.config.run import ModelConfig
from iwm_fast.engines.optimizer import scaled_optimizer
from iwm_fast.evals.datasets import tensors_digest
from iwm_fast.evals.finetuning.layer_decay import layer_of, top_layer
from iwm_fast.evals.finetuning.networks import Encode, frozen, seeded
from iwm_fast.evals.finetuning.run import FinetuneContext
from iwm_fast.evals.finetuning.task import Job
from iwm_fast.models.encoder import Encoder
from iwm_fast.models.heads import AttentiveHead, LinearHead, PatchHead
from iwm_fast.models.layers import set_drop_path_
from iwm_fast.models.predictor import IdentityPredictor, Predictor
from iwm_fast.models.student import Student
from iwm_fast.pipelines.batch import Batch, RaggedIndex

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
    label: Any = None
    """What the loss compares with, in training."""


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
    """One way to learn a task: its networks, and how fast they learn."""

    name: str
    module: nn.Module
    """What is trained; takes `ArmInputs`."""
    encode: Encode | None
    """The frozen encoder; None where images go into the network."""
    optimizer: torch.optim.AdamW
    """Over the trained parameters, each part at its own rate."""

    def job(
        self,
        change: Callable[[Batch], tuple[Float[Tensor, "B 3 H W"], Any]],
        loss: Callable[[Float[Tensor, "B *rest"], Any], Float[Tensor, ""]],
        origin: dict[str, Any],
    ) -> Job:
        """Return what is to be trained.

        Args:
            change: returns the images of a micro-batch as they are learnt from, and their labels.
            loss: of scores and labels, the sum over images.
            origin: what the outcome depends on beside the settings.
        """
        return Job(
            name=self.name,
            module=self.module,
            prepare=lambda batch: self._inputs(batch, *change(batch)),
            loss=lambda scores, inputs: loss(scores, inputs.label),
            optimizer=self.optimizer,
            origin=origin,
        )

    def _inputs(self, batch: Batch, view: Float[Tensor, "B 3 H W"], label: Any = None) -> ArmInputs:
        return ArmInputs(
            view=view if self.encode is None else None,
            tokens=None if self.encode is None else self.encode(view),
            action=torch.zeros_like(batch.action),
            everything=batch.context,
            label=label,
        )

    def __call__(self, batch: Batch) -> Float[Tensor, "B *rest"]:
        """Return the scores of clean images."""
        return self.module(self._inputs(batch, batch.source_view))


def build_arm(name: str, student: Student, context: FinetuneContext, make_head: Callable[[int], Head]) -> Arm:
    """Put an arm together; the same on every rank.

    Args:
        name: of the arm.
        student: encoder and predictor as it begins with them.
        context: what all arms are trained with.
        make_head: from the width of the encoder to a head with new weights.
    """
    task = context.task
    with seeded(task.seed):
        head = make_head(student.encoder.dim)
    is_trained = name in WITH_ENCODER
    predictor = student.predictor if name in WITH_PREDICTOR else None
    # arms that need one are refused before
    assert not isinstance(predictor, IdentityPredictor)
    module = ArmNetwork(head, predictor=predictor, encoder=student.encoder if is_trained else None)
    set_drop_path_(module, task.tune.drop_path)
    scales = functools.partial(lr_scale, arm=name, tune=task.tune, networks_of=context.model_config.model)
    return Arm(
        name=name,
        module=module,
        encode=None if is_trained else frozen(student.encoder, context.rank_info),
        optimizer=scaled_optimizer(module, context.config.optim, scales),
    )


def lr_scale(parameter: str, *, arm: str, tune: TuneConfig, networks_of: ModelConfig) -> float:
    """Return a parameter's peak learning rate over tune.lr."""
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
