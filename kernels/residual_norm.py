"""Residual addition followed by LayerNorm.

    sum = x + residual;  normed = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + bias, over the last axis

Shapes: x and residual are (M, D), weight and bias (D,), both results (M, D).

Bytes per element for a bfloat16 x and a float32 residual under autocast. Forward: plain PyTorch moves 6 + 4 (add),
4 + 4 (norm) and 4 + 2 (cast) = 24, one pass 6 + 6 = 12. Backward: plain PyTorch moves 2 + 4 (cast), 8 + 4 (norm), 8
(weight and bias), 8 + 4 (add) and 4 + 2 (cast) = 44, one pass 10 + 6 = 16. In float32 throughout it is 20 against 16
forward and 32 against 16 backward.

Precision: the sum has the wider dtype of its two terms, so that adding a bfloat16 x leaves a float32 residual stream in
float32. Statistics are in float32, or float64 for float64. The norm has the dtype of the sum; the fused operation under
autocast returns it in autocast's dtype, to which the matrix product that follows would round it anyway.

Gradient, with g = d_normed * weight and h = (sum - mean) * rstd: x and residual get
d_sum + rstd * (g - mean(g) - h * mean(g * h)), weight gets the sum over rows of d_normed * h and bias that of d_normed.
These are summed over each program's rows and then over the programs, always in the same order.
"""

# Type checkers do not know that device code is compiled.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from iwm_fast.kernels.launch import Launch, architecture, check_tensor, register_op, upcast_for_interpreter


def residual_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return x + residual (M, D) and its LayerNorm (M, D) with weight and bias (D,), in plain PyTorch."""
    total = x + residual
    return total, F.layer_norm(total, (total.shape[-1],), weight, bias, eps)


@triton.jit
def _locate_block(block, rows, num_rows, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return columns, element offsets and mask of a block of columns, each (BLOCK_M, BLOCK_N)."""
    # `columns` has the shape of the tile instead of one row: a vector of weights would be loaded in another layout
    # and pass through shared memory to the threads that need it.
    columns = block * BLOCK_N + tl.broadcast_to(tl.arange(0, BLOCK_N)[None, :], (BLOCK_M, BLOCK_N))
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)
    return columns, rows[:, None] * WIDTH + columns, mask


