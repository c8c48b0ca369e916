"""The predictor's input: per image [context | targets | action tokens], packed one image after the other.

    context row of image b at patch p:   context + positions[p]
    target row of image b at patch p:    h = mask_token + positions[p]; with a mixer
                                         W3 relu(W2 relu(W1 [h; action of b] + b1) + b2) + b3
    action token j of image b:           action_tokens[b, j]

Shapes: context (C, P), positions (N, P), mask_token (P,), action_tokens (B, k, P), action (B, A), W1 (P, P + A),
W2 and W3 (P, P); result (L, P) with L = C + T + B k. Attention does not see the order, so targets keep rows of their
own that are contiguous per image.

The fused operation writes every row once. W1 [h; action] = U[p] + V[b], where U = W1's first P columns times
(mask_token + positions) and V = the others times action, plus b1: N + B rows instead of T. The second layer's product
makes its operand relu(U[p] + V[b]) on the way, the third writes where its rows belong; nothing is concatenated.
Without a mixer rows are copied.

Bytes and products with the mixer, at B = 256 with 98 context and 98 target patches each, P = 384, bfloat16 products and
a float32 stream. Plain: 0.95 GB and 22 GFLOP forward, 0.78 GB and 44 GFLOP backward. Fused: 0.13 GB (context in, 19 MB;
second layer out and in, 39 MB; packed out, 77 MB) and 15 GFLOP forward, 0.48 GB and 30 GFLOP backward.

Precision: the stream has the dtype that the plain version gives. Products are in autocast's dtype, otherwise the
weights'; U, V, biases and all sums are float32 (for float64 float64), so the fused result is rounded less often.
Gradient: that of the formula, except that `positions` are constant. Second and third layer's are cuBLAS products, U and
V take theirs as sums over the rows of a patch and of an image. No atomics: the same bits in every run.
"""

from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iwm_fast.kernels.launch import Launch, check_contiguous, check_dtype
from iwm_fast.kernels.predictor_input.autograd import copied_input, mixed_input
from iwm_fast.kernels.predictor_input.conditioning_mlp import FirstLayer, first_launch, second_launch, third_launch
from iwm_fast.kernels.predictor_input.gather_scatter import place_launch, sum_launch, take_launch
from iwm_fast.kernels.predictor_input.layout import PackedLayout, PatchIndex


class Mixer(NamedTuple):
    """Three layers that mix an image's action into each of its mask tokens."""

    action: Tensor
    """(B, A)."""
    w1: Tensor
    """(P, P + A)."""
    b1: Tensor
    """(P,)."""
    w2: Tensor
    """(P, P)."""
    b2: Tensor
    """(P,)."""
    w3: Tensor
    """(P, P)."""
    b3: Tensor
    """(P,)."""


