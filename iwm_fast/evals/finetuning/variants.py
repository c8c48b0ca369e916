"""The variants of finetuning: which networks are trained, on what inputs, and at which learning rates.

Variants with a predictor use the world model as part of the classifier. Its context is the complete image, the action
is the null action (see `conditions` for training), and mask tokens stand at all positions; an attentive head classifies
the predicted tokens. The head
follows the projection to the encoder's width, whose outputs are the tokens that pretraining optimised. All attentive
variants therefore have identical heads, and differ only in the networks below them.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwm_fast.config.finetuning import TuneConfig
from iwm_fast.config.run import ModelConfig
from iwm_fast.engines.optimizer import build_scaled_optimizer
from iwm_fast.evals.datasets import tensors_digest
from iwm_fast.evals.finetuning.conditions import Conditions, null_conditions, training_conditions
from iwm_fast.evals.finetuning.layer_decay import head_layer_index, layer_index, train_last_blocks_
from iwm_fast.evals.finetuning.networks import Encode, freeze_encoder, seeded_init
from iwm_fast.evals.finetuning.run import FinetuneContext
from iwm_fast.evals.finetuning.task import Job
from iwm_fast.models.encoder import Encoder
from iwm_fast.models.heads import AttentiveHead, LinearHead, PatchHead
from iwm_fast.models.layers import set_drop_path_
from iwm_fast.models.predictor import IdentityPredictor, Predictor
from iwm_fast.models.student import Student
from iwm_fast.pipelines.batch import Batch, RaggedIndex
from iwm_fast.pipelines.config import require

Head = LinearHead | AttentiveHead | PatchHead

PREDICTOR_VARIANTS = ("predictor", "random_predictor", "end_to_end")
ENCODER_VARIANTS = ("encoder", "end_to_end")


@dataclass(frozen=True, kw_only=True)
class VariantInputs:
    """The inputs of a variant's network for one micro-batch."""

    view: Float[Tensor, "B 3 H W"] | None
    """Normalised images; None if the encoder is frozen."""
    tokens: Float[Tensor, "*rows D"] | None
    """Tokens from the frozen encoder, (B, N, D), or packed, (C, D), if not all patches are visible; None if the encoder
    is trained."""
    action: Float[Tensor, "B A"]
    """Change that the predictor is told; the null action predicts the image without any change."""
    patches: RaggedIndex
    """All patches, which are the target."""
    context: RaggedIndex | None = None
    """Visible patches; None: all."""
    label: Any = None
    """Targets of the loss; None in evaluation."""


