"""Assembly and conditioning of the predictor's input: along features (mixer) and along the sequence (action tokens)."""

import itertools
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.masks import GRID, masked_batch
from benchmarks.harness.providers import Function, random_leaf
from benchmarks.harness.rooflines import conditioning_costs
from benchmarks.harness.session import Case, Session
from benchmarks.kernels.attention import IMAGES, NUM_ACTIONS
from iwm_fast.kernels.ops import Ops
from iwm_fast.kernels.predictor_input.layout import PackedLayout, PatchIndex, packed_layout
from iwm_fast.kernels.predictor_input.op import FeatureMixer

WIDTH = 384
KINDS = ("feature", "sequence")
BEHIND_RELU = ("mask_token", "w1", "b1", "w2", "b2")
"""Inputs whose gradients pass a ReLU of the mixer, which conditions along features."""


def run(session: Session) -> None:
    """Time both kinds of conditioning."""
    for kind in KINDS:
        measure(session, kind, *((1, 48) if session.device == "cpu" else (IMAGES, WIDTH)))


def check(session: Session) -> None:
    """Check both kinds in both half precisions, with widths of one and of several tiles."""
    images, widths = (1, (48,)) if session.device == "cpu" else (3, (208, WIDTH))
    for dtype, kind, width in itertools.product(("bfloat16", "float16"), KINDS, widths):
        measure(session, kind, images, width, dtype, is_timed=False)


def measure(
    session: Session, kind: str, images: int, width: int, dtype: str = "bfloat16", *, is_timed: bool = True
) -> None:
    """Check "feature" or "sequence" conditioning of images with random masks, and time it."""
    num_tokens = NUM_ACTIONS if kind == "sequence" else 0
    # The interpreter takes seconds for a hundred rows.
    grid = 4 if session.device == "cpu" else GRID
    patches, layout = masked_patches(images, grid, num_tokens, session.device)
    rows = len(patches.context), len(patches.targets), images * num_tokens
    costs = conditioning_costs(rows, width, has_mixer=kind == "feature")
    case = Case(f"{kind} conditioning", {"P": width, "B": images}, dtype, costs)
    inputs = make_inputs(kind, (images, width), rows[0], dtype, session.device)
    positions = torch.randn(grid**2, width, device=session.device)
    action = torch.randn(images, NUM_ACTIONS, device=session.device)
    operation = partial(make_function, (positions, action), (patches, layout), dtype)
    d_packed = torch.randn(sum(rows), width, device=session.device)
    behind_relu = BEHIND_RELU if kind == "feature" else ()
    session.compare_ops(case, operation, inputs, {"packed": d_packed}, behind_relu=behind_relu, is_timed=is_timed)


def masked_patches(images: int, grid: int, num_tokens: int, device: str) -> tuple[PatchIndex, PackedLayout]:
    """Draw masks; return the patches of context and targets, and the layout of the packed rows."""
    context, target = (index.to(torch.device(device)) for index in masked_batch(images, grid=grid))
    sizes = {"num_context": len(context.row), "num_targets": len(target.row)}
    return PatchIndex(context.row, target.row), packed_layout(context.offsets, target.offsets, num_tokens, **sizes)


def make_inputs(kind: str, shape: tuple[int, int], num_context: int, dtype: str, device: str) -> dict[str, Tensor]:
    """Return the inputs that require a gradient: a half-precision context, as under autocast, and float32 parameters.

    `shape` is the number of images and the width.
    """
    images, width = shape
    inputs = {
        "context": random_leaf(num_context, width, device=device, dtype=getattr(torch, dtype)),
        "mask_token": random_leaf(width, device=device),
    }
    if kind == "sequence":
        return inputs | {"action_tokens": random_leaf(images, NUM_ACTIONS, width, device=device)}
    for layer, inner in enumerate((width + NUM_ACTIONS, width, width), 1):
        inputs[f"w{layer}"] = random_leaf(width, inner, device=device, scale=width**-0.5)
        inputs[f"b{layer}"] = random_leaf(width, device=device, scale=width**-0.5)
    return inputs


def make_function(
    constants: Sequence[Tensor], rows: tuple[PatchIndex, PackedLayout], dtype: str, ops: Ops, *, exact: bool = False
) -> Function:
    """Return the operation as the predictor calls it, under autocast; with exact=True in float64 without autocast.

    The constants are positions and action, which get no gradient.
    """
    positions, action = (tensor.double() if exact else tensor for tensor in constants)

    def assemble(context: Tensor, mask_token: Tensor, *parameters: Tensor) -> Tensor:
        # A single parameter holds the action tokens. Otherwise they are weights and biases of the mixer.
        is_sequence = len(parameters) == 1
        tokens, mixer = (parameters[0], None) if is_sequence else (None, FeatureMixer(action, *parameters))
        with torch.autocast(context.device.type, getattr(torch, dtype), enabled=not exact):
            return ops.predictor_input(context, mask_token, positions, *rows, action_tokens=tokens, mixer=mixer)

    return assemble
