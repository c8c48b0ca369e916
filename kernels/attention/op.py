"""Non-causal multi-head attention over sequences of different lengths, packed one after the other.

For every sequence b and head h, with Q, K, V of shape (n_b, d):

    out = softmax(Q K^T / sqrt(d)) V

Shapes: `qkv` is (sum N, 3, H, d), in which sequence b has the rows offsets[b] .. offsets[b + 1]; the result is
(sum N, H, d). Without offsets all sequences have the same number of rows; everything else is the same.

Bytes, where u is the size of one (sum N, H, d) tensor. Forward: 4u, and 4 bytes per row and head for the logarithm of
the softmax's denominator; the reference stores all scores, 4 u N / d and more. Backward: 7u, since the three gradients
are written straight into one gradient of `qkv`; stacking them would take 6u more.

Precision: products are in the dtype of `qkv`; sums and softmax are in float32. (The interpreter also takes float32 and
float64, in which it computes throughout.) Weights are rounded to the dtype of `qkv` before they are multiplied by the
values. The backward pass recomputes the weights from the saved logarithm, which adds a relative error of |s| 2^-24 at a
score of s. At |s| = 1,000 that is 6e-5, a tenth of float16's rounding.

Gradient, with P the softmax: dV = P^T dO, dS = P * (dO V^T - sum(P * dO V^T)), dQ = dS K / sqrt(d) and
dK = dS^T Q / sqrt(d). Every number is summed by one program in a fixed order, so the bits are the same in every run.

Not offered: float32 on a GPU, sequences above 256 rows, dropout, causal or other masks, heads of a size other than 32
and 64, second derivatives. PyTorch's own attention serves them well, so `runtime.ops=auto` leaves them to it.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from iwm_fast.kernels.attention.kernels import backward_launches, choose_configs, forward_launches
from iwm_fast.kernels.attention.reference import check_shapes
from iwm_fast.kernels.attention.sequences import Sequences
from iwm_fast.kernels.launch import (
    IS_INTERPRETING,
    Launch,
    architecture,
    check_tensor,
    register_op,
    upcast_for_interpreter,
)

HEAD_DIMS = (32, 64)
"""Head sizes that the fused operation supports."""


def ragged_attention(qkv: Tensor, sequences: Sequences) -> Tensor:
    """Compute attention within each sequence by Triton kernels.

    Args:
        qkv: (sum N, 3, H, d), queries, keys and values of all rows; contiguous, d is 32 or 64.
        sequences: where each sequence begins. The bounds are not checked, because that would wait for the device.

    Returns:
        (sum N, H, d). Sequences may be empty.

    Raises:
        TypeError: if the dtype of `qkv` is not bfloat16 or float16.
        ValueError: if shape, head size or strides of `qkv`, or dtype, axes or device of the offsets, are not as above,
            or a sequence is too long for the kernels.
        RuntimeError: if `qkv` is not on a GPU and kernels are not interpreted.
    """
    if not torch.is_grad_enabled():
        # Without autograd's bookkeeping, which takes a quarter of the host time.
        return _forward_op(qkv, *sequences)[0]
    return _RaggedAttention.apply(qkv, *sequences)


def why_unsupported(device_architecture: int, head_dim: int, dtype: torch.dtype, longest: int) -> str:
    """Return why there is no kernel for this attention, as a sentence without its subject; empty if there is one."""
    if head_dim not in HEAD_DIMS:
        return f"supports heads of {' or '.join(map(str, HEAD_DIMS))}, got {head_dim}"
    # Wider dtypes need more registers and shared memory than a GPU has. The interpreter has no such limit.
    if dtype.itemsize != 2 and not IS_INTERPRETING:
        return f"supports bfloat16 and float16, got {str(dtype).removeprefix('torch.')}"
    limit = choose_configs(device_architecture, head_dim).max_length
    if longest > limit:
        return f"supports up to {limit} tokens per image with heads of {head_dim} on this GPU, got {longest}"
    return ""


def shipped_launches(architecture: int) -> dict[str, Launch]:
    """Return every launch configuration used on an architecture, by name, on tensors of the meta device."""
    launches = {}
    variants = ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True))
    for head_dim, (dtype, is_ragged) in itertools.product(HEAD_DIMS, variants):
        longest = choose_configs(architecture, head_dim).max_length
        # A ragged batch of all lengths starts every kernel; a dense one only those of its length.
        for length in (longest,) if is_ragged else [n for n in (128, 208, 224, 256) if n <= longest]:
            qkv = torch.empty(length, 3, 1, head_dim, dtype=dtype, device="meta")
            offsets = torch.empty(2, dtype=torch.int32, device="meta") if is_ragged else None
            sequences = Sequences(offsets, 0 if is_ragged else length, length)
            out, lse = qkv[:, 0], _new_lse(qkv)
            both_passes = forward_launches(architecture, qkv, sequences, out, lse)
            both_passes += backward_launches(architecture, qkv, sequences, out, qkv, lse)
            variant = f"d={head_dim} {str(dtype).removeprefix('torch.')} {'ragged' if is_ragged else 'dense'}"
            launches |= {f"{_name(launch)}, {variant}": launch for launch in both_passes}
    return launches


def _name(launch: Launch) -> str:
    # Committed benchmark results are stored under these names, which contain the kernels' names.
    lower_limit, *_, upper_limit = launch.constants["LIMITS"]
    kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
    return f"attention {kernel} {lower_limit + 1}-{upper_limit}"


def _check_fused(qkv: Tensor, sequences: Sequences, device_architecture: int) -> None:
    check_shapes(qkv, sequences)
    check_tensor("qkv", qkv)
    reason = why_unsupported(device_architecture, qkv.shape[3], qkv.dtype, sequences.longest)
    if reason:
        raise ValueError(f"fused attention {reason}; set runtime.ops=reference")
    offsets = sequences.offsets
    if offsets is not None and (offsets.dtype, offsets.ndim, offsets.device) != (torch.int32, 1, qkv.device):
        raise ValueError(
            f"offsets must be an int32 vector on {qkv.device}, got {offsets.dtype} with {offsets.ndim} axes on "
            f"{offsets.device}; pass offsets.to(qkv.device, torch.int32)"
        )


def _new_lse(qkv: Tensor) -> Tensor:
    """Return an empty (H, sum N) tensor for log2 of the softmax's denominator."""
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty(qkv.shape[2], qkv.shape[0], dtype=dtype)


