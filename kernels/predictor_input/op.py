"""The predictor's input: per image [context | targets | action tokens], packed one image after the other.

    context row of image b at patch p:   context + positions[p]
    target row of image b at patch p:    h = mask_token + positions[p]; with a mixer, instead,
                                         W3 relu(W2 relu(W1 [h; action of b] + b1) + b2) + b3
    action token j of image b:           action_tokens[b, j]

Shapes: context (C, P), positions (N, P), mask_token (P,), action_tokens (B, k, P), action (B, A), W1 (P, P + A),
W2 and W3 (P, P); the result is (L, P) with L = C + T + B k. Attention does not depend on the order of the rows, so the
target rows of an image can be contiguous.

The fused operation concatenates nothing. W1 [h; action] + b1 = U[p] + V[b], where U is the product of W1's first P
columns with mask_token + positions, and V that of the remaining columns with action, plus b1: N + B rows instead of T.
In the code U is `by_patch` and V is `by_image`. One kernel computes relu(U[p] + V[b]), the other two layers are
products of the library, and one kernel places rows in the packed sequences and adds positions to the context.

Bytes and products with the mixer, at B = 256 with 98 context and 98 target patches each, P = 384, bfloat16 products and
a float32 residual stream. Plain PyTorch: 0.95 GB and 22 GFLOP forward, 0.78 GB and 44 GFLOP backward. Fused: 0.25 GB
and 15 GFLOP forward, 0.44 GB and 30 GFLOP backward.

Precision: the result has the dtype that the reference gives. Products are in autocast's dtype, without autocast in that
of the weights; U and V are float32 (for float64 float64).

Gradient: that of the formula, with `positions` constant. Those of U and V are sums over the rows of a patch and of an
image. There are no atomics, so the bits are the same in every run.
"""

from functools import partial, reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iwm_fast.kernels.launch import Launch, check_tensor
from iwm_fast.kernels.predictor_input.autograd import CombineRows, PlaceRows
from iwm_fast.kernels.predictor_input.kernels import combine_launch, gather_launch, group_sum_launch, scatter_launch
from iwm_fast.kernels.predictor_input.layout import PackedLayout, PatchIndex


class FeatureMixer(NamedTuple):
    """Actions, and weights of the three-layer MLP that mixes an image's action into each of its mask tokens.

    Shapes: action (B, A), w1 (P, P + A), w2 and w3 (P, P), biases (P,). Source: IWM, feature conditioning.
    """

    action: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
    b3: Tensor


