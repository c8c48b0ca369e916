"""The predictor's input, assembled and conditioned: by features (the mixer) and by sequence (action tokens)."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.providers import Function, leaf
from benchmarks.harness.rooflines import conditioning_costs
from benchmarks.harness.session import Case, Session
from iwm_fast.kernels.ops import Ops
from iwm_fast.kernels.predictor_input.layout import PackedLayout, PatchIndex, packed_layout
from iwm_fast.kernels.predictor_input.op import Mixer
from iwm_fast.pipelines.config import ViewConfig

WIDTH = 384
NUM_PATCHES = 196
NUM_CONTEXT = 98
IMAGES = 256
NUM_ACTIONS = len(ViewConfig().entries)


def run(session: Session) -> None:
    """Measure both kinds of conditioning."""
    for images in (IMAGES,) if session.is_quick else (IMAGES, 4 * IMAGES):
        for kind in ("feature", "sequence"):
            conditioning(session, kind, images)


def conditioning(session: Session, kind: str, images: int, width: int = WIDTH, num_patches: int = NUM_PATCHES) -> None:
    """Measure one kind; half of the patches are context, the others targets."""
    half = num_patches // 2
    num_tokens = NUM_ACTIONS if kind == "sequence" else 0
    rows = images * half, images * (num_patches - half), images * num_tokens
    costs = conditioning_costs(rows, width, has_mixer=kind == "feature")
    shape = {"context": half, "targets": num_patches - half, "P": width, "B": images}
    case = Case(f"{kind} conditioning", shape, costs=costs)
    if not session.has_time(case):
        return
    patches, places = split(images, num_patches, half, num_tokens, session.device)
    inputs = kind_inputs(kind, images, len(patches.context), width, session.device)
    positions = torch.randn(num_patches, width, device=session.device)
    action = torch.randn(images, NUM_ACTIONS, device=session.device)

    operation = partial(assembled, (positions, action), (patches, places), session.device)
    session.compare_ops(case, operation, inputs, {"packed": torch.randn(sum(rows), width, device=session.device)})


def split(
    images: int, num_patches: int, num_context: int, num_tokens: int, device: str
) -> tuple[PatchIndex, PackedLayout]:
    """Draw which patches of each image are context, and where rows go."""
    order = torch.rand(images, num_patches).argsort(1) + num_patches * torch.arange(images)[:, None]
    context, targets = order[:, :num_context].sort(1)[0], order[:, num_context:].sort(1)[0]
    patches = PatchIndex(context.flatten().to(device), targets.flatten().to(device))
    image = torch.arange(images + 1, dtype=torch.int32, device=device)
    sizes = {"num_context": len(patches.context), "num_targets": len(patches.targets)}
    ends = image * num_context, image * (num_patches - num_context)
    return patches, packed_layout(*ends, num_tokens, **sizes)


def kind_inputs(kind: str, images: int, num_context: int, width: int, device: str) -> dict[str, Tensor]:
    """Return what wants a gradient: context as autocast leaves it; mask token, mixer or action tokens in float32."""
    inputs = {
        "context": leaf(num_context, width, device=device, dtype=torch.bfloat16),
        "mask_token": leaf(width, device=device),
    }
    if kind == "sequence":
        return inputs | {"action_tokens": leaf(images, NUM_ACTIONS, width, device=device)}
    for layer, inner in enumerate((width + NUM_ACTIONS, width, width), 1):
        inputs[f"w{layer}"] = leaf(width, inner, device=device, scale=width**-0.5)
        inputs[f"b{layer}"] = leaf(width, device=device, scale=width**-0.5)
    return inputs


def assembled(
    given: Sequence[Tensor], rows: tuple[PatchIndex, PackedLayout], device: str, ops: Ops, *, exact: bool = False
) -> Function:
    """Return the operation as the predictor calls it, under autocast; exact: in float64 without."""
    positions, action = (tensor.double() if exact else tensor for tensor in given)

    def assemble(context: Tensor, mask_token: Tensor, *others: Tensor) -> Tensor:
        # action tokens, or the mixer's weights
        how = {"action_tokens": others[0]} if len(others) == 1 else {"mixer": Mixer(action, *others)}
        how = {"action_tokens": None, "mixer": None} | how
        with torch.autocast(device, torch.bfloat16, enabled=not exact):
            return ops.predictor_input(context, mask_token, positions, *rows, **how)

    return assemble
