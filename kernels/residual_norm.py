"""Residual addition followed by LayerNorm.

    sum = x + residual;  normed = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + bias, over the last axis

Shapes: x, residual (M, D); weight, bias (D,); results (M, D) twice. Bytes per element for a bfloat16 x and a float32
residual under autocast, forward: plain 6 + 4 (add), 4 + 4 (norm), 4 + 2 (cast) = 24, one pass 6 + 6 = 12; backward:
plain 2 + 4 (cast), 8 + 4 (norm), 8 (weight, bias), 8 + 4 (add), 4 + 2 (cast) = 44, one pass 10 + 6 = 16. All float32:
20 against 16, and 32 against 16. Precision: the sum has the wider dtype of the two (a bfloat16 update leaves a float32
stream in float32); statistics in float32, for float64 in float64. The norm has the sum's dtype; fused and under
autocast that of autocast, to which the product that follows rounds it anyway. Gradient: with g = d_normed * weight and
h = (sum - mean) * rstd, x and residual get d_sum + rstd * (g - mean(g) - h * mean(g * h)), weight the sum over rows of
d_normed * h, bias that of d_normed: of each program's rows, then of the programs, always in the same order.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from iwm_fast.kernels.launch import Launch, architecture, check_contiguous, check_dtype, interpretable


def residual_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (x + residual, its LayerNorm).

    Args:
        x: (M, D), what a block adds.
        residual: (M, D), the stream it is added to.
        weight: (D,).
        bias: (D,).
        eps: added to the variance.
    """
    total = x + residual
    return total, F.layer_norm(total, (total.shape[-1],), weight, bias, eps)


@triton.jit
def _tile(piece, rows, num_rows, WIDTH: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr):
    # columns are a whole tile: a vector of weights would go through shared memory to the threads that need it
    columns = piece * PIECE + tl.broadcast_to(tl.arange(0, PIECE)[None, :], (ROWS, PIECE))
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)
    return columns, rows[:, None] * WIDTH + columns, mask


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x_ptr,  # (M, WIDTH)
    residual_ptr,  # (M, WIDTH)
    weight_ptr,  # (WIDTH,)
    bias_ptr,  # (WIDTH,)
    total_ptr,  # (M, WIDTH)
    normed_ptr,  # (M, WIDTH)
    stats_ptr,  # (2, M): mean, 1 / standard deviation
    num_rows,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
):
    PIECES: tl.constexpr = (WIDTH + PIECE - 1) // PIECE
    precise = stats_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    totals = ()
    added = tl.zeros((ROWS, PIECE), precise)
    for i in tl.static_range(PIECES):
        _, place, mask = _tile(i, rows, num_rows, WIDTH, PIECE, ROWS)
        total = tl.load(x_ptr + place, mask, other=0.0).to(precise)
        total += tl.load(residual_ptr + place, mask, other=0.0).to(precise)
        # what is normalised is the sum as it is stored, rounded
        totals = totals + (total.to(total_ptr.dtype.element_ty).to(precise),)
        added += totals[i]
    mean = tl.sum(added, 1) / WIDTH
    squares = tl.zeros((ROWS, PIECE), precise)
    for i in tl.static_range(PIECES):
        _, place, mask = _tile(i, rows, num_rows, WIDTH, PIECE, ROWS)
        # stored here and not above: no load may overtake a store
        tl.store(total_ptr + place, totals[i].to(total_ptr.dtype.element_ty), mask)
        centred = tl.where(mask, totals[i] - mean[:, None], 0.0)
        squares += centred * centred
    rstd = tl.rsqrt(tl.sum(squares, 1) / WIDTH + EPS)
    for i in tl.static_range(PIECES):
        columns, place, mask = _tile(i, rows, num_rows, WIDTH, PIECE, ROWS)
        weight = tl.load(weight_ptr + columns, mask, other=0.0).to(precise)
        bias = tl.load(bias_ptr + columns, mask, other=0.0).to(precise)
        normed = (totals[i] - mean[:, None]) * rstd[:, None] * weight + bias
        tl.store(normed_ptr + place, normed.to(normed_ptr.dtype.element_ty), mask)
    tl.store(stats_ptr + rows, mean, rows < num_rows)
    tl.store(stats_ptr + num_rows + rows, rstd, rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    d_total_ptr,  # (M, WIDTH), or None
    d_normed_ptr,  # (M, WIDTH)
    total_ptr,  # (M, WIDTH)
    stats_ptr,  # (2, M): mean, 1 / standard deviation
    weight_ptr,  # (WIDTH,)
    partial_ptr,  # (2, programs, WIDTH): d_weight, d_bias
    d_x_ptr,  # (M, WIDTH)
    d_residual_ptr,  # (M, WIDTH), or None where it would equal d_x
    num_rows,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
):
    PIECES: tl.constexpr = (WIDTH + PIECE - 1) // PIECE
    precise = stats_ptr.dtype.element_ty
    program = tl.program_id(0)
    d_weights, d_biases = (), ()
    for _i in tl.static_range(PIECES):
        d_weights = d_weights + (tl.zeros((ROWS, PIECE), precise),)
        d_biases = d_biases + (tl.zeros((ROWS, PIECE), precise),)
    for group in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tl.cast(group, tl.int64) * ROWS + tl.arange(0, ROWS)
        mean = tl.load(stats_ptr + rows, rows < num_rows, other=0.0)[:, None]
        rstd = tl.load(stats_ptr + num_rows + rows, rows < num_rows, other=0.0)[:, None]
        d_totals, scaled, standardized, more_weights, more_biases = (), (), (), (), ()
        added = tl.zeros((ROWS, PIECE), precise)
        added_products = tl.zeros((ROWS, PIECE), precise)
        for i in tl.static_range(PIECES):
            columns, place, mask = _tile(i, rows, num_rows, WIDTH, PIECE, ROWS)
            if d_total_ptr is not None:
                # here and not where it is needed: no load may overtake a store
                d_totals = d_totals + (tl.load(d_total_ptr + place, mask, other=0.0),)
            d_normed = tl.load(d_normed_ptr + place, mask, other=0.0).to(precise)
            total = tl.load(total_ptr + place, mask, other=0.0).to(precise)
            weight = tl.load(weight_ptr + columns, mask, other=0.0).to(precise)
            standardized = standardized + ((total - mean) * rstd,)
            scaled = scaled + (d_normed * weight,)
            more_weights = more_weights + (d_weights[i] + d_normed * standardized[i],)
            more_biases = more_biases + (d_biases[i] + d_normed,)
            added += scaled[i]
            added_products += scaled[i] * standardized[i]
        d_weights, d_biases = more_weights, more_biases
        mean_scaled = (tl.sum(added, 1) / WIDTH)[:, None]
        mean_product = (tl.sum(added_products, 1) / WIDTH)[:, None]
        for i in tl.static_range(PIECES):
            _, place, mask = _tile(i, rows, num_rows, WIDTH, PIECE, ROWS)
            d_input = (scaled[i] - mean_scaled - standardized[i] * mean_product) * rstd
            if d_total_ptr is not None:
                d_input += d_totals[i].to(precise)
            tl.store(d_x_ptr + place, d_input.to(d_x_ptr.dtype.element_ty), mask)
            if d_residual_ptr is not None:
                tl.store(d_residual_ptr + place, d_input.to(d_residual_ptr.dtype.element_ty), mask)
    for i in tl.static_range(PIECES):
        columns = i * PIECE + tl.arange(0, PIECE)
        place = partial_ptr + program.to(tl.int64) * WIDTH + columns
        tl.store(place, tl.sum(d_weights[i], 0), columns < WIDTH)
        tl.store(place + tl.num_programs(0) * WIDTH, tl.sum(d_biases[i], 0), columns < WIDTH)


