"""Non-causal multi-head attention over sequences of different lengths, packed one after the other.

For every sequence b and head h, with Q, K, V of shape (n_b, d):

    out = softmax(Q K^T / sqrt(d)) V

Shapes: `qkv` (sum N, 3, H, d), rows of sequence b are offsets[b] .. offsets[b + 1]; result (sum N, H, d).
Precision: products in the dtype of `qkv`; the softmax of half-precision scores is computed in float32 and rounded once,
float64 stays float64. Gradient: that of the formula, from autograd.
"""

import torch
from torch import Tensor


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
