"""AdamW and its two parameter groups."""

import torch
from torch import nn

from iwm_fast.config import OptimConfig


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters, in a group "decay" and a group "no_decay".

    Only matrices decay. Biases, norms, the mask token and the action tokens' biases do not: they are offsets, not
    maps, and pulling an offset to zero moves what a token means instead of making the function smoother. (I-JEPA
    decays its mask token, because there it happens to be stored with three axes.) Positions are fixed and no
    parameters.
    """
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_offset = parameter.ndim < 2 or name.endswith("bias")
            groups["no_decay" if is_offset else "decay"].append(parameter)
    settings = [{"params": parameters, "name": name} for name, parameters in groups.items() if parameters]
    # one pass over weights and moments; step by step, a flat vector of ZeRO's needs fresh memory of its size twice,
    # which on a CPU takes longer than the arithmetic
    optimizer = torch.optim.AdamW(settings, lr=config.lr_start, betas=config.betas, weight_decay=0.0, fused=True)
    set_hyperparameters(optimizer, config.lr_start, config.weight_decay[0])
    return optimizer


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set the learning rate of all groups and the weight decay of the group "decay", in place."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["name"] == "decay" else 0.0