def predictor_input_reference(
    context: Tensor,
    mask_token: Tensor,
    positions: Tensor,
    patches: PatchIndex,
    layout: PackedLayout,
    *,
    action_tokens: Tensor | None = None,
    mixer: FeatureMixer | None = None,
) -> Tensor:
    """Assemble the packed input (L, P) of the predictor in plain PyTorch, in the widest dtype of what is packed.

    The arguments are those of `predictor_input`, on any device and with any width P.

    Raises:
        ValueError: if shapes do not fit or both action_tokens and mixer are passed.
    """
    _check_shapes(_named_inputs(context, mask_token, positions, action_tokens, mixer), patches, layout)
    num_patches, positions = len(positions), positions.detach()
    context_rows = context + positions[patches.context % num_patches]
    target_rows = mask_token + positions[patches.targets % num_patches]
    if mixer is not None:
        hidden = torch.cat([target_rows, mixer.action[patches.targets // num_patches]], dim=1)
        hidden = F.linear(hidden, mixer.w1, mixer.b1).relu()
        target_rows = F.linear(F.linear(hidden, mixer.w2, mixer.b2).relu(), mixer.w3, mixer.b3)
    blocks = [context_rows, target_rows] + ([] if action_tokens is None else [action_tokens.flatten(0, 1)])
    stacked = torch.cat(blocks)
    return torch.empty_like(stacked).index_copy_(0, torch.cat(layout[: len(blocks)]), stacked)


def predictor_input(
    context: Tensor,
    mask_token: Tensor,
    positions: Tensor,
    patches: PatchIndex,
    layout: PackedLayout,
    *,
    action_tokens: Tensor | None = None,
    mixer: FeatureMixer | None = None,
) -> Tensor:
    """Assemble the packed input of the predictor by Triton kernels that write every row once.

    Args:
        context: (C, P), embedded tokens of the visible patches; P is a multiple of 16.
        mask_token: (P,), the learned token that stands for a patch to predict.
        positions: (N, P), position embeddings; they get no gradient.
        patches: the patch of each context and target row.
        layout: the packed row of each token, from `packed_layout`.
        action_tokens: (B, k, P), or None. Not together with `mixer`.
        mixer: actions and the MLP that mixes them into the mask tokens, or None to leave mask tokens unconditioned.

    Returns:
        (L, P), in the dtype that the reference gives.

    Raises:
        ValueError: if shapes do not fit, both action_tokens and mixer are passed, P is not a multiple of 16, or a
            tensor is not contiguous.
        TypeError: for dtypes other than bfloat16, float16 and float32.
        RuntimeError: if tensors are not on a GPU and kernels are not interpreted.
    """
    inputs = _named_inputs(context, mask_token, positions, action_tokens, mixer)
    _check_shapes(inputs, patches, layout)
    _check_fused(inputs)
    device_type, num_images = context.device.type, len(layout.offsets) - 1
    autocast_dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    sum_dtype = torch.promote_types(mask_token.dtype, torch.float32)
    positions = positions.detach()
    # Autocast is off for what is summed, because it would round both terms of the first layer.
    with torch.autocast(device_type, enabled=False):
        mask_tokens = mask_token.to(sum_dtype) + positions.to(sum_dtype)
        if mixer is not None:
            w1, b1, width = mixer.w1.to(sum_dtype), mixer.b1.to(sum_dtype), mask_tokens.shape[1]
            by_patch = F.linear(mask_tokens, w1[:, :width])
            by_image = F.linear(mixer.action.to(sum_dtype), w1[:, width:], b1)
    if mixer is None:
        target_dtype = torch.promote_types(mask_token.dtype, positions.dtype)
        target_rows = CombineRows.apply(mask_tokens, None, patches.targets, num_images, target_dtype)
    else:
        hidden = CombineRows.apply(by_patch, by_image, patches.targets, num_images, autocast_dtype or mixer.w2.dtype)
        target_rows = F.linear(F.linear(hidden, mixer.w2, mixer.b2).relu_(), mixer.w3, mixer.b3)
    values = [context, target_rows] + ([] if action_tokens is None else [action_tokens.flatten(0, 1)])
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in (positions, *values)))
    return PlaceRows.apply(layout[: len(values)], positions, patches.context, dtype, *values)


def shipped_launches(architecture: int) -> dict[str, Launch]:
    """Return launches that together use every tile size, by name, on meta tensors; all architectures have the same."""
    half, single = torch.bfloat16, torch.float32
    launches = {}
    for width, dtype in ((384, half), (384, single), (192, half), (208, half), (208, single)):
        setting = f"width {width}, {str(dtype).removeprefix('torch.')}"
        launches |= {f"{name}, {setting}": launch for name, launch in _launches(width, dtype).items()}
    return launches


def _launches(width: int, dtype: torch.dtype) -> dict[str, Launch]:
    new = partial(torch.empty, device="meta")
    # A grid of 14 x 14 patches: with a power of two, the division by N would take fewer registers.
    table, packed, by_image = new(196, width), new(16, width), new(2, width)
    row, values = new(8, dtype=torch.int64), new(8, width, dtype=dtype)
    members = new(2, 196, dtype=torch.int32).t()
    # Committed benchmark results are stored under these names.
    return {
        "combine": combine_launch(values, table, by_image, row),
        "combine without images": combine_launch(values, table, None, row),
        "place with positions": scatter_launch(packed, row, values, table, row),
        "place": scatter_launch(packed, row, values),
        "take": gather_launch(values, packed, row),
        "sum": group_sum_launch(table, values, values, members),
        "sum without a gate": group_sum_launch(table, values, None, members),
    }


def _named_inputs(
    context: Tensor, mask_token: Tensor, positions: Tensor, action_tokens: Tensor | None, mixer: FeatureMixer | None
) -> dict[str, Tensor]:
    """Return the inputs that are present, by the names that messages use."""
    if action_tokens is not None and mixer is not None:
        raise ValueError("action_tokens and mixer exclude each other, got both; pass at most one of them")
    inputs = {"context": context, "mask_token": mask_token, "positions": positions}
    inputs |= {} if action_tokens is None else {"action_tokens": action_tokens}
    return inputs | ({} if mixer is None else {f"mixer.{name}": value for name, value in mixer._asdict().items()})


def _check_shapes(inputs: dict[str, Tensor], patches: PatchIndex, layout: PackedLayout) -> None:
    axes = {"context": 2, "positions": 2, "action_tokens": 3}
    if any(inputs[name].ndim != num_axes for name, num_axes in axes.items() if name in inputs):
        raise ValueError("context, positions and action_tokens must have shapes (C, P), (N, P) and (B, k, P)")
    num_context, width = inputs["context"].shape
    num_images = len(layout.offsets) - 1
    num_tokens = inputs["action_tokens"].shape[1] if "action_tokens" in inputs else 0
    num_actions = inputs["mixer.action"].shape[-1] if "mixer.action" in inputs else 0
    tensors = inputs | {"patches.context": patches.context}
    tensors |= {f"layout.{name}": value for name, value in layout._asdict().items()}
    shapes = {"patches.context": (num_context,), "layout.context": (num_context,),
              "layout.targets": (len(patches.targets),), "layout.action_tokens": (num_images * num_tokens,),
              "mask_token": (width,), "positions": (len(inputs["positions"]), width),
              "action_tokens": (num_images, num_tokens, width), "mixer.action": (num_images, num_actions),
              "mixer.w1": (width, width + num_actions), "mixer.w2": (width, width), "mixer.w3": (width, width),
              "mixer.b1": (width,), "mixer.b2": (width,), "mixer.b3": (width,)}  # fmt: skip
    for name, shape in shapes.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensors[name].shape)}")


def _check_fused(inputs: dict[str, Tensor]) -> None:
    width = inputs["context"].shape[1]
    if width % 16 != 0:
        raise ValueError(
            f"fused predictor_input supports widths that are multiples of 16, got {width}; set runtime.ops=reference"
        )
    for name, tensor in inputs.items():
        check_tensor(name, tensor)
