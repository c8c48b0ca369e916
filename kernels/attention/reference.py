"""Attention over packed sequences in plain PyTorch: what the fused operation is compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from iwm_fast.kernels.attention.sequences import Sequences


def ragged_attention_reference(qkv: Tensor, sequences: Sequences) -> Tensor:
    """Compute attention within each sequence in plain PyTorch.

    On a GPU, half precision uses PyTorch's own fused attention: `scaled_dot_product_attention` for sequences of equal
    length and, from compute capability 8.0 on, `varlen_attn` with FlashAttention 2 for others. Everything else stores
    the scores of sequences padded to equal length.

    Args:
        qkv: (sum N, 3, H, d), queries, keys and values of all rows.
        sequences: where each sequence begins. The bounds are not checked, because that would wait for the device.

    Returns:
        (sum N, H, d). Sequences may be empty.

    Raises:
        ValueError: if `qkv` does not have these axes, or there are no offsets and its rows are not a multiple of the
            length.
    """
    check_shapes(qkv, sequences)
    is_gpu_half = qkv.is_cuda and qkv.dtype in (torch.float16, torch.bfloat16)
    if sequences.offsets is None:
        return _dense(qkv, sequences.longest, is_gpu_half)
    if is_gpu_half and sequences.longest > 0 and _has_flash_attention(qkv.device):
        return _packed(qkv, sequences.offsets, sequences.longest)
    return _padded(qkv, sequences.offsets, sequences.longest)


def check_shapes(qkv: Tensor, sequences: Sequences) -> None:
    """Raise a ValueError if the axes of `qkv` are not (rows, 3, heads, head_dim), or its rows no whole sequences."""
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must have shape (rows, 3, heads, head_dim), got {tuple(qkv.shape)}; reshape it")
    length = sequences.longest
    if sequences.offsets is None and (length < 1 or qkv.shape[0] % length != 0):
        raise ValueError(f"dense qkv must hold a multiple of longest = {length} rows, got {qkv.shape[0]}; pass offsets")


def _has_flash_attention(device: torch.device) -> bool:
    """Return whether PyTorch's FlashAttention 2 runs on this GPU."""
    # torch.compile can trace this, unlike `get_device_capability`.
    return torch.cuda.get_device_properties(device).major >= 8


def _packed(qkv: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Compute attention in sequences of up to `longest` rows without padding them, by FlashAttention 2."""
    # Imported here, because it takes seconds that a CPU would wait for nothing.
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415

    query, key, value = qkv.unbind(1)
    # By default some versions of PyTorch choose cuDNN on Hopper and newer GPUs. It builds and keeps a graph for every
    # number of rows, which differs from batch to batch. The backward pass uses the backend of the forward pass.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = varlen_attn(query, key, value, offsets, offsets, longest, longest)
    assert isinstance(out, Tensor)
    return out


def _dense(qkv: Tensor, length: int, is_gpu_half: bool) -> Tensor:
    """Compute attention in sequences that all have `length` rows."""
    num_rows, _, num_heads, head_dim = qkv.shape
    by_sequence = qkv.view(num_rows // length, length, 3, num_heads, head_dim)
    if is_gpu_half:
        # Unbound before they are transposed: autograd then stacks the three gradients in the layout of `qkv`.
        query, key, value = (part.transpose(1, 2) for part in by_sequence.unbind(2))
        out = F.scaled_dot_product_attention(query, key, value)
        return out.transpose(1, 2).reshape(num_rows, num_heads, head_dim)
    by_head = by_sequence.permute(2, 3, 0, 1, 4).reshape(3, -1, length, head_dim)
    return _attend(by_head, qkv.new_zeros(1, 1, 1)).view(num_heads, num_rows, head_dim).transpose(0, 1)


def _padded(qkv: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Compute attention in sequences that are padded to `longest` rows."""
    num_rows, _, num_heads, head_dim = qkv.shape
    num_sequences = offsets.numel() - 1
    padded_row = _padded_rows(offsets, longest, num_rows, 3 * num_heads)
    # Zeros, not uninitialised memory: padded values are multiplied by a weight of zero, and 0 * NaN is NaN.
    padded = qkv.new_zeros(3 * num_heads * num_sequences * longest, head_dim)
    padded = padded.index_copy_(0, padded_row.flatten(), qkv.reshape(-1, head_dim))
    # An empty sequence is given one key, which is zero, because a softmax over no keys is NaN.
    is_padding = torch.arange(longest, device=offsets.device) >= offsets.diff().clamp(min=1)[:, None]
    key_bias = torch.zeros_like(is_padding, dtype=qkv.dtype).masked_fill_(is_padding, float("-inf"))
    key_bias = key_bias[:, None].repeat(num_heads, 1, 1)
    out = _attend(padded.view(3, num_heads * num_sequences, longest, head_dim), key_bias).view(-1, head_dim)
    return out.index_select(0, padded_row[:, :num_heads].flatten()).view(num_rows, num_heads, head_dim)


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