# Up to which width: columns in pieces, rows at once. A piece of these rows is 16 bytes of float32 for each thread of
# eight warps, and all pieces of a row lie in the same threads. Up to 512 columns one warp holds a row and adds it up
# without barriers; wider rows would need over 128 registers a thread so, and are shared by four warps.
_TILINGS = {512: {"PIECE": 128, "ROWS": 8}, 1536: {"PIECE": 512, "ROWS": 2}}
# Programs of the backward pass, at most: with up to 128 registers an H100 runs two on each of its 132 multiprocessors.
# The same number everywhere, so that sums are the same everywhere.
_MOST_PROGRAMS = 264


def _tiling(width: int) -> dict[str, int]:
    return {"WIDTH": width} | next(tiling for widest, tiling in _TILINGS.items() if width <= widest)


def _outputs(x: Tensor, residual: Tensor, normed_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty sum, normed and statistics."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    stats = x.new_empty(2, x.shape[0], dtype=torch.promote_types(dtype, torch.float32))
    return torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=normed_dtype or dtype), stats


def _forward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], eps: float) -> Launch:
    """Make the launch from x, residual, weight and bias to `_outputs`."""
    rows, width = inputs[0].shape
    tiling = _tiling(width)
    arguments: dict[str, Any] = dict(zip(_forward_kernel.arg_names, (*inputs, *outputs, rows), strict=False))
    return Launch(_forward_kernel, (triton.cdiv(rows, tiling["ROWS"]),), arguments, tiling | {"EPS": eps}, num_warps=8)


def _gradients(total: Tensor, x_dtype: torch.dtype, residual_dtype: torch.dtype) -> list[Tensor]:
    """Return an empty gradient of x and, if it has another dtype, of residual."""
    return [torch.empty_like(total, dtype=dtype) for dtype in dict.fromkeys((x_dtype, residual_dtype))]


