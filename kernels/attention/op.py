"""Non-causal multi-head attention over sequences of different lengths, packed one after the other.

For every sequence b and head h, with Q, K, V of shape (n_b, d):

    out = softmax(Q K^T / sqrt(d)) V

Shapes: `qkv` (sum N, 3, H, d), rows of sequence b are offsets[b] .. offsets[b + 1]; result (sum N, H, d). Without
offsets all sequences have `longest` rows, and nothing else changes.

Bytes, with u those of one (sum N, H, d) tensor: forward 4u and 4 per row and head for the softmax's logarithm;
backward 7u for sequences that `attention_whole` holds (queries, keys, values, d_out in; dQ, dK, dV out, straight into
one gradient of `qkv`). The reference forms all scores, 4 u N / d and more of them; a fused attention on separate
tensors adds 6u for stacking three gradients. At N = 196 and d = 64 half-precision arithmetic is 98 FLOP per byte
forward: below what an H200 has (184), so that bytes, not products, are the floor for N below 368 forward and 294
backward.

Precision: products in the dtype of `qkv`, sums and softmax in float32 (float32 as three tf32 products; float64, which
only the interpreter takes, throughout); weights are rounded to the dtype of `qkv` before they meet the values. The
backward pass forms them again from the saved logarithm, which at a score of s costs |s| 2^-24 in relative terms:
nothing below scores of 1,000. Gradient: P = softmax, dV = P^T dO, dS = P * (dO V^T - sum(P * dO V^T)), dQ = dS K /
sqrt(d), dK = dS^T Q / sqrt(d); every number is summed by one program in a fixed order, the same bits in every run.

Not offered: dropout, causal or other masks, heads of another size than 32 and 64, second derivatives.
"""

import itertools

import torch
from torch import Tensor

from iwm_fast.kernels.attention import flash, short
from iwm_fast.kernels.attention.packed import Packed
from iwm_fast.kernels.attention.short import Group
from iwm_fast.kernels.launch import Launch, architecture, check_contiguous, check_dtype, interpretable

HEAD_DIMS = (32, 64)
# dtype and whether offsets are given: each has binaries of its own
_KINDS = ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True), (torch.float32, True))


def ragged_attention_reference(qkv: Tensor, offsets: Tensor | None, longest: int) -> Tensor:
    """Attend within each sequence and nowhere else.

    Args:
        qkv: (sum N, 3, H, d), queries, keys and values of all rows.
        offsets: (B + 1,) int32, where each sequence begins; None if every sequence has exactly `longest` rows.
        longest: an upper bound of the sequences' lengths (trusted: checking it would wait for the device).

    Returns:
        (sum N, H, d). Sequences may be empty.

    Raises:
        ValueError: if `qkv` has other axes, or does not divide into dense sequences.
    """
    _check(qkv, offsets, longest)
    num_rows, _, num_heads, head_dim = qkv.shape
    if offsets is None:
        images = num_rows // longest
        by_head = qkv.view(images, longest, 3, num_heads, head_dim).permute(2, 3, 0, 1, 4)
        out = _attend(by_head.reshape(3, num_heads * images, longest, head_dim), qkv.new_zeros(1, 1, 1))
        return out.view(num_heads, num_rows, head_dim).transpose(0, 1)
    images = offsets.numel() - 1
    if offsets.device.type == "cpu":
        # work grows with the square of the padded length, and here the true one can be read without waiting
        longest = int(offsets.diff().max())
    place = _padded_places(offsets, longest, num_rows, 3 * num_heads)
    # zeros, not fresh memory: a padded value is multiplied by a weight of zero, and 0 * NaN is NaN
    padded = qkv.new_zeros(3 * num_heads * images * longest, head_dim)
    padded = padded.index_copy_(0, place.flatten(), qkv.reshape(-1, head_dim))
    key_bias = _key_bias(offsets, longest, qkv.dtype).repeat(num_heads, 1, 1)
    out = _attend(padded.view(3, num_heads * images, longest, head_dim), key_bias).view(-1, head_dim)
    return out.index_select(0, place[:, :num_heads].flatten()).view(num_rows, num_heads, head_dim)