def predictor_input_reference(
    context: Tensor,
    mask_token: Tensor,
    positions: Tensor,
    patches: PatchIndex,
    places: PackedLayout,
    *,
    action_tokens: Tensor | None = None,
    mixer: Mixer | None = None,
) -> Tensor:
    """Make the rows of context and targets and pack them, and action tokens, per image.

    Args:
        context: (C, P), projected tokens of visible patches.
        mask_token: (P,).
        positions: (N, P), constant.
        patches: which patch of which image each row is.
        places: where each row goes, from `packed_layout`.
        action_tokens: (B, k, P), or None for none.
        mixer: what makes target rows of mask tokens, or None to take them as they are. Not with action tokens.

    Returns:
        (L, P), in the widest dtype of what is packed.

    Raises:
        ValueError: if shapes do not fit or both kinds of conditioning are given.
    """
    _check_shapes(context, mask_token, positions, patches, places, action_tokens=action_tokens, mixer=mixer)
    num_patches, positions = len(positions), positions.detach()
    visible = context + positions[patches.context % num_patches]
    hidden = mask_token + positions[patches.targets % num_patches]
    if mixer is not None:
        hidden = torch.cat([hidden, mixer.action[patches.targets // num_patches]], dim=1)
        hidden = F.linear(hidden, mixer.w1, mixer.b1).relu()
        hidden = F.linear(F.linear(hidden, mixer.w2, mixer.b2).relu(), mixer.w3, mixer.b3)
    parts = [visible, hidden] if action_tokens is None else [visible, hidden, action_tokens.flatten(0, 1)]
    stacked = torch.cat(parts)
    return torch.empty_like(stacked).index_copy_(0, torch.cat(places[: len(parts)]), stacked)


def predictor_input(
    context: Tensor,
    mask_token: Tensor,
    positions: Tensor,
    patches: PatchIndex,
    places: PackedLayout,
    *,
    action_tokens: Tensor | None = None,
    mixer: Mixer | None = None,
) -> Tensor:
    """Do what `predictor_input_reference` does, writing every row once.

    Raises:
        ValueError: as there, and if a width is no multiple of 16 or a tensor not contiguous.
        TypeError: for other dtypes than kernels are written for.
        RuntimeError: without a GPU, unless kernels are interpreted.
    """
    _check_shapes(context, mask_token, positions, patches, places, action_tokens=action_tokens, mixer=mixer)
    _check_inputs(context, mask_token, positions, action_tokens, mixer)
    device, width, rows = context.device.type, context.shape[1], [*patches, *places]
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    sums = torch.promote_types(mask_token.dtype, torch.float32)
    with torch.autocast(device, enabled=False):
        table = mask_token.to(sums) + positions.detach().to(sums)
        if mixer is None:
            tokens = mask_token.new_empty(0, width) if action_tokens is None else action_tokens.flatten(0, 1)
            stream = _widest(context, positions, mask_token, tokens)
            return copied_input(context, positions, table, tokens.to(stream), rows)
        action, w1, b1, w2, b2, w3, b3 = mixer
        by_position = F.linear(table, w1[:, :width].to(sums))
        by_sample = F.linear(action.to(sums), w1[:, width:].to(sums), b1.to(sums))
        w2, w3 = w2.to(autocast or w2.dtype), w3.to(autocast or w3.dtype)
        layers = [w2, b2.to(sums), w3, b3.to(sums)]
        stream = _widest(context, positions, w3)
        packed, _ = mixed_input(context, [positions, by_position, by_sample], layers, rows, stream)
        return packed


def shipped_launches(architecture: int) -> dict[str, Launch]:
    """Return launches that between them use every tile, on tensors without memory: to be compiled offline.

    Args:
        architecture: compute capability times ten; one table serves all, so far.
    """
    half, single = torch.bfloat16, torch.float32
    launches = {}
    for width, dtype in ((384, half), (384, single), (192, half), (208, half), (208, single)):
        setting = f"width {width}, {str(dtype).removeprefix('torch.')}"
        launches |= {f"{name}, {setting}": launch for name, launch in _launches(width, dtype).items()}
    return launches


def _launches(width: int, dtype: torch.dtype) -> dict[str, Launch]:
    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    # a grid of 14 x 14: dividing by a power of two takes fewer registers
    row, rows, packed, table = new(8, dtype=torch.int64), new(8, width, dtype=dtype), new(16, width), new(196, width)
    first = FirstLayer(table, new(2, width), row)
    weight, bias = new(width, width, dtype=dtype), new(width)
    return {
        "first layer": first_launch(rows, first),
        "second layer": second_launch(rows, first, weight, bias),
        "third layer": third_launch(packed, row, rows, weight, bias),
        "place context": place_launch(packed, row, values=rows, table=table, patch_row=row),
        "place targets": place_launch(packed, row, table=table, patch_row=row),
        "place action tokens": place_launch(packed, row, values=new(8, width)),
        "take": take_launch(rows, packed, row),
        "sum": sum_launch(table, rows, new(2, 196, dtype=torch.int32).t()),
    }


def _check_shapes(
    context: Tensor,
    mask_token: Tensor,
    positions: Tensor,
    patches: PatchIndex,
    places: PackedLayout,
    *,
    action_tokens: Tensor | None,
    mixer: Mixer | None,
) -> None:
    if action_tokens is not None and mixer is not None:
        raise ValueError("action_tokens and mixer exclude each other, got both; pass one of them or none")
    if context.ndim != 2 or positions.ndim != 2 or (action_tokens is not None and action_tokens.ndim != 3):
        raise ValueError("context, positions and action_tokens must have shapes (C, P), (N, P) and (B, k, P)")
    width, num_images = context.shape[1], len(places.offsets) - 1
    num_tokens = 0 if action_tokens is None else action_tokens.shape[1]
    shapes = {
        "mask_token": (mask_token, (width,)),
        "positions": (positions, (len(positions), width)),
        "patches.context": (patches.context, (len(context),)),
        "places.context": (places.context, (len(context),)),
        "places.targets": (places.targets, (len(patches.targets),)),
        "places.action_tokens": (places.action_tokens, (num_images * num_tokens,)),
    }
    if action_tokens is not None:
        shapes["action_tokens"] = action_tokens, (num_images, num_tokens, width)
    if mixer is not None:
        num_actions = mixer.action.shape[-1]
        sizes = {"w1": (width, width + num_actions), "w2": (width, width), "w3": (width, width)}
        sizes |= {"action": (num_images, num_actions), "b1": (width,), "b2": (width,), "b3": (width,)}
        shapes |= {f"mixer.{name}": (getattr(mixer, name), size) for name, size in sizes.items()}
    for name, (tensor, shape) in shapes.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def _check_inputs(
    context: Tensor, mask_token: Tensor, positions: Tensor, action_tokens: Tensor | None, mixer: Mixer | None
) -> None:
    if context.shape[1] % 16 != 0:
        raise ValueError(f"the width P of context must be a multiple of 16, got {context.shape[1]}")
    inputs = {"context": context, "mask_token": mask_token, "positions": positions, "action_tokens": action_tokens}
    inputs |= {} if mixer is None else {f"mixer.{name}": value for name, value in mixer._asdict().items()}
    for name, tensor in inputs.items():
        if tensor is not None:
            check_dtype(name, tensor)
            check_contiguous(name, tensor)


def _widest(*tensors: Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
