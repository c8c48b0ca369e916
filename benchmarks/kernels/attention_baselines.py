"""Providers of attention: the fused operation, its reference, and PyTorch's kernels, from a packed qkv to its gradient.

A linear layer computes queries, keys and values as one tensor. PyTorch's kernels take views of it, and autograd
combines their three gradients into one tensor; that is part of their time, as in a model. In a dense batch all
sequences have the length `longest`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from benchmarks.harness.providers import Function, Provider, compiled, random_leaf
from iwm_fast.kernels.ops import FUSED, REFERENCE

NUM_HEADS = 12

Attend = Callable[[Tensor, Tensor | None, int], Tensor]

SDPA = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FA2": SDPBackend.FLASH_ATTENTION,
    "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""Backends of PyTorch's scaled_dot_product_attention by the names in the tables."""


def random_inputs(rows: int, num_heads: int, head_dim: int, device: str) -> tuple[Tensor, Tensor]:
    """Return qkv and the gradient of the output."""
    qkv = random_leaf(rows, 3, num_heads, head_dim, device=device, dtype=torch.bfloat16)
    return qkv, torch.randn(rows, num_heads, head_dim, device=device).bfloat16()


def with_backend(backend: SDPBackend, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that uses only this backend of PyTorch, and raises if the backend does not support a call."""

    def call(*inputs: Any) -> Tensor:
        with sdpa_kernel(backend):
            return function(*inputs)

    return call


def attend_padded(padded: Tensor, is_key: Tensor | None = None) -> Tensor:
    """Attend within padded sequences (B, L, 3, H, d); is_key (B, 1, 1, L) is False for padding."""
    query, key, value = (tensor.transpose(1, 2) for tensor in padded.unbind(2))
    mask = None if is_key is None else is_key.expand(-1, 1, query.shape[2], -1)
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(0, 1)


def attend_dense(qkv: Tensor, offsets: Tensor | None, longest: int) -> Tensor:
    """Attend within groups of `longest` rows of (sum N, 3, H, d); the offsets are not used."""
    # With -1 the number of sequences follows from the tensor, and no size is read in Python.
    return attend_padded(qkv.view(-1, longest, *qkv.shape[1:]))


def attend_packed(qkv: Tensor, offsets: Tensor | None, longest: int) -> Tensor:
    """Attend within each packed sequence by PyTorch's varlen_attn."""
    assert offsets is not None, "varlen_attn needs offsets"
    query, key, value = qkv.unbind(1)
    out = varlen_attn(query, key, value, offsets, offsets, longest, longest)
    assert isinstance(out, Tensor), "the log-sum-exp was not requested"
    return out


def dense_providers(qkv: Tensor, longest: int, d_out: Tensor) -> list[Provider]:
    """Return all providers for sequences of one length: qkv (B * N, 3, H, d), d_out (B * N, H, d)."""
    functions = {
        "fused": FUSED.ragged_attention,
        "eager": REFERENCE.ragged_attention,
        "compiled": compiled(REFERENCE.ragged_attention),
        **{name: with_backend(backend, attend_dense) for name, backend in SDPA.items()},
    }
    return [Provider(name, _call(attend, None, longest), (qkv,), (d_out,)) for name, attend in functions.items()]


def packed_providers(qkv: Tensor, offsets: Tensor, longest: int, d_out: Tensor) -> list[Provider]:
    """Return all providers for packed sequences of different lengths.

    Providers that need padding get padded inputs and return padded outputs, so that packing is not part of their time.
    Without a mask they attend to padding, too: the result is wrong, but the time is the minimum that padding costs.
    """
    reference = REFERENCE.ragged_attention
    functions = {"fused": FUSED.ragged_attention, "eager": reference, "varlen_attn": attend_packed}
    packed = [Provider(name, _call(attend, offsets, longest), (qkv,), (d_out,)) for name, attend in functions.items()]
    is_key = torch.arange(longest, device=qkv.device) < offsets.diff()[:, None]
    padded = _padded(qkv, is_key).requires_grad_()
    d_padded = _padded(d_out, is_key).flatten(0, 1)
    unmasked = Provider("cuDNN padded", with_backend(SDPA["cuDNN"], attend_padded), (padded,), (d_padded,))
    attend = with_backend(SDPA["cuDNN"], partial(attend_padded, is_key=is_key[:, None, None]))
    return [*packed, unmasked, unmasked._replace(name="cuDNN padded, mask", function=attend)]


def _call(attend: Attend, offsets: Tensor | None, longest: int) -> Function:
    return lambda qkv: attend(qkv, offsets, longest)


def _padded(packed: Tensor, is_key: Tensor) -> Tensor:
    padded = packed.new_zeros(*is_key.shape, *packed.shape[1:])
    padded[is_key] = packed.detach()
    return padded
