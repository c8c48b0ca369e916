"""What is trained on top of a run, and what that has taken."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwm_fast.pipelines.batch import Batch


@dataclass(frozen=True, kw_only=True)
class Job:
    """One module that is trained, and how its loss comes from a micro-batch."""

    name: str
    """One word; its folder carries it."""
    module: nn.Module
    """What is trained: forward(inputs) -> outputs, tensors or tuples, lists, dicts of them. It is run in the precision
    of the settings and its outputs arrive as float32, so it need not care. Frozen networks are not inside it, and each
    parameter must have a share in each micro-batch's outputs."""
    prepare: Callable[[Batch], Any]
    """Turns a micro-batch into the module's inputs and whatever the loss needs: frozen encoder, labels, mixing. Run
    without gradient, in the same precision."""
    loss: Callable[[Any, Any], Float[Tensor, ""]]
    """Of outputs and inputs: the sum over the micro-batch's images; it is divided by the global batch."""
    optimizer: torch.optim.AdamW
    """With groups named "decay..." and "no_decay...", each with its "lr_scale" if that is not 1: the group's peak
    learning rate over tune.lr. See `iwm_fast.engines.optimizer.scaled_optimizer`."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What else decides the outcome, fit for JSON, such as the step of the run's checkpoint: a job whose settings or
    origin differ from those of its folder is not gone on with."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What training has taken; the weights are in the job's module, on every rank."""

    num_tuned: int
    """Parameters that were trained."""
    images_per_s: float | None
    """Over all ranks, the first step after each start not counted; None if there was no other."""
    time_s: float
    """From the first step to the last, over all starts."""
    steps: int
    """Optimiser steps."""