def _backward(given: Sequence[Tensor | None], stats: Tensor, gradients: Sequence[Tensor]) -> tuple[Launch, Tensor]:
    """Make the launch from d_sum (or None), d_normed, sum, statistics and weight to `_gradients` and partial sums."""
    rows, width = gradients[0].shape
    tiling = _tiling(width)
    programs = min(triton.cdiv(rows, tiling["ROWS"]), _MOST_PROGRAMS)
    partial = stats.new_empty(2, programs, width)
    d_x, d_residual = (*gradients, None)[:2]
    values = (*given, partial, d_x, d_residual, rows)
    arguments: dict[str, Any] = dict(zip(_backward_kernel.arg_names, values, strict=False))
    return Launch(_backward_kernel, (programs,), arguments, tiling, num_warps=8), partial


def shipped_launches(architecture: int) -> dict[str, Launch]:
    """Name launches at the usual widths, for tensors on the meta device; they are the same for every architecture."""
    launches = {}
    for width in (128, 192, 256, 320, 384, 512, 768, 1024, 1280, 1408):
        for x_dtype in (torch.bfloat16, torch.float32):
            x, residual = (torch.empty(64, width, dtype=dtype, device="meta") for dtype in (x_dtype, torch.float32))
            total, normed, stats = outputs = _outputs(x, residual, x_dtype)
            launches[f"{width} {x_dtype} forward"] = _forward((x, residual, residual[0], residual[0]), outputs, 1e-6)
            given, gradients = (total, normed, total, stats, residual[0]), _gradients(total, x_dtype, torch.float32)
            launches[f"{width} {x_dtype} backward"], _ = _backward(given, stats, gradients)
    return launches


def _check(inputs: Sequence[Tensor]) -> None:
    x = inputs[0]
    architecture(x.device)
    width, widest = x.shape[-1], max(_TILINGS)
    if x.ndim != 2 or width % 16 != 0 or not 16 <= width <= widest:
        raise ValueError(f"x must have shape (M, D) with D a multiple of 16 up to {widest}, got {tuple(x.shape)}")
    shapes = {"x": x.shape, "residual": x.shape, "weight": (width,), "bias": (width,)}
    for (name, shape), tensor in zip(shapes.items(), inputs, strict=True):
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)} to fit x, got {tuple(tensor.shape)}")
        check_dtype(name, tensor)
        check_contiguous(name, tensor)


@torch.library.custom_op("iwm_fast::residual_norm", mutates_args=())
def _fused(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float, normed_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (x, residual, weight, bias)
    _check(inputs)
    outputs = _outputs(x, residual, normed_dtype)
    written = [*map(interpretable, outputs)]
    _forward([*map(interpretable, inputs)], written, eps).run()
    total, normed, stats = map(Tensor.type_as, written, outputs)
    return total, normed, stats


@_fused.register_fake
def _(x, residual, weight, bias, *, eps, normed_dtype):
    return _outputs(x, residual, normed_dtype)


@torch.library.custom_op("iwm_fast::residual_norm_backward", mutates_args=())
def _fused_backward(
    d_total: Tensor | None, d_normed: Tensor, saved: Sequence[Tensor], x_dtype: torch.dtype, residual_dtype: torch.dtype
) -> list[Tensor]:
    """Return the gradients of weight and bias, not yet rounded, of x and, if it has another dtype, of residual."""
    gradients = _gradients(saved[0], x_dtype, residual_dtype)
    written = [*map(interpretable, gradients)]
    # from a sum they come expanded, from a transposition strided
    given = [None if tensor is None else interpretable(tensor.contiguous()) for tensor in (d_total, d_normed, *saved)]
    launch, partial = _backward(given, saved[1], written)
    launch.run()
    return [partial[0].sum(0), partial[1].sum(0), *map(Tensor.type_as, written, gradients)]


@_fused_backward.register_fake
def _(d_total, d_normed, saved, x_dtype, residual_dtype):
    affine = (saved[1].new_empty(saved[0].shape[1]) for _ in range(2))
    return [*affine, *_gradients(saved[0], x_dtype, residual_dtype)]


def _save(ctx, inputs, keyword_only_inputs, output):
    ctx.dtypes = [tensor.dtype for tensor in inputs]
    ctx.save_for_backward(output[0], output[2], inputs[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_total, d_normed, _):
    x, residual, weight, bias = ctx.dtypes
    if d_normed is None:
        return *(None if d_total is None else d_total.to(dtype) for dtype in (x, residual)), None, None
    d_weight, d_bias, *d_inputs = _fused_backward(d_total, d_normed, ctx.saved_tensors, x, residual)
    return d_inputs[0], d_inputs[-1], d_weight.to(weight), d_bias.to(bias)


_fused.register_autograd(_differentiate, setup_context=_save)


def residual_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return what `residual_norm_reference` does, in one pass; under autocast, the norm in the dtype of autocast.

    Raises:
        ValueError: if shapes do not fit, D is no multiple of 16 or over 1536, or a tensor is not contiguous.
        TypeError: for dtypes other than bfloat16, float16 and float32.
        RuntimeError: on a CPU, unless kernels are interpreted.
    """
    kind = x.device.type
    normed_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    total, normed, _ = _fused(x, residual, weight, bias, eps=eps, normed_dtype=normed_dtype)
    return total, normed
