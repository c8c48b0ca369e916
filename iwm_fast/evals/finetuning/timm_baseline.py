"""The variant "encoder" for a ViT from timm: a published model, finetuned and measured in the same way as a run."""

from pathlib import Path
from typing import Any

import timm
from jaxtyping import Float
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from iwm_fast.config.finetuning import FinetuneConfig, TuneConfig
from iwm_fast.config.run import EncoderConfig, ModelConfig, PredictorConfig, RunConfig
from iwm_fast.engines.optimizer import build_adamw
from iwm_fast.evals.finetuning.layer_decay import timm_layer_scales, train_last_blocks_
from iwm_fast.evals.finetuning.networks import seeded_init
from iwm_fast.evals.finetuning.run import FinetuneContext
from iwm_fast.evals.finetuning.variants import Variant, VariantInputs
from iwm_fast.models.heads import LinearHead
from iwm_fast.pipelines.config import IMAGENET, DataConfig, require
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.pipelines.transforms.operations.blur import Blur


class TimmNetwork(nn.Module):
    """A ViT from timm and a linear head on the mean of its patch tokens, like the variant "encoder" of a run."""

    def __init__(self, vit: VisionTransformer, num_classes: int) -> None:
        super().__init__()
        self.vit: VisionTransformer = vit
        self.head: LinearHead = LinearHead(vit.embed_dim, num_classes)

    def forward(self, inputs: VariantInputs) -> Float[Tensor, "B K"]:
        """Return the logit of each class."""
        assert inputs.view is not None
        tokens = self.vit.forward_features(inputs.view)
        return self.head(tokens[:, self.vit.num_prefix_tokens :])


def build_vit(config: FinetuneConfig) -> VisionTransformer:
    """Build the model `config.timm` of timm with the weights of `config.weights`.

    Raises:
        ValueError: if timm has no such ViT, the weights do not fit it, or a setting has no effect on it.
        FileNotFoundError: if the file of weights does not exist.
    """
    require(timm.is_model(config.timm), "timm", config.timm, "name a model in timm, such as vit_base_patch16_224")
    require(config.runtime.ops != "fused", "runtime.ops", config.runtime.ops, "not be fused for a timm model")
    require(not config.runtime.compile, "runtime.compile", True, "be false for a timm model")
    options = {"img_size": config.size or ViewConfig().size, "global_pool": "avg", "fc_norm": False}
    accepted = "name a plain ViT in timm (vit_*)"
    require(config.timm.startswith("vit"), "timm", config.timm, accepted)
    with seeded_init(config.seed):
        vit: Any = timm.create_model(config.timm, num_classes=0, drop_path_rate=config.tune.drop_path, **options)
    require(isinstance(vit, VisionTransformer), "timm", config.timm, accepted)
    if config.weights:
        _load_weights(vit, config)
    vit.set_grad_checkpointing(config.runtime.activation_checkpointing)
    return vit


def _load_weights(vit: VisionTransformer, config: FinetuneConfig) -> None:
    path = Path(config.weights)
    if not path.is_file():
        raise FileNotFoundError(f"weights = {str(path)!r} does not exist; name a .safetensors or .pth file")
    try:
        # Only tensors are unpickled, so the file cannot run code. The filter resizes position embeddings and converts
        # the parameter names of other code bases.
        state = checkpoint_filter_fn(load_state_dict(str(path), weights_only=True), vit)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise ValueError(f"weights: {path} cannot be read as weights of a ViT: {str(error).splitlines()[0]}") from error
    weights = {name: value for name, value in state.items() if not name.startswith(("head.", "head_dist."))}
    try:
        vit.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"weights: {path} does not fit {config.timm}: {reason}") from error


def vit_run_config(config: FinetuneConfig, vit: Any) -> RunConfig:
    """Return a run configuration that describes the model to engine and loader."""
    patch_size, num_heads = vit.patch_embed.patch_size[0], vit.blocks[0].attn.num_heads
    encoder = EncoderConfig(dim=vit.embed_dim, depth=len(vit.blocks), num_heads=num_heads, patch_size=patch_size)
    expected: dict[str, Any] = getattr(vit, "pretrained_cfg", {})
    mean, std = (tuple(expected.get(name, getattr(IMAGENET, name))) for name in ("mean", "std"))
    return RunConfig(
        data=DataConfig(pixel_mean=mean, pixel_std=std),
        views=ViewConfig(blur=Blur(sigma=(0.1, 1.0))),
        model=ModelConfig(encoder=encoder, predictor=PredictorConfig(depth=0)),
    ).at_size(config.size)


def build_timm_variant(vit: VisionTransformer, context: FinetuneContext, num_classes: int) -> Variant:
    """Build the variant "encoder" of a ViT from timm."""
    with seeded_init(context.settings.seed):
        module = TimmNetwork(vit, num_classes).to(context.rank_info.device)
    tune = context.settings.tune
    _train_last_blocks_(vit, tune.blocks)
    optimizer = build_adamw(_parameter_groups(module, tune), context.run_config.optim)
    return Variant(name="encoder", module=module, encode=None, optimizer=optimizer)


def _train_last_blocks_(vit: VisionTransformer, num_blocks: int | None) -> None:
    """Freeze the layers below the last blocks in place, and let frozen blocks skip no updates."""
    train_last_blocks_(nn.ModuleDict({"encoder": vit}), num_blocks, len(vit.blocks))
    for block in vit.blocks:
        if not any(parameter.requires_grad for parameter in block.parameters()):
            block.drop_path1 = block.drop_path2 = nn.Identity()


def _parameter_groups(module: TimmNetwork, tune: TuneConfig) -> list[dict[str, Any]]:
    head_scale = tune.encoder_lr / tune.lr
    layer_scales = timm_layer_scales(module.vit, tune.layer_decay)
    # timm's topmost layer has scale 1, but here the head is one layer above it.
    scaled_parameters = [
        (parameter, head_scale * tune.layer_decay * layer_scales[name][0], layer_scales[name][1])
        for name, parameter in module.vit.named_parameters()
        if parameter.requires_grad
    ]
    scaled_parameters += [(parameter, head_scale, parameter.ndim > 1) for parameter in module.head.parameters()]
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for parameter, scale, decays in scaled_parameters:
        new_group = {"params": [], "name": "decay" if decays else "no_decay", "lr_scale": scale}
        groups.setdefault((not decays, scale), new_group)["params"].append(parameter)
    # Decaying groups come first, as in `scaled_optimizer`.
    return [groups[key] for key in sorted(groups)]