class VariantNetwork(nn.Module):
    """The trained part of a variant: a head, with or without a predictor and an encoder below it."""

    def __init__(self, head: Head, *, predictor: Predictor | None = None, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.encoder: Encoder | None = encoder
        self.predictor: Predictor | None = predictor
        self.head: Head = head

    def forward(self, inputs: VariantInputs) -> Float[Tensor, "B *rest"]:
        """Return the head's output: the logits of each image, (B, K), or of each patch, (B, N, K)."""
        tokens = inputs.tokens
        if self.encoder is not None:
            assert inputs.view is not None
            tokens = self.encoder(inputs.view, inputs.context)
        assert tokens is not None
        if self.predictor is not None:
            context = inputs.context or inputs.patches
            tokens = self.predictor(tokens.flatten(0, -2), inputs.action, context, inputs.patches)
        return self.head(tokens.reshape(len(inputs.action), -1, tokens.shape[-1]))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to finetune a run: its networks and their optimiser."""

    name: str
    module: nn.Module
    """Trained network, which takes `VariantInputs`."""
    encode: Encode | None
    """Frozen encoder; None if the trained network takes images."""
    optimizer: torch.optim.AdamW
    """Optimiser of the trained parameters, with a learning rate for each layer."""
    condition: Callable[[Batch], Conditions] = null_conditions
    """Returns action and visible patches of a micro-batch in training."""

    def make_job(
        self,
        augment: Callable[[Batch], tuple[Float[Tensor, "B 3 H W"], Any]],
        loss: Callable[[Float[Tensor, "B *rest"], Any], Float[Tensor, ""]],
        origin: dict[str, Any],
    ) -> Job:
        """Return the job that trains this variant.

        Args:
            augment: maps a micro-batch to the images to train on and their labels.
            loss: maps logits and labels to the loss summed over images.
            origin: values besides the settings that decide the result.
        """
        return Job(
            name=self.name,
            module=self.module,
            prepare=lambda batch: self._inputs(batch, self.condition(batch), *augment(batch)),
            loss=lambda logits, inputs: loss(logits, inputs.label),
            optimizer=self.optimizer,
            origin=origin,
        )

    def _inputs(
        self, batch: Batch, conditions: Conditions, view: Float[Tensor, "B 3 H W"], label: Any = None
    ) -> VariantInputs:
        return VariantInputs(
            view=view if self.encode is None else None,
            tokens=None if self.encode is None else self.encode(view, conditions.context),
            action=conditions.action,
            patches=batch.context,
            context=conditions.context,
            label=label,
        )

    def __call__(self, batch: Batch) -> Float[Tensor, "B *rest"]:
        """Return the logits of images without augmentation."""
        return self.module(self._inputs(batch, null_conditions(batch), batch.source_view))


def build_variant(name: str, student: Student, context: FinetuneContext, make_head: Callable[[int], Head]) -> Variant:
    """Build a variant with the same weights on every rank.

    Args:
        name: name of the variant.
        student: encoder and predictor with their initial weights.
        context: context shared by all variants.
        make_head: returns a head with new weights, given the encoder's width.
    """
    settings, model_config = context.settings, context.model_config.model
    tune, run_config = settings.tune, context.run_config
    with seeded_init(settings.seed):
        head = make_head(student.encoder.dim)
    trains_encoder = name in ENCODER_VARIANTS
    predictor = student.predictor if name in PREDICTOR_VARIANTS else None
    # Runs with the identity predictor were refused when the settings were checked.
    assert not isinstance(predictor, IdentityPredictor)
    module = VariantNetwork(head, predictor=predictor, encoder=student.encoder if trains_encoder else None)
    depths = model_config.encoder.depth, model_config.predictor.depth
    train_last_blocks_(module, tune.blocks, *(depths if predictor is not None else depths[:1]))
    set_drop_path_(module, tune.drop_path)
    scales = functools.partial(lr_scale, variant=name, tune=tune, model_config=model_config)
    return Variant(
        name=name,
        module=module,
        encode=None if trains_encoder else freeze_encoder(student.encoder, context.rank_info),
        optimizer=build_scaled_optimizer(module, run_config.optim, scales),
        condition=null_conditions
        if predictor is None
        else functools.partial(training_conditions, tune=tune, config=run_config),
    )


def require_arms_fit(arms: Sequence[str], tune: TuneConfig, model_config: ModelConfig) -> None:
    """Check that the settings of the finetuning task apply to the arms, before anything is trained.

    Raises:
        ValueError: if there are fewer blocks than are to be trained, or a setting has no effect.
    """
    encoder, predictor = model_config.encoder.depth, model_config.predictor.depth
    depths = {"encoder": encoder, "end_to_end": encoder + predictor}
    depths |= dict.fromkeys(("predictor", "random_predictor"), predictor)
    depths = {arm: depths[arm] for arm in arms if arm in depths}
    named = f"the arms {', '.join(arms)}"
    if tune.blocks is not None:
        require(bool(depths), "tune.blocks", tune.blocks, f"be unset for {named}, which train a head alone")
        shallowest = min(depths, key=lambda arm: depths[arm])
        accepted = (
            f"be at most {depths[shallowest]}, the number of blocks in the arm {shallowest}, or unset to train all"
        )
        require(tune.blocks <= depths[shallowest], "tune.blocks", tune.blocks, accepted)
    for name, default in (("action", "null"), ("context", "full")):
        is_used = any(arm in PREDICTOR_VARIANTS for arm in arms)
        value = getattr(tune, name)
        require(is_used or value == default, f"tune.{name}", value, f"be {default} for {named}, without a predictor")


def lr_scale(parameter: str, *, variant: str, tune: TuneConfig, model_config: ModelConfig) -> float:
    """Return the ratio of a parameter's peak learning rate to tune.lr; `parameter` is its name."""
    is_head = parameter.startswith("head.")
    if variant == "encoder":
        depth = model_config.encoder.depth
        layers_below_head = head_layer_index(depth) - layer_index(parameter, depth)
        return tune.encoder_lr / tune.lr * tune.layer_decay**layers_below_head
    if variant == "end_to_end":
        depths = model_config.encoder.depth, model_config.predictor.depth
        layers_below_head = head_layer_index(*depths) - layer_index(parameter, *depths)
        return (1.0 if is_head else tune.pretrained_lr_factor) * tune.end_to_end_layer_decay**layers_below_head
    return tune.pretrained_lr_factor if variant == "predictor" and not is_head else 1.0


def describe_origin(step: int, *networks: nn.Module) -> dict[str, Any]:
    """Return the origin of a job: the step of the run's checkpoint and a digest of the networks' weights."""
    weights = (tensor for network in networks for tensor in network.state_dict().values())
    return {"run.step": step, "run.weights": tensors_digest(weights)}
