"""AdamW and its parameter groups."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from iwm_fast.config.run import OptimConfig


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters, in a group "decay" and a group "no_decay".

    Only matrices decay. Biases, norms, the mask token and the action tokens' biases do not: they are offsets, not
    maps, and pulling an offset to zero moves what a token means instead of making the function smoother. (I-JEPA
    decays its mask token, because there it happens to be stored with three axes.) Positions are fixed and no
    parameters.
    """
    return scaled_optimizer(module, config, lambda _: 1.0)


def scaled_optimizer(module: nn.Module, config: OptimConfig, lr_scale: Callable[[str], float]) -> torch.optim.AdamW:
    """Do the same where parameters differ in what the learning rate is multiplied with.

    Args:
        module: whose trainable parameters are held.
        config: hyperparameters.
        lr_scale: factor for a parameter's name; there is a group "decay" and a group "no_decay" for each.
    """
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_offset, scale = parameter.ndim < 2 or name.endswith("bias"), lr_scale(name)
            new = {"params": [], "name": "no_decay" if is_offset else "decay", "lr_scale": scale}
            groups.setdefault((is_offset, scale), new)["params"].append(parameter)
    # those that decay first; among them as they come in the module
    return adamw([groups[key] for key in sorted(groups, key=lambda key: key[0])], config)


def adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW over groups of parameters, whose "name" begins with decay or no_decay, with "lr_scale" if not 1."""
    # one pass over weights and moments; step by step, a flat vector of ZeRO's needs fresh memory of its size twice,
    # which on a CPU takes longer than the arithmetic
    optimizer = torch.optim.AdamW(groups, lr=config.lr_start, betas=config.betas, weight_decay=0.0, fused=True)
    set_hyperparameters(optimizer, config.lr_start, config.weight_decay[0])
    return optimizer


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set in place the learning rate of all groups, times each one's "lr_scale", and the decay of "decay..." groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        group["weight_decay"] = weight_decay if group["name"].startswith("decay") else 0.0


def check_optimizer(optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Check what the engines rely on.

    Raises:
        ValueError: if the optimiser does not hold exactly the trainable parameters, or one is not float32.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in named_parameters:
        if parameter.requires_grad != (id(parameter) in held):
            raise ValueError(
                f"parameter {name} must be in the optimizer exactly if it is trainable; see build_optimizer"
            )
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"parameter {name} must be float32, got {parameter.dtype}; use autocast in forward instead"
            )
