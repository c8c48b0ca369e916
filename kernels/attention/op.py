"""Non-causal multi-head attention over sequences of different lengths, packed one after the other.

For every sequence b and head h, with Q, K, V of shape (n_b, d):

    out = softmax(Q K^T / sqrt(d)) V

Shapes: `qkv` is (sum N, 3, H, d), in which sequence b has the rows offsets[b] .. offsets[b + 1]; the result is
(sum N, H, d). Without offsets all sequences have `longest` rows; everything else is the same.

Bytes, where u is the size of one (sum N, H, d) tensor. Forward: 4u, and 4 bytes per row and head for the logarithm of
the softmax's denominator. Backward: 7u for sequences that the kernels of `short` hold (queries, keys, values and d_out
are read; dQ, dK and dV are written straight into one gradient of `qkv`). The reference stores all scores, which take
4 u N / d and more; a fused attention on separate tensors needs 6u more to stack the three gradients. At N = 196 and
d = 64, half-precision arithmetic is 98 FLOP per byte forward. An H200 can do 184 FLOP per byte, so bytes and not
products are the limit for N below 368 forward and 294 backward.

Precision: products are in the dtype of `qkv`; sums and softmax are in float32. A float32 product is computed as three
tf32 products. Float64, which only the interpreter takes, is used throughout. Weights are rounded to the dtype of `qkv`
before they are multiplied by the values. The backward pass recomputes the weights from the saved logarithm, which adds
a relative error of |s| 2^-24 at a score of s: negligible for scores below 1,000.

Gradient, with P the softmax: dV = P^T dO, dS = P * (dO V^T - sum(P * dO V^T)), dQ = dS K / sqrt(d) and
dK = dS^T Q / sqrt(d). Every number is summed by one program in a fixed order, so the bits are the same in every run.

Not offered: dropout, causal or other masks, heads of a size other than 32 and 64, second derivatives.
"""

import itertools

import torch
from torch import Tensor

from iwm_fast.kernels.attention import flash, short
from iwm_fast.kernels.attention.packed import PackedQKV
from iwm_fast.kernels.attention.short import ShortConfig
from iwm_fast.kernels.launch import Launch, architecture, check_contiguous, check_dtype, upcast_for_interpreter

HEAD_DIMS = (32, 64)
"""Head sizes that the fused operation supports."""
# Combinations of dtype and whether there are offsets; each is compiled separately.
_SHIPPED_VARIANTS = ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True), (torch.float32, True))


def ragged_attention_reference(qkv: Tensor, offsets: Tensor | None, longest: int) -> Tensor:
    """Compute attention within each sequence in plain PyTorch.

    Args:
        qkv: (sum N, 3, H, d), queries, keys and values of all rows.
        offsets: (B + 1,) int32, first row of each sequence; None if every sequence has exactly `longest` rows.
        longest: upper bound of the sequence lengths. It is not checked, because that would wait for the device.

    Returns:
        (sum N, H, d). Sequences may be empty.

    Raises:
        ValueError: if `qkv` does not have these axes, or there are no offsets and its rows are not a multiple of
            `longest`.
    """
    _check(qkv, offsets, longest)
    num_rows, _, num_heads, head_dim = qkv.shape
    if offsets is None:
        num_sequences = num_rows // longest
        by_head = qkv.view(num_sequences, longest, 3, num_heads, head_dim).permute(2, 3, 0, 1, 4)
        out = _attend(by_head.reshape(3, num_heads * num_sequences, longest, head_dim), qkv.new_zeros(1, 1, 1))
        return out.view(num_heads, num_rows, head_dim).transpose(0, 1)
    num_sequences = offsets.numel() - 1
    if offsets.device.type == "cpu":
        # Work grows with the square of the padded length, and on a CPU the true one can be read without waiting.
        longest = int(offsets.diff().max())
    padded_row = _padded_rows(offsets, longest, num_rows, 3 * num_heads)
    # Zeros, not uninitialised memory: padded values are multiplied by a weight of zero, and 0 * NaN is NaN.
    padded = qkv.new_zeros(3 * num_heads * num_sequences * longest, head_dim)
    padded = padded.index_copy_(0, padded_row.flatten(), qkv.reshape(-1, head_dim))
    key_bias = _key_bias(offsets, longest, qkv.dtype).repeat(num_heads, 1, 1)
    out = _attend(padded.view(3, num_heads * num_sequences, longest, head_dim), key_bias).view(-1, head_dim)
    return out.index_select(0, padded_row[:, :num_heads].flatten()).view(num_rows, num_heads, head_dim)


def _check(qkv: Tensor, offsets: Tensor | None, longest: int) -> None:
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must have shape (rows, 3, heads, head_dim), got {tuple(qkv.shape)}; reshape it")
    if offsets is None and (longest < 1 or qkv.shape[0] % longest != 0):
        raise ValueError(
            f"dense qkv must hold a multiple of longest = {longest} rows, got {qkv.shape[0]}; pass offsets"
        )


