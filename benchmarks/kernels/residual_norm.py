"""Residual addition and LayerNorm as a transformer block calls them, with a bfloat16 update and a float32 stream."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.providers import Function, random_leaf
from benchmarks.harness.rooflines import norm_costs
from benchmarks.harness.session import Case, Session
from iwm_fast.kernels.ops import Ops
from iwm_fast.models.layers import NORM_EPS

ROWS = 256 * 196
WIDTHS = (384, 768, 1024, 1408)


def run(session: Session) -> None:
    """Measure all widths."""
    for width in WIDTHS[:1] if session.quick else WIDTHS:
        measure_norm(session, ROWS, width)


def measure_norm(session: Session, rows: int, width: int) -> None:
    """Measure one width."""
    case = Case("residual norm", {"D": width, "M": rows}, costs=norm_costs(rows, width))
    if not session.has_time(case):
        return
    device = session.device
    inputs = {
        "update": random_leaf(rows, width, device=device, dtype=torch.bfloat16),
        "residual": random_leaf(rows, width, device=device),
        "weight": random_leaf(width, device=device),
        "bias": random_leaf(width, device=device),
    }
    d_sum = torch.randn(rows, width, device=device)
    session.compare_ops(case, partial(make_function, device), inputs, {"sum": d_sum, "normed": d_sum.bfloat16()})


def make_function(device: str, ops: Ops, *, exact: bool = False) -> Function:
    """Return the operation under autocast; with exact=True without it, in the dtype of the inputs.

    The norm is returned in bfloat16, because autocast would cast it before the matrix product that follows.
    """

    def add_and_norm(update: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=not exact):
            total, norm = ops.residual_norm(update, residual, weight, bias, NORM_EPS)
        return total, norm if exact else norm.bfloat16()

    return add_and_norm
