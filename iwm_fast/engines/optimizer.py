"""AdamW and its parameter groups."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from iwm_fast.config.run import OptimConfig


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters, in a group "decay" and a group "no_decay".

    Only matrices decay. Biases, norms, the mask token and the action tokens' biases are offsets: pulling an offset to
    zero changes what a token means instead of making the function smoother. (I-JEPA decays its mask token, but only
    because its code stores it with three axes.) Positions are fixed and are not parameters.
    """
    return build_scaled_optimizer(module, config, lambda _: 1.0)


def build_scaled_optimizer(
    module: nn.Module, config: OptimConfig, lr_scale: Callable[[str], float]
) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters with a learning rate that depends on the parameter's name.

    There is a group "decay" for matrices and a group "no_decay" for all other parameters, for each learning rate.

    Args:
        module: the module whose trainable parameters are optimised.
        config: the hyperparameters.
        lr_scale: returns the factor of the learning rate for a parameter's name.
    """
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            # The action tokens' biases are a matrix, but each of its rows is an offset.
            is_offset, scale = parameter.ndim < 2 or name.endswith("bias"), lr_scale(name)
            new_group = {"params": [], "name": "no_decay" if is_offset else "decay", "lr_scale": scale}
            groups.setdefault((is_offset, scale), new_group)["params"].append(parameter)
    # Decaying groups come first. The sort is stable, so groups of one kind keep the order of the module.
    return build_adamw([groups[key] for key in sorted(groups, key=lambda key: key[0])], config)


def build_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW over parameter groups.

    Args:
        groups: dictionaries of "params", a "name" that begins with decay or no_decay, and an "lr_scale" if it is not 1.
        config: the hyperparameters, of which learning rate and weight decay are those of the first step.
    """
    # The fused implementation makes one pass over weights and moments. The others need two temporary tensors as large
    # as ZeRO's flat vector, and on a CPU allocating them takes longer than the arithmetic.
    optimizer = torch.optim.AdamW(groups, lr=config.lr_start, betas=config.betas, weight_decay=0.0, fused=True)
    set_hyperparameters(optimizer, config.lr_start, config.weight_decay[0])
    return optimizer


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set the learning rate of every group, multiplied by its "lr_scale", and the weight decay of decaying groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        group["weight_decay"] = weight_decay if group["name"].startswith("decay") else 0.0


def check_optimizer(optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Check that an optimiser and its parameters fit every engine.

    Raises:
        ValueError: if the optimiser does not hold exactly the trainable parameters, or if a parameter is not float32.
    """
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in named_parameters:
        if parameter.requires_grad != (id(parameter) in optimized):
            raise ValueError(
                f"parameter {name} must be in the optimizer if and only if it is trainable; use build_optimizer"
            )
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"parameter {name} must be float32, got {parameter.dtype}; use autocast in forward instead"
            )