def _attend(qkv: Tensor, key_bias: Tensor) -> Tensor:
    """Compute attention over (3, H * B, L, d), with `key_bias` (broadcast to (H * B, L, L)) added to the scores."""
    query, key, value = qkv.unbind(0)
    # Plain products: on a CPU in bfloat16, forward and backward take a quarter of the time of PyTorch's fused SDPA.
    scores = torch.baddbmm(key_bias, query, key.transpose(1, 2), alpha=query.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), value)


def _padded_rows(offsets: Tensor, longest: int, num_rows: int, num_matrices: int) -> Tensor:
    """Return (sum N, matrices): the row of each head's vector in a padded layout (matrices, B, longest).

    Queries, keys and values have one matrix per head. Matrices are the outermost axis so that the batched products find
    them contiguous: padding and the transposition to heads are one copy instead of two.
    """
    num_sequences = offsets.numel() - 1
    shift = torch.arange(num_sequences, device=offsets.device) * longest - offsets[:-1]
    row = torch.arange(num_rows, device=offsets.device)
    row = row + torch.repeat_interleave(shift, offsets.diff(), output_size=num_rows)
    matrix_start = torch.arange(num_matrices, device=offsets.device) * (num_sequences * longest)
    return row[:, None] + matrix_start


def _key_bias(offsets: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    """Return (B, 1, longest): 0 for keys of the sequence, -inf for padding.

    An empty sequence is given one key, which is zero, because a softmax over no keys is NaN.
    """
    lengths = offsets.diff().clamp(min=1)
    is_padding = torch.arange(longest, device=offsets.device) >= lengths[:, None]
    return torch.zeros_like(is_padding, dtype=dtype).masked_fill_(is_padding, float("-inf"))[:, None]


def ragged_attention(qkv: Tensor, offsets: Tensor | None, longest: int) -> Tensor:
    """Compute attention within each sequence by Triton kernels.

    Args:
        qkv: (sum N, 3, H, d), queries, keys and values of all rows; contiguous, d is 32 or 64.
        offsets: (B + 1,) int32, first row of each sequence; None if every sequence has exactly `longest` rows.
        longest: upper bound of the sequence lengths. It is not checked, because that would wait for the device.

    Returns:
        (sum N, H, d). Sequences may be empty.

    Raises:
        TypeError: if the dtype of `qkv` is not bfloat16, float16 or float32.
        ValueError: if shape, head size or strides of `qkv`, or dtype, axes or device of `offsets`, are not as above.
        RuntimeError: if `qkv` is not on a GPU and kernels are not interpreted.
    """
    return _ragged_attention(qkv, offsets, longest)[0]


def forward_launches(architecture: int, packed: PackedQKV, out: Tensor, lse: Tensor) -> list[Launch]:
    """Return the launches that fill `out` (sum N, H, d) and `lse` (H, sum N), one per range of lengths."""
    configs = _short_configs(short.FORWARD_CONFIGS, architecture, packed)
    launches = short.forward_launches(configs, packed, out, lse)
    limit = short.max_length(configs)
    if packed.longest > limit:
        launches.append(
            flash.forward_launch(flash.choose_config(architecture, packed), packed, limit, out=out, lse=lse)
        )
    return launches


def backward_launches(
    architecture: int, packed: PackedQKV, *, out: Tensor, lse: Tensor, d_out: Tensor, d_qkv: Tensor
) -> list[Launch]:
    """Return the launches that fill `d_qkv` (sum N, 3, H, d), in the order they must run in."""
    configs = _short_configs(short.BACKWARD_CONFIGS, architecture, packed)
    launches = short.backward_launches(configs, packed, d_out, d_qkv, lse)
    limit = short.max_length(configs)
    if packed.longest > limit:
        tensors = {"out": out, "lse": lse, "d_out": d_out, "d_qkv": d_qkv}
        launches += flash.backward_launches(flash.choose_config(architecture, packed), packed, limit, **tensors)
    return launches


def _short_configs(
    table: dict[int, dict[int, tuple[ShortConfig, ...]]], architecture: int, packed: PackedQKV
) -> tuple[ShortConfig, ...]:
    """Return the configurations of `short` for these sequences; none in float32, whose tiles do not fit on a GPU."""
    return table.get(architecture, table[0])[packed.qkv.shape[3]] if packed.fits_half_precision_tiles else ()


def shipped_launches(architecture: int) -> dict[str, Launch]:
    """Return every launch configuration used on an architecture, by name, on tensors of the meta device."""
    launches = {}
    for head_dim, (dtype, is_ragged) in itertools.product(HEAD_DIMS, _SHIPPED_VARIANTS):
        # A ragged batch of long sequences starts the kernels of all lengths; a dense one only those of its length.
        for longest in (1024,) if is_ragged else (128, 208, 224, 256, 1024):
            qkv = torch.empty(longest, 3, 1, head_dim, dtype=dtype, device="meta")
            offsets = torch.empty(2, dtype=torch.int32, device="meta") if is_ragged else None
            packed, out, lse = PackedQKV(qkv, offsets, longest), qkv[:, 0], _new_lse(qkv)
            both_passes = forward_launches(architecture, packed, out, lse)
            both_passes += backward_launches(architecture, packed, out=out, lse=lse, d_out=out, d_qkv=qkv)
            variant = f"d={head_dim} {str(dtype).removeprefix('torch.')} {'ragged' if is_ragged else 'dense'}"
            launches |= {f"{_name(launch)}, {variant}": launch for launch in both_passes}
    return launches


def _name(launch: Launch) -> str:
    # Committed benchmark results are stored under these names, which contain the kernels' names.
    lower_limit, *limits = launch.constants["LIMITS"]
    kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
    return f"attention {kernel} {lower_limit + 1}-{limits[-1] if limits else ''}"


def _check_fused(qkv: Tensor, offsets: Tensor | None, longest: int) -> None:
    _check(qkv, offsets, longest)
    check_dtype("qkv", qkv)
    check_contiguous("qkv", qkv)
    if qkv.shape[3] not in HEAD_DIMS:
        raise ValueError(
            f"fused attention supports heads of {' or '.join(map(str, HEAD_DIMS))}, got {qkv.shape[3]}; "
            "choose num_heads = dim / 32 or dim / 64, or set runtime.ops=reference"
        )
    if offsets is not None and (offsets.dtype, offsets.ndim, offsets.device) != (torch.int32, 1, qkv.device):
        raise ValueError(
            f"offsets must be an int32 vector on {qkv.device}, got {offsets.dtype} with {offsets.ndim} axes on "
            f"{offsets.device}; pass offsets.to(qkv.device, torch.int32)"
        )


@torch.library.custom_op("iwm_fast::ragged_attention", mutates_args=())
def _ragged_attention(qkv: Tensor, offsets: Tensor | None, longest: int) -> tuple[Tensor, Tensor]:
    _check_fused(qkv, offsets, longest)
    device_architecture = architecture(qkv.device)
    kernel_qkv = upcast_for_interpreter(qkv)
    out = kernel_qkv.new_empty(kernel_qkv.shape[0], *kernel_qkv.shape[2:])
    lse = _new_lse(kernel_qkv)
    # If all sequences are empty, there is nothing to compute.
    if longest > 0:
        for launch in forward_launches(device_architecture, PackedQKV(kernel_qkv, offsets, longest), out, lse):
            launch.run()
    return out.to(qkv.dtype), lse


@_ragged_attention.register_fake
def _(qkv: Tensor, offsets: Tensor | None, longest: int) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape[0], *qkv.shape[2:]), _new_lse(qkv)


