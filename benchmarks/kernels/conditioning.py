"""Assembly and conditioning of the predictor's input: along features (mixer) and along the sequence (action tokens)."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.providers import Function, random_leaf
from benchmarks.harness.rooflines import conditioning_costs
from benchmarks.harness.session import Case, Session
from iwm_fast.kernels.ops import Ops
from iwm_fast.kernels.predictor_input.layout import PackedLayout, PatchIndex, packed_layout
from iwm_fast.kernels.predictor_input.op import FeatureMixer
from iwm_fast.pipelines.config import ViewConfig

WIDTH = 384
NUM_PATCHES = 196
NUM_CONTEXT = 98
IMAGES = 256
NUM_ACTIONS = len(ViewConfig().entries)


def run(session: Session) -> None:
    """Measure both kinds of conditioning."""
    for images in (IMAGES,) if session.quick else (IMAGES, 4 * IMAGES):
        for kind in ("feature", "sequence"):
            measure_conditioning(session, kind, images)


def measure_conditioning(
    session: Session, kind: str, images: int, width: int = WIDTH, num_patches: int = NUM_PATCHES
) -> None:
    """Measure "feature" or "sequence" conditioning; half of the patches are context, the rest are targets."""
    half = num_patches // 2
    num_tokens = NUM_ACTIONS if kind == "sequence" else 0
    rows = images * half, images * (num_patches - half), images * num_tokens
    costs = conditioning_costs(rows, width, has_mixer=kind == "feature")
    shape = {"context": half, "targets": num_patches - half, "P": width, "B": images}
    case = Case(f"{kind} conditioning", shape, costs=costs)
    if not session.has_time(case):
        return
    patches, layout = random_split(images, num_patches, half, num_tokens, session.device)
    inputs = make_inputs(kind, images, len(patches.context), width, session.device)
    positions = torch.randn(num_patches, width, device=session.device)
    action = torch.randn(images, NUM_ACTIONS, device=session.device)

    operation = partial(make_function, (positions, action), (patches, layout), session.device)
    session.compare_ops(case, operation, inputs, {"packed": torch.randn(sum(rows), width, device=session.device)})


def random_split(
    images: int, num_patches: int, num_context: int, num_tokens: int, device: str
) -> tuple[PatchIndex, PackedLayout]:
    """Draw the context patches of each image; return context and targets, and the layout of the packed rows."""
    order = torch.rand(images, num_patches).argsort(1) + num_patches * torch.arange(images)[:, None]
    context, targets = order[:, :num_context].sort(1)[0], order[:, num_context:].sort(1)[0]
    patches = PatchIndex(context.flatten().to(device), targets.flatten().to(device))
    image = torch.arange(images + 1, dtype=torch.int32, device=device)
    sizes = {"num_context": len(patches.context), "num_targets": len(patches.targets)}
    ends = image * num_context, image * (num_patches - num_context)
    return patches, packed_layout(*ends, num_tokens, **sizes)


def make_inputs(kind: str, images: int, num_context: int, width: int, device: str) -> dict[str, Tensor]:
    """Return the inputs that require a gradient: a bfloat16 context, as under autocast, and float32 parameters."""
    inputs = {
        "context": random_leaf(num_context, width, device=device, dtype=torch.bfloat16),
        "mask_token": random_leaf(width, device=device),
    }
    if kind == "sequence":
        return inputs | {"action_tokens": random_leaf(images, NUM_ACTIONS, width, device=device)}
    for layer, inner in enumerate((width + NUM_ACTIONS, width, width), 1):
        inputs[f"w{layer}"] = random_leaf(width, inner, device=device, scale=width**-0.5)
        inputs[f"b{layer}"] = random_leaf(width, device=device, scale=width**-0.5)
    return inputs


def make_function(
    constants: Sequence[Tensor], rows: tuple[PatchIndex, PackedLayout], device: str, ops: Ops, *, exact: bool = False
) -> Function:
    """Return the operation as the predictor calls it, under autocast; with exact=True in float64 without autocast.

    The constants are positions and action, which get no gradient.
    """
    positions, action = (tensor.double() if exact else tensor for tensor in constants)

    def assemble(context: Tensor, mask_token: Tensor, *parameters: Tensor) -> Tensor:
        # A single parameter holds the action tokens. Otherwise they are weights and biases of the mixer.
        is_sequence = len(parameters) == 1
        tokens, mixer = (parameters[0], None) if is_sequence else (None, FeatureMixer(action, *parameters))
        with torch.autocast(device, torch.bfloat16, enabled=not exact):
            return ops.predictor_input(context, mask_token, positions, *rows, action_tokens=tokens, mixer=mixer)

    return assemble
