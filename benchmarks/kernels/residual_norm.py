"""Residual addition and LayerNorm as a block calls them: a bfloat16 update, a float32 stream, autocast."""

import torch
from torch import Tensor

from benchmarks.harness.providers import Function, Provider, compiled, leaf
from benchmarks.harness.rooflines import norm_costs
from benchmarks.harness.session import Case, Session
from iwm_fast.kernels.ops import FUSED, REFERENCE, Ops
from iwm_fast.models.layers import NORM_EPS

ROWS = 256 * 196
WIDTHS = (384, 768, 1024, 1408)


def run(session: Session) -> None:
    """Measure every width."""
    for width in WIDTHS[:1] if session.is_quick else WIDTHS:
        norm(session, ROWS, width)


def norm(session: Session, rows: int, width: int) -> None:
    """Measure one width."""
    case = Case("residual norm", {"D": width, "M": rows}, costs=norm_costs(rows, width))
    if not session.has_time(case):
        return
    device = session.device
    update = leaf(rows, width, device=device, dtype=torch.bfloat16)
    affine = leaf(width, device=device), leaf(width, device=device)
    inputs = update, leaf(rows, width, device=device), *affine
    d_sum = torch.randn(rows, width, device=device)
    fused = Provider("fused", normed(FUSED, device), inputs, (d_sum, d_sum.bfloat16()))
    eager = fused._replace(name="eager", function=normed(REFERENCE, device))
    providers = [fused, eager, eager._replace(name="compiled", function=compiled(eager.function))]
    names = ("sum", "normed", "d_update", "d_residual", "d_weight", "d_bias")
    session.check_and_measure(case, providers, fused.in_double(normed(REFERENCE, device, exact=True)), names)


def normed(ops: Ops, device: str, *, exact: bool = False) -> Function:
    """Return the operation, with the norm in the dtype of the product that follows: autocast would cast it there.

    Exact: without autocast, in the dtype of the inputs.
    """

    def add_and_norm(update: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=not exact):
            total, norm = ops.residual_norm(update, residual, weight, bias, NORM_EPS)
        return total, norm if exact else norm.bfloat16()

    return add_and_norm