def _new_lse(qkv: Tensor) -> Tensor:
    """Return an empty (H, sum N) tensor for log2 of the softmax's denominator."""
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty(qkv.shape[2], qkv.shape[0], dtype=dtype)


@torch.library.custom_op("iwm_fast::ragged_attention_backward", mutates_args=())
def _ragged_attention_backward(
    d_out: Tensor, qkv: Tensor, offsets: Tensor | None, longest: int, out: Tensor, lse: Tensor
) -> Tensor:
    # Autograd may pass any layout: the gradient of a sum is expanded, that of a permutation transposed.
    tensors = {"d_out": upcast_for_interpreter(d_out.contiguous()), "out": upcast_for_interpreter(out), "lse": lse}
    kernel_qkv = upcast_for_interpreter(qkv)
    d_qkv = torch.empty_like(kernel_qkv)
    if longest > 0:
        packed = PackedQKV(kernel_qkv, offsets, longest)
        for launch in backward_launches(architecture(qkv.device), packed, **tensors, d_qkv=d_qkv):
            launch.run()
    return d_qkv.to(qkv.dtype)


@_ragged_attention_backward.register_fake
def _(d_out: Tensor, qkv: Tensor, offsets: Tensor | None, longest: int, out: Tensor, lse: Tensor) -> Tensor:
    return torch.empty_like(qkv)


def _setup_context(ctx, inputs, output) -> None:
    qkv, offsets, ctx.longest = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, offsets, out, lse)


def _backward(ctx, d_out: Tensor, d_lse: Tensor | None) -> tuple[Tensor, None, None]:
    qkv, offsets, out, lse = ctx.saved_tensors
    return _ragged_attention_backward(d_out, qkv, offsets, ctx.longest, out, lse), None, None


_ragged_attention.register_autograd(_backward, setup_context=_setup_context)
