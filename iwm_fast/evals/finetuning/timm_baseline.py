"""The encoder arm of a timm ViT, for comparison: other people's weights, trained and measured as a run's encoder is."""

from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from iwm_fast.config.finetuning import FinetuneConfig, TuneConfig
from iwm_fast.config.run import EncoderConfig, ModelConfig, PredictorConfig, RunConfig
from iwm_fast.engines.optimizer import adamw
from iwm_fast.evals.finetuning.layer_decay import timm_scales
from iwm_fast.evals.finetuning.networks import seeded
from iwm_fast.evals.finetuning.run import FinetuneContext
from iwm_fast.evals.finetuning.variants import Arm, ArmInputs
from iwm_fast.models.heads import LinearHead
from iwm_fast.pipelines.config import ViewConfig, check
from iwm_fast.pipelines.transforms.normalization import PIXEL_MEAN, PIXEL_STD


class TimmNetwork(nn.Module):
    """A timm ViT and a linear head on the mean over its patches, as in the encoder arm."""

    scale: Tensor
    shift: Tensor

    def __init__(self, vit: VisionTransformer, num_classes: int) -> None:
        super().__init__()
        self.vit = vit
        self.head = LinearHead(vit.embed_dim, num_classes)
        expected: dict[str, Any] = getattr(vit, "pretrained_cfg", {})
        mean = torch.tensor(expected.get("mean", PIXEL_MEAN))
        std = torch.tensor(expected.get("std", PIXEL_STD))
        # views come normalised with our mean and deviation, the weights may know others
        self.register_buffer("scale", (torch.tensor(PIXEL_STD) / std)[:, None, None], persistent=False)
        self.register_buffer("shift", ((torch.tensor(PIXEL_MEAN) - mean) / std)[:, None, None], persistent=False)

    def forward(self, inputs: ArmInputs) -> Float[Tensor, "B K"]:
        """Return one score for each class."""
        assert inputs.view is not None
        tokens = self.vit.forward_features(inputs.view * self.scale + self.shift)
        return self.head(tokens[:, self.vit.num_prefix_tokens :])


def build_vit(config: FinetuneConfig) -> VisionTransformer:
    """Build the timm model that the settings name, with their weights.

    Raises:
        ValueError: if timm has no such ViT, or the weights do not fit it, or a setting has no effect on it.
        FileNotFoundError: if there is no such file of weights.
    """
    check(timm.is_model(config.timm), "timm", config.timm, "name a model of timm's, such as vit_base_patch16_224")
    check(config.runtime.ops == "reference", "runtime.ops", config.runtime.ops, "be reference for a timm model")
    check(not config.runtime.compile, "runtime.compile", True, "be false for a timm model")
    options = {"img_size": config.image_size, "global_pool": "avg", "fc_norm": False}
    accepted = "name a plain ViT of timm's (vit_*)"
    check(config.timm.startswith("vit"), "timm", config.timm, accepted)
    with seeded(config.seed):
        vit: Any = timm.create_model(config.timm, num_classes=0, drop_path_rate=config.tune.drop_path, **options)
    check(isinstance(vit, VisionTransformer), "timm", config.timm, accepted)
    if config.weights:
        _load(vit, config)
    vit.set_grad_checkpointing(config.runtime.activation_checkpointing)
    return vit


def _load(vit: VisionTransformer, config: FinetuneConfig) -> None:
    path = Path(config.weights)
    if not path.is_file():
        raise FileNotFoundError(f"weights = {str(path)!r} does not exist; give a .safetensors or .pth file")
    try:
        # tensors only, never pickled code; the filter resizes positions and knows other people's names
        state = checkpoint_filter_fn(load_state_dict(str(path), weights_only=True), vit)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise ValueError(f"weights: {path} cannot be read as a ViT's: {str(error).splitlines()[0]}") from error
    kept = {name: value for name, value in state.items() if not name.startswith(("head.", "head_dist."))}
    try:
        vit.load_state_dict(kept)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"weights: {path} does not fit {config.timm}: {reason}") from error


def vit_config(config: FinetuneConfig, vit: Any) -> RunConfig:
    """Return settings in the form of a run's, for engine and loader."""
    patch_size, num_heads = vit.patch_embed.patch_size[0], vit.blocks[0].attn.num_heads
    encoder = EncoderConfig(dim=vit.embed_dim, depth=len(vit.blocks), num_heads=num_heads, patch_size=patch_size)
    accepted = f"be a multiple of the patches' side of {patch_size}"
    check(config.image_size % patch_size == 0, "image_size", config.image_size, accepted)
    return RunConfig(
        views=ViewConfig(size=config.image_size, blur_sigma=(0.1, 1.0)),
        model=ModelConfig(encoder=encoder, predictor=PredictorConfig(depth=0)),
    )


def build_timm_arm(vit: VisionTransformer, context: FinetuneContext, num_classes: int) -> Arm:
    """Build the encoder arm of a timm ViT."""
    with seeded(context.task.seed):
        module = TimmNetwork(vit, num_classes).to(context.rank_info.device)
    optimizer = adamw(_groups(module, context.task.tune), context.config.optim)
    return Arm(name="encoder", module=module, encode=None, optimizer=optimizer)


def _groups(module: TimmNetwork, tune: TuneConfig) -> list[dict[str, Any]]:
    peak = tune.encoder_lr / tune.lr
    scales = timm_scales(module.vit, tune.layer_decay)
    # the head is one layer above what timm knows
    rows = [
        (parameter, peak * tune.layer_decay * scales[name][0], scales[name][1])
        for name, parameter in module.vit.named_parameters()
    ]
    rows += [(parameter, peak, parameter.ndim > 1) for parameter in module.head.parameters()]
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for parameter, scale, decays in rows:
        new = {"params": [], "name": "decay" if decays else "no_decay", "lr_scale": scale}
        groups.setdefault((not decays, scale), new)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