@triton.jit(do_not_specialize=["num_rows"])
def _norm_forward(
    x_ptr,  # (M, WIDTH)
    residual_ptr,  # (M, WIDTH)
    weight_ptr,  # (WIDTH,)
    bias_ptr,  # (WIDTH,)
    total_ptr,  # (M, WIDTH)
    normed_ptr,  # (M, WIDTH)
    stats_ptr,  # (2, M): mean, 1 / standard deviation
    num_rows, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    NUM_BLOCKS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    sum_dtype = stats_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    totals = ()
    # Sums are kept per column of a block and reduced over the columns once, at the end.
    column_sums = tl.zeros((BLOCK_M, BLOCK_N), sum_dtype)
    for i in tl.static_range(NUM_BLOCKS):
        _, offset, mask = _locate_block(i, rows, num_rows, WIDTH, BLOCK_N, BLOCK_M)
        total = tl.load(x_ptr + offset, mask, other=0.0).to(sum_dtype)
        total += tl.load(residual_ptr + offset, mask, other=0.0).to(sum_dtype)
        # The norm is that of the sum as it is stored, which is rounded.
        totals = totals + (total.to(total_ptr.dtype.element_ty).to(sum_dtype),)
        column_sums += totals[i]
    mean = tl.sum(column_sums, 1) / WIDTH
    # The variance is summed in a second pass over registers: mean(x^2) - mean^2 would cancel where the mean is large.
    squares = tl.zeros((BLOCK_M, BLOCK_N), sum_dtype)
    for i in tl.static_range(NUM_BLOCKS):
        _, offset, mask = _locate_block(i, rows, num_rows, WIDTH, BLOCK_N, BLOCK_M)
        # Stored here and not in the loop above: the compiler never moves a load ahead of a store, so the loads of the
        # next block would wait.
        tl.store(total_ptr + offset, totals[i].to(total_ptr.dtype.element_ty), mask)
        centred = tl.where(mask, totals[i] - mean[:, None], 0.0)
        squares += centred * centred
    rstd = tl.rsqrt(tl.sum(squares, 1) / WIDTH + EPS)
    for i in tl.static_range(NUM_BLOCKS):
        columns, offset, mask = _locate_block(i, rows, num_rows, WIDTH, BLOCK_N, BLOCK_M)
        weight = tl.load(weight_ptr + columns, mask, other=0.0).to(sum_dtype)
        bias = tl.load(bias_ptr + columns, mask, other=0.0).to(sum_dtype)
        normed = (totals[i] - mean[:, None]) * rstd[:, None] * weight + bias
        tl.store(normed_ptr + offset, normed.to(normed_ptr.dtype.element_ty), mask)
    tl.store(stats_ptr + rows, mean, rows < num_rows)
    tl.store(stats_ptr + num_rows + rows, rstd, rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_backward(
    d_total_ptr,  # (M, WIDTH), or None
    d_normed_ptr,  # (M, WIDTH)
    total_ptr,  # (M, WIDTH)
    stats_ptr,  # (2, M): mean, 1 / standard deviation
    weight_ptr,  # (WIDTH,)
    partial_ptr,  # (2, programs, WIDTH): d_weight, d_bias
    d_x_ptr,  # (M, WIDTH)
    d_residual_ptr,  # (M, WIDTH), or None if it has the dtype of d_x and so the same values
    num_rows, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    NUM_BLOCKS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    sum_dtype = stats_ptr.dtype.element_ty
    program = tl.program_id(0)
    d_weights, d_biases = (), ()
    for _i in tl.static_range(NUM_BLOCKS):
        d_weights = d_weights + (tl.zeros((BLOCK_M, BLOCK_N), sum_dtype),)
        d_biases = d_biases + (tl.zeros((BLOCK_M, BLOCK_N), sum_dtype),)
    # Programs stride over the rows, so that there is one partial sum per program and not one per block of rows.
    for row_block in range(program, tl.cdiv(num_rows, BLOCK_M), tl.num_programs(0)):
        rows = tl.cast(row_block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mean = tl.load(stats_ptr + rows, rows < num_rows, other=0.0)[:, None]
        rstd = tl.load(stats_ptr + num_rows + rows, rows < num_rows, other=0.0)[:, None]
        # Triton's tuples are immutable, so the unrolled loops build new ones.
        d_totals, d_standardized, standardized, new_d_weights, new_d_biases = (), (), (), (), ()
        gradient_sums = tl.zeros((BLOCK_M, BLOCK_N), sum_dtype)
        product_sums = tl.zeros((BLOCK_M, BLOCK_N), sum_dtype)
        for i in tl.static_range(NUM_BLOCKS):
            columns, offset, mask = _locate_block(i, rows, num_rows, WIDTH, BLOCK_N, BLOCK_M)
            if d_total_ptr is not None:
                # Loaded here and not in the loop that uses it, where it would wait for the stores of the block before.
                d_totals = d_totals + (tl.load(d_total_ptr + offset, mask, other=0.0),)
            d_normed = tl.load(d_normed_ptr + offset, mask, other=0.0).to(sum_dtype)
            total = tl.load(total_ptr + offset, mask, other=0.0).to(sum_dtype)
            weight = tl.load(weight_ptr + columns, mask, other=0.0).to(sum_dtype)
            standardized = standardized + ((total - mean) * rstd,)
            d_standardized = d_standardized + (d_normed * weight,)
            new_d_weights = new_d_weights + (d_weights[i] + d_normed * standardized[i],)
            new_d_biases = new_d_biases + (d_biases[i] + d_normed,)
            gradient_sums += d_standardized[i]
            product_sums += d_standardized[i] * standardized[i]
        d_weights, d_biases = new_d_weights, new_d_biases
        mean_gradient = (tl.sum(gradient_sums, 1) / WIDTH)[:, None]
        mean_product = (tl.sum(product_sums, 1) / WIDTH)[:, None]
        for i in tl.static_range(NUM_BLOCKS):
            _, offset, mask = _locate_block(i, rows, num_rows, WIDTH, BLOCK_N, BLOCK_M)
            d_input = (d_standardized[i] - mean_gradient - standardized[i] * mean_product) * rstd
            if d_total_ptr is not None:
                d_input += d_totals[i].to(sum_dtype)
            tl.store(d_x_ptr + offset, d_input.to(d_x_ptr.dtype.element_ty), mask)
            if d_residual_ptr is not None:
                tl.store(d_residual_ptr + offset, d_input.to(d_residual_ptr.dtype.element_ty), mask)
    for i in tl.static_range(NUM_BLOCKS):
        columns = i * BLOCK_N + tl.arange(0, BLOCK_N)
        pointer = partial_ptr + program.to(tl.int64) * WIDTH + columns
        tl.store(pointer, tl.sum(d_weights[i], 0), columns < WIDTH)
        tl.store(pointer + tl.num_programs(0) * WIDTH, tl.sum(d_biases[i], 0), columns < WIDTH)


# Tile sizes by largest width. A block of these rows is 16 bytes of float32 for each thread of eight warps, and all
# blocks of a row lie in the same threads. Up to 512 columns one warp holds a row and reduces it without barriers; wider
# rows would then need over 128 registers a thread, so four warps share each of them.
_TILE_SIZES = {512: {"BLOCK_N": 128, "BLOCK_M": 8}, 1536: {"BLOCK_N": 512, "BLOCK_M": 2}}
# Largest number of programs of the backward pass: with up to 128 registers a thread, an H100 runs two programs on each
# of its 132 multiprocessors. The number is the same on all GPUs so that the order of the sums is the same, too.
_MAX_PROGRAMS = 264


@functools.cache
def _tile_sizes(width: int) -> dict[str, int]:
    return {"WIDTH": width} | next(sizes for max_width, sizes in _TILE_SIZES.items() if width <= max_width)


def _empty_outputs(x: Tensor, residual: Tensor, normed_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return uninitialised tensors for sum, norm and statistics; the norm's dtype is by default that of the sum."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    stats = x.new_empty(2, x.shape[0], dtype=torch.promote_types(dtype, torch.float32))
    return torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=normed_dtype or dtype), stats


def _forward_launch(inputs: Sequence[Tensor], outputs: Sequence[Tensor], eps: float) -> Launch:
    """Return the launch that computes sum, norm and statistics from x, residual, weight and bias."""
    num_rows, width = inputs[0].shape
    sizes = _tile_sizes(width)
    grid = (-(-num_rows // sizes["BLOCK_M"]),)
    return Launch.of(_norm_forward, grid, (*inputs, *outputs, num_rows), sizes | {"EPS": eps}, num_warps=8)


def _empty_gradients(total: Tensor, *dtypes: torch.dtype) -> list[Tensor]:
    """Return an uninitialised gradient of x and, if it has a different dtype, one of residual."""
    return [torch.empty_like(total, dtype=dtype) for dtype in dict.fromkeys(dtypes)]


def _backward_launch(
    inputs: Sequence[Tensor | None], stats: Tensor, gradients: Sequence[Tensor]
) -> tuple[Launch, Tensor]:
    """Return the launch that fills `gradients`, and the (2, programs, D) partial sums of d_weight and d_bias.

    `inputs` are d_sum (or None), d_normed, sum, statistics and weight; partial sums have the dtype of `stats`.
    """
    num_rows, width = gradients[0].shape
    sizes = _tile_sizes(width)
    num_programs = min(-(-num_rows // sizes["BLOCK_M"]), _MAX_PROGRAMS)
    partial = stats.new_empty(2, num_programs, width)
    d_x, d_residual = (*gradients, None)[:2]
    values = (*inputs, partial, d_x, d_residual, num_rows)
    return Launch.of(_norm_backward, (num_programs,), values, sizes, num_warps=8), partial


def shipped_launches(architecture: int) -> dict[str, Launch]:
    """Return launches at the usual widths, by name, on tensors of the meta device; all architectures have the same."""
    launches = {}
    for width in (128, 192, 256, 320, 384, 512, 768, 1024, 1280, 1408):
        for x_dtype in (torch.bfloat16, torch.float32):
            x, residual = (torch.empty(64, width, dtype=dtype, device="meta") for dtype in (x_dtype, torch.float32))
            weight = residual[0]
            total, normed, stats = outputs = _empty_outputs(x, residual, x_dtype)
            launches[f"{width} {x_dtype} forward"] = _forward_launch((x, residual, weight, weight), outputs, 1e-6)
            inputs, gradients = (total, normed, total, stats, weight), _empty_gradients(total, x_dtype, torch.float32)
            launches[f"{width} {x_dtype} backward"], _ = _backward_launch(inputs, stats, gradients)
    return launches


def _check_inputs(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> None:
    # Raises if x is not on a GPU and kernels are not interpreted.
    architecture(x.device)
    width = x.shape[-1]
    reason = why_unsupported(width)
    if x.ndim != 2 or reason:
        raise ValueError(f"fused residual_norm {reason or 'takes a matrix'}: x has shape {tuple(x.shape)}, not (M, D)")
    for name, tensor, shape in (
        ("x", x, x.shape), ("residual", residual, x.shape), ("weight", weight, (width,)), ("bias", bias, (width,)),
    ):  # fmt: skip
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)} to fit x, got {tuple(tensor.shape)}")
        check_tensor(name, tensor)


def why_unsupported(width: int) -> str:
    """Return why there is no kernel for this width, as a sentence without its subject; empty if there is one."""
    max_width = max(_TILE_SIZES)
    is_supported = width % 16 == 0 and 16 <= width <= max_width
    return "" if is_supported else f"supports widths that are multiples of 16 up to {max_width}, got {width}"


def _forward(inputs: Sequence[Tensor], eps: float, normed_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum, norm and statistics of the inputs x, residual, weight and bias."""
    _check_inputs(*inputs)
    outputs = _empty_outputs(*inputs[:2], normed_dtype)
    # In the interpreter kernels write float32 in place of bfloat16; the results are rounded below.
    kernel_outputs = [upcast_for_interpreter(tensor) for tensor in outputs]
    _forward_launch([upcast_for_interpreter(tensor) for tensor in inputs], kernel_outputs, eps).run()
    total, normed, stats = kernel_outputs
    return total.to(outputs[0].dtype), normed.to(outputs[1].dtype), stats


def _backward(d_total: Tensor | None, d_normed: Tensor, saved: Sequence[Tensor], *dtypes: torch.dtype) -> list[Tensor]:
    """Return the gradients (2, D) of weight and bias, of x and, if its dtype is different, of residual.

    `saved` are sum, statistics and weight; `d_total` is None if the sum is not used; `dtypes` are of x and residual.
    """
    total, stats, _ = saved
    gradients = _empty_gradients(total, *dtypes)
    kernel_gradients = [upcast_for_interpreter(gradient) for gradient in gradients]
    # Autograd may pass any layout: the gradient of a sum is expanded, that of a transposition strided.
    tensors = (d_total, d_normed, *saved)
    inputs = [None if each is None else upcast_for_interpreter(each.contiguous()) for each in tensors]
    launch, partial = _backward_launch(inputs, stats, kernel_gradients)
    launch.run()
    return [partial.sum(1), *(value.to(like.dtype) for value, like in zip(kernel_gradients, gradients, strict=True))]


_forward_op = register_op(
    "residual_norm(Tensor[] inputs, float eps, ScalarType? normed_dtype) -> (Tensor, Tensor, Tensor)",
    _forward,
    lambda inputs, eps, normed_dtype: _empty_outputs(*inputs[:2], normed_dtype),
)
_backward_op = register_op(
    "residual_norm_backward(Tensor? d_total, Tensor d_normed, Tensor[] saved, ScalarType x_dtype, "
    "ScalarType residual_dtype) -> Tensor[]",
    _backward,
    lambda d_total, d_normed, saved, *dtypes: [
        saved[1].new_empty(2, saved[0].shape[1]),
        *_empty_gradients(saved[0], *dtypes),
    ],
)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: float, normed_dtype: torch.dtype | None, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        total, normed, stats = _forward_op(inputs, eps, normed_dtype)
        # The sum and the statistics are enough for the gradient; x and residual need not be kept.
        ctx.save_for_backward(total, stats, inputs[2])
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        # The gradient of an unused result arrives as None, which saves the kernel reading a tensor of zeros.
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        d_total, d_normed = d_outputs
        x_dtype, residual_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if d_normed is None:
            d_inputs = [None if d_total is None else d_total.to(dtype) for dtype in (x_dtype, residual_dtype)]
            return None, None, *d_inputs, None, None
        sums, *d_inputs = _backward_op(d_total, d_normed, ctx.saved_tensors, x_dtype, residual_dtype)
        d_weight, d_bias = sums.unbind()
        # If x and residual have the same dtype, there is one gradient for both.
        return None, None, d_inputs[0], d_inputs[-1], d_weight.to(weight_dtype), d_bias.to(bias_dtype)


def residual_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + residual and its LayerNorm, computed in one pass by a Triton kernel.

    Args:
        x: (M, D), output of a block; D is a multiple of 16 up to 1536.
        residual: (M, D), the residual stream that the block's output is added to.
        weight: (D,).
        bias: (D,).
        eps: added to the variance.

    Returns:
        The sum (M, D) and its LayerNorm (M, D); under autocast the norm has autocast's dtype.

    Raises:
        ValueError: if shapes do not fit, D is not a multiple of 16 up to 1536, or a tensor is not contiguous.
        TypeError: for dtypes other than bfloat16, float16 and float32.
        RuntimeError: if x is not on a GPU and kernels are not interpreted.
    """
    device_type = x.device.type
    normed_dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    inputs = x, residual, weight, bias
    if not torch.is_grad_enabled():
        # Without autograd's bookkeeping, which takes a quarter of the host time.
        return _forward_op(inputs, eps, normed_dtype)[:2]
    return _ResidualNorm.apply(eps, normed_dtype, *inputs)