def _forward(qkv: Tensor, offsets: Tensor | None, shortest: int, longest: int) -> tuple[Tensor, Tensor]:
    sequences = Sequences(offsets, shortest, longest)
    device_architecture = architecture(qkv.device)
    _check_fused(qkv, sequences, device_architecture)
    kernel_qkv = upcast_for_interpreter(qkv)
    out = kernel_qkv.new_empty(kernel_qkv.shape[0], *kernel_qkv.shape[2:])
    lse = _new_lse(kernel_qkv)
    # Without rows nothing is started, whatever the bounds are.
    for launch in forward_launches(device_architecture, kernel_qkv, sequences, out, lse):
        launch.run()
    return out.to(qkv.dtype), lse


def _backward(d_out: Tensor, qkv: Tensor, lse: Tensor, *sequences: Any) -> Tensor:
    kernel_qkv = upcast_for_interpreter(qkv)
    d_qkv = torch.empty_like(kernel_qkv)
    # Autograd may pass any layout: the gradient of a sum is expanded, that of a permutation transposed.
    tensors = upcast_for_interpreter(d_out.contiguous()), d_qkv, lse
    for launch in backward_launches(architecture(qkv.device), kernel_qkv, Sequences(*sequences), *tensors):
        launch.run()
    return d_qkv.to(qkv.dtype)


_forward_op = register_op(
    "ragged_attention(Tensor qkv, Tensor? offsets, SymInt shortest, SymInt longest) -> (Tensor, Tensor)",
    _forward,
    lambda qkv, *_: (qkv.new_empty(qkv.shape[0], *qkv.shape[2:]), _new_lse(qkv)),
)
_backward_op = register_op(
    "ragged_attention_backward(Tensor d_out, Tensor qkv, Tensor lse, Tensor? offsets, SymInt shortest, SymInt longest)"
    " -> Tensor",
    _backward,
    lambda d_out, qkv, *_: torch.empty_like(qkv),
)


class _RaggedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, offsets: Tensor | None, shortest: int, longest: int) -> Tensor:
        out, lse = _forward_op(qkv, offsets, shortest, longest)
        ctx.save_for_backward(qkv, lse, offsets)
        ctx.bounds = shortest, longest
        return out

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return _backward_op(*d_outputs, *ctx.saved_tensors, *ctx.bounds), None, None, None
