"""Layers of pretrained networks: those closer to the pixels learn more slowly, or not at all.

Source: BEiT (arXiv 2106.08254) for a single encoder. The head is the topmost layer, and block l of L is (L + 1 - l)
layers below it.
"""

import re

from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage]
from torch import nn

_BLOCK = re.compile(r"(encoder|predictor)\.blocks\.(\d+)\.")


def layer_index(name: str, encoder_depth: int, predictor_depth: int | None = None) -> int:
    """Return the layer of a parameter: 0 for the patch embedding, 1 for the first encoder block, and so on to the head.

    The predictor's blocks follow the encoder's. The predictor's input modules (embedding, mask token, action layers)
    form a layer of their own below its blocks. Modules after the blocks belong to the last block's layer, as in timm.

    Args:
        name: name of the parameter, which begins with "encoder.", "predictor." or "head.".
        encoder_depth: number of encoder blocks.
        predictor_depth: number of predictor blocks; None if the network has no predictor.
    """
    block = _BLOCK.match(name)
    if block:
        return int(block[2]) + (1 if block[1] == "encoder" else encoder_depth + 2)
    if name.startswith("encoder."):
        return encoder_depth if name.startswith("encoder.norm.") else 0
    head_layer = head_layer_index(encoder_depth, predictor_depth)
    if name.startswith(("predictor.norm.", "predictor.project.")):
        return head_layer - 1
    return encoder_depth + 1 if name.startswith("predictor.") else head_layer


def head_layer_index(encoder_depth: int, predictor_depth: int | None = None) -> int:
    """Return the layer of the head, which is the topmost one."""
    return encoder_depth + 1 + (0 if predictor_depth is None else predictor_depth + 1)


def train_last_blocks_(module: nn.Module, num_blocks: int | None, *depths: int) -> None:
    """Freeze in place all layers of a module below its last `num_blocks` blocks; None: none of them.

    Args:
        module: network whose parameters have names as in `layer_index`.
        num_blocks: number of blocks that are trained. The predictor's count before the encoder's.
        depths: number of encoder blocks and, if the module has a predictor, of predictor blocks.
    """
    if num_blocks is None:
        return
    first_layer = head_layer_index(*depths) - num_blocks
    # The predictor's input modules are a layer of their own, but no block.
    first_layer -= len(depths) > 1 and num_blocks > depths[1]
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(layer_index(name, *depths) >= first_layer)


def timm_layer_scales(model: nn.Module, decay: float) -> dict[str, tuple[float, bool]]:
    """Return, by parameter name, timm's factor of the learning rate and whether weight decay applies.

    The factor of the last block is 1, because timm does not know of the head that is put on top of the model.
    """
    without_decay = getattr(model, "no_weight_decay", set)()
    # The value 1.0 only marks the groups to which weight decay applies.
    groups = param_groups_layer_decay(model, weight_decay=1.0, no_weight_decay_list=without_decay, layer_decay=decay)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"] > 0)
        for group in groups
        for parameter in group["params"]
    }
