"""Layer-wise learning rates: the nearer a layer of a pretrained network is to the pixels, the less it is changed.

Source: BEiT (arXiv 2106.08254) for one encoder: the head is the topmost layer, block l of L the (L + 1 - l)-th below.
"""

import re

from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage]
from torch import nn

_BLOCK = re.compile(r"(encoder|predictor)\.blocks\.(\d+)\.")


def layer_of(name: str, encoder_depth: int, predictor_depth: int | None = None) -> int:
    """Return how high a parameter stands: patch embedding 0, encoder blocks from 1, then the predictor, then the head.

    What brings tokens into the predictor (embedding, mask token, action layers) is a layer below its blocks. What
    follows the blocks of either stands with the last of them, as in timm.

    Args:
        name: under "encoder.", "predictor." or "head.".
        encoder_depth: its blocks.
        predictor_depth: its blocks; None where there is no predictor.
    """
    found = _BLOCK.match(name)
    if found:
        return int(found[2]) + (1 if found[1] == "encoder" else encoder_depth + 2)
    if name.startswith("encoder."):
        return encoder_depth if name.startswith("encoder.norm.") else 0
    top = top_layer(encoder_depth, predictor_depth)
    if name.startswith(("predictor.norm.", "predictor.project.")):
        return top - 1
    return encoder_depth + 1 if name.startswith("predictor.") else top


def top_layer(encoder_depth: int, predictor_depth: int | None = None) -> int:
    """Return where the head stands."""
    return encoder_depth + 1 + (0 if predictor_depth is None else predictor_depth + 1)


def timm_scales(model: nn.Module, decay: float) -> dict[str, tuple[float, bool]]:
    """Return by name what timm multiplies a parameter's learning rate with, and whether it decays.

    The last block has 1: a head on top of the model is not known to it.
    """
    free = getattr(model, "no_weight_decay", set)()
    groups = param_groups_layer_decay(model, weight_decay=1.0, no_weight_decay_list=free, layer_decay=decay)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"] > 0)
        for group in groups
        for parameter in group["params"]
    }
