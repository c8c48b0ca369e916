"""Who attends: the fused operation, its reference, and what PyTorch has, all from a packed qkv to one gradient of it.

A linear layer makes queries, keys and values as one tensor. Peers take views of it, and autograd puts their three
gradients into one again; that is part of their time, as it is in a model. `longest` of a dense batch is its length.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from benchmarks.harness.providers import Function, Provider, compiled, leaf
from iwm_fast.kernels.ops import FUSED, REFERENCE

NUM_HEADS = 12

Attend = Callable[[Tensor, Tensor | None, int], Tensor]

SDPA = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FA2": SDPBackend.FLASH_ATTENTION,
    "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""Backends of PyTorch's scaled_dot_product_attention by the names in the tables."""


def inputs(rows: int, num_heads: int, head_dim: int, device: str) -> tuple[Tensor, Tensor]:
    """Return qkv and the gradient of the output."""
    qkv = leaf(rows, 3, num_heads, head_dim, device=device, dtype=torch.bfloat16)
    return qkv, torch.randn(rows, num_heads, head_dim, device=device).bfloat16()


def by(backend: SDPBackend, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function whose attention is computed by one backend of PyTorch, which raises where it cannot."""

    def call(*inputs: Any) -> Tensor:
        with sdpa_kernel(backend):
            return function(*inputs)

    return call


def attend_padded(padded: Tensor, is_key: Tensor | None = None) -> Tensor:
    """Attend in (B, L, 3, H, d), padded to one length, to all keys or those that are some: is_key (B, 1, 1, L)."""
    query, key, value = (part.transpose(1, 2) for part in padded.unbind(2))
    mask = None if is_key is None else is_key.expand(-1, 1, query.shape[2], -1)
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(0, 1)


def attend_dense(qkv: Tensor, offsets: Tensor | None, longest: int) -> Tensor:
    """Attend within each `longest` rows of (sum N, 3, H, d); offsets are taken for granted."""
    # -1: as many sequences as there are, without asking how many rows
    return attend_padded(qkv.view(-1, longest, *qkv.shape[1:]))


def attend_packed(qkv: Tensor, offsets: Tensor | None, longest: int) -> Tensor:
    """Attend within each packed sequence by PyTorch's varlen_attn."""
    assert offsets is not None, "there is no dense form"
    query, key, value = qkv.unbind(1)
    out = varlen_attn(query, key, value, offsets, offsets, longest, longest)
    assert isinstance(out, Tensor), "only asked for the output"
    return out


def dense_providers(qkv: Tensor, longest: int, d_out: Tensor) -> list[Provider]:
    """Return everybody for sequences of one length: qkv (B * N, 3, H, d), d_out (B * N, H, d)."""
    own = {"fused": FUSED.ragged_attention, "eager": REFERENCE.ragged_attention}
    peers = {name: by(backend, attend_dense) for name, backend in SDPA.items()}
    functions = {**own, "compiled": compiled(REFERENCE.ragged_attention), **peers}
    return [Provider(name, _call(attend, None, longest), (qkv,), (d_out,)) for name, attend in functions.items()]


def packed_providers(qkv: Tensor, offsets: Tensor, longest: int, d_out: Tensor) -> list[Provider]:
    """Return everybody for packed sequences of different lengths.

    Those that need padding get padded tensors as inputs, and leave the result padded: moving is not in their time.
    Without a mask padding is attended to, which is wrong and the least that padding can cost.
    """
    own = {"fused": FUSED.ragged_attention, "eager": REFERENCE.ragged_attention}
    functions = {**own, "varlen_attn": attend_packed}
    packed = [Provider(name, _call(attend, offsets, longest), (qkv,), (d_out,)) for name, attend in functions.items()]
    is_key = torch.arange(longest, device=qkv.device) < offsets.diff()[:, None]
    padded = _padded(qkv, is_key).requires_grad_()
    d_padded = _padded(d_out, is_key).flatten(0, 1)
    unmasked = Provider("cuDNN padded", by(SDPA["cuDNN"], attend_padded), (padded,), (d_padded,))
    attend = by(SDPA["cuDNN"], partial(attend_padded, is_key=is_key[:, None, None]))
    return [*packed, unmasked, unmasked._replace(name="cuDNN padded, mask", function=attend)]


def _call(attend: Attend, offsets: Tensor | None, longest: int) -> Function:
    return lambda qkv: attend(qkv, offsets, longest)


def _padded(packed: Tensor, is_key: Tensor) -> Tensor:
    padded = packed.new_zeros(*is_key.shape, *packed.shape[1:])
    padded[is_key] = packed.detach()
    return padded
