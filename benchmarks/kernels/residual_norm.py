"""Residual addition and LayerNorm as a transformer block calls them: a half-precision update, a float32 stream."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.masks import GRID
from benchmarks.harness.providers import Function, random_leaf
from benchmarks.harness.rooflines import norm_costs
from benchmarks.harness.session import Case, Session
from iwm_fast.kernels.ops import Ops
from iwm_fast.models.layers import NORM_EPS

ROWS = 256 * GRID**2
WIDTHS = (384, 768, 1024)


def run(session: Session) -> None:
    """Time all widths."""
    for width in WIDTHS[:1] if session.quick else WIDTHS:
        measure(session, 64 if session.device == "cpu" else ROWS, width)


def check(session: Session) -> None:
    """Check widths of one and of several tiles, with a last program that is not full, in both half precisions."""
    for dtype in ("bfloat16", "float16"):
        for width in (16, 208, 384, 768, 1408):
            measure(session, 333, width, dtype, is_timed=False)


def measure(session: Session, rows: int, width: int, dtype: str = "bfloat16", *, is_timed: bool = True) -> None:
    """Check one width, and time it."""
    case = Case("residual norm", {"D": width, "M": rows}, dtype, norm_costs(rows, width))
    device, half = session.device, getattr(torch, dtype)
    inputs = {
        "update": random_leaf(rows, width, device=device, dtype=half),
        "residual": random_leaf(rows, width, device=device),
        "weight": random_leaf(width, device=device),
        "bias": random_leaf(width, device=device),
    }
    d_sum = torch.randn(rows, width, device=device)
    operation = partial(make_function, device, half)
    session.compare_ops(case, operation, inputs, {"sum": d_sum, "normed": d_sum.to(half)}, is_timed=is_timed)


def make_function(device: str, half: torch.dtype, ops: Ops, *, exact: bool = False) -> Function:
    """Return the operation under autocast; with exact=True without it, in the dtype of the inputs.

    The norm is returned in half precision, because autocast would cast it before the matrix product that follows.
    """

    def add_and_norm(update: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device, half, enabled=not exact):
            total, norm = ops.residual_norm(update, residual, weight, bias, NORM_EPS)
        return total, norm if exact else norm.to(half)

    return add_and_norm