def _check(qkv: Tensor, offsets: Tensor | None, longest: int) -> None:
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must have shape (rows, 3, heads, head_dim), got {tuple(qkv.shape)}; view it so")
    if offsets is None and (longest < 1 or qkv.shape[0] % longest != 0):
        raise ValueError(
            f"dense qkv must hold a multiple of longest = {longest} rows, got {qkv.shape[0]}; pass offsets"
        )


def _attend(qkv: Tensor, key_bias: Tensor) -> Tensor:
    """Attend over (3, H * B, L, d), adding `key_bias` (broadcast to (H * B, L, L)) to the scaled scores."""
    query, key, value = qkv.unbind(0)
    # three plain products: on a CPU in bfloat16, forward and backward take a quarter of the fused SDPA's time
    scores = torch.baddbmm(key_bias, query, key.transpose(1, 2), alpha=query.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), value)


def _padded_places(offsets: Tensor, longest: int, num_rows: int, num_parts: int) -> Tensor:
    """Return (sum N, parts): where each row's part goes in a padded (parts, B, longest) layout.

    A part is one head of the queries, keys or values. Parts stand outermost so that the batched products that follow
    find contiguous matrices: padding and the transposition to heads are one copy instead of two.
    """
    images = offsets.numel() - 1
    shift = torch.arange(images, device=offsets.device) * longest - offsets[:-1]
    row = torch.arange(num_rows, device=offsets.device)
    row = row + torch.repeat_interleave(shift, offsets.diff(), output_size=num_rows)
    part = torch.arange(num_parts, device=offsets.device) * (images * longest)
    return row[:, None] + part


def _key_bias(offsets: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    """Return (B, 1, longest): 0 for keys of the sequence, -inf for padding.

    An empty sequence keeps one (zero) key: a softmax over nothing is NaN.
    """
    lengths = offsets.diff().clamp(min=1)
    is_padding = torch.arange(longest, device=offsets.device) >= lengths[:, None]
    return torch.zeros_like(is_padding, dtype=dtype).masked_fill_(is_padding, float("-inf"))[:, None]


def ragged_attention(qkv: Tensor, offsets: Tensor | None, longest: int) -> Tensor:
    """Attend within each sequence and nowhere else, fused.

    Args:
        qkv: (sum N, 3, H, d), contiguous; d is 32 or 64.
        offsets: (B + 1,) int32, where each sequence begins; None if every sequence has exactly `longest` rows.
        longest: an upper bound of the sequences' lengths (trusted: checking it would wait for the device).

    Returns:
        (sum N, H, d). Sequences may be empty.

    Raises:
        TypeError, ValueError: for a dtype, head size or layout that no kernel is written for.
        RuntimeError: if `qkv` is not on a GPU, and kernels are not interpreted.
    """
    return _ragged_attention(qkv, offsets, longest)[0]


def forward_launches(architecture: int, packed: Packed, out: Tensor, lse: Tensor) -> list[Launch]:
    """Return what fills `out` and `lse` (H, sum N) on an architecture: a launch per group of lengths."""
    groups = _groups(short.FORWARD, architecture, packed)
    launches = short.forward_launches(groups, packed, out, lse)
    limit = short.longest_whole(groups)
    if packed.longest > limit:
        launches.append(flash.forward_launch(flash.cut_for(architecture, packed), packed, limit, out=out, lse=lse))
    return launches


def backward_launches(
    architecture: int, packed: Packed, *, out: Tensor, lse: Tensor, d_out: Tensor, d_qkv: Tensor
) -> list[Launch]:
    """Return what fills `d_qkv` on an architecture."""
    groups = _groups(short.BACKWARD, architecture, packed)
    launches = short.backward_launches(groups, packed, d_out, d_qkv, lse)
    limit = short.longest_whole(groups)
    if packed.longest > limit:
        tensors = {"out": out, "lse": lse, "d_out": d_out, "d_qkv": d_qkv}
        launches += flash.backward_launches(flash.cut_for(architecture, packed), packed, limit, **tensors)
    return launches


def _groups(table: dict[int, dict[int, tuple[Group, ...]]], architecture: int, packed: Packed) -> tuple[Group, ...]:
    """Return which lengths are worked on whole; none in float32, which only the interpreter has room for."""
    return table.get(architecture, table[0])[packed.qkv.shape[3]] if packed.is_narrow else ()


def shipped_launches(architecture: int) -> dict[str, Launch]:
    """Return every setting there is for an architecture, by name; tensors are on the meta device."""
    launches = {}
    for head_dim, (dtype, is_ragged) in itertools.product(HEAD_DIMS, _KINDS):
        # packed, the longest takes the kernels of all lengths with it; dense, each length has its own
        for longest in (1024,) if is_ragged else (128, 208, 224, 256, 1024):
            qkv = torch.empty(longest, 3, 1, head_dim, dtype=dtype, device="meta")
            offsets = torch.empty(2, dtype=torch.int32, device="meta") if is_ragged else None
            packed, out, lse = Packed(qkv, offsets, longest), qkv[:, 0], _new_lse(qkv)
            found = forward_launches(architecture, packed, out, lse)
            found += backward_launches(architecture, packed, out=out, lse=lse, d_out=out, d_qkv=qkv)
            kind = f"d={head_dim} {str(dtype).removeprefix('torch.')} {'ragged' if is_ragged else 'dense'}"
            launches |= {f"{_name(launch)}, {kind}": launch for launch in found}
    return launches


def _name(launch: Launch) -> str:
    below, *limits = launch.constants["LIMITS"]
    kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
    return f"attention {kernel} {below + 1}-{limits[-1] if limits else ''}"


def _check_fused(qkv: Tensor, offsets: Tensor | None, longest: int) -> None:
    _check(qkv, offsets, longest)
    check_dtype("qkv", qkv)
    check_contiguous("qkv", qkv)
    if qkv.shape[3] not in HEAD_DIMS:
        raise ValueError(
            f"fused attention has heads of {' or '.join(map(str, HEAD_DIMS))}, got {qkv.shape[3]}; "
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
    worked = interpretable(qkv)
    out = worked.new_empty(worked.shape[0], *worked.shape[2:])
    lse = _new_lse(worked)
    if longest > 0:
        for launch in forward_launches(device_architecture, Packed(worked, offsets, longest), out, lse):
            launch.run()
    return out.to(qkv.dtype), lse


@_ragged_attention.register_fake
def _(qkv: Tensor, offsets: Tensor | None, longest: int) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape[0], *qkv.shape[2:]), _new_lse(qkv)


def _new_lse(qkv: Tensor) -> Tensor:
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty(qkv.shape[2], qkv.shape[0], dtype=dtype)


@torch.library.custom_op("iwm_fast::ragged_attention_backward", mutates_args=())
def _ragged_attention_backward(
    d_out: Tensor, qkv: Tensor, offsets: Tensor | None, longest: int, out: Tensor, lse: Tensor
) -> Tensor:
    # gradients come as autograd made them: a sum's is expanded, a permutation's transposed
    tensors = {"d_out": interpretable(d_out.contiguous()), "out": interpretable(out), "lse": lse}
    worked = interpretable(qkv)
    d_qkv = torch.empty_like(worked)
    if longest > 0:
        packed = Packed(worked, offsets, longest)
        for launch in backward_launches(architecture(qkv.device), packed, **tensors, d_qkv=d_qkv):
            launch.run()
    return d_qkv.to(qkv.dtype)


@_ragged_attention_backward.register_fake
def _(d_out: Tensor, qkv: Tensor, offsets: Tensor | None, longest: int, out: Tensor, lse: Tensor) -> Tensor:
    return torch.empty_like(qkv)


def _save(ctx, inputs, output) -> None:
    qkv, offsets, ctx.longest = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, offsets, out, lse)


def _differentiate(ctx, d_out: Tensor, d_lse: Tensor | None) -> tuple[Tensor, None, None]:
    qkv, offsets, out, lse = ctx.saved_tensors
    return _ragged_attention_backward(d_out, qkv, offsets, ctx.longest, out, lse), None, None


_ragged_attention.register_autograd(_differentiate, setup_context=_save)
