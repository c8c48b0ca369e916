"""The predictor's input, assembled and conditioned: by features (the mixer) and by sequence (action tokens)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.harness.providers import Function, Provider, compiled, leaf
from benchmarks.harness.rooflines import conditioning_costs
from benchmarks.harness.session import Case, Session
from iwm_fast.kernels.ops import FUSED, REFERENCE, Ops
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
    shape: dict[str, int | str] = {"context": half, "targets": num_patches - half, "P": width, "B": images}
    case = Case(f"{kind} conditioning", shape, costs=costs)
    if not session.has_time(case):
        return
    patches, places = split(images, num_patches, half, num_tokens, session.device)
    make = feature_inputs if kind == "feature" else sequence_inputs
    names, inputs = make(patches, images, width, session.device)
    positions = torch.randn(num_patches, width, device=session.device)
    action = torch.randn(images, NUM_ACTIONS, device=session.device)

    def assemble(ops: Ops, exact: bool = False) -> Function:
        return assembled(ops, (positions, action), (patches, places), session.device, exact=exact)

    packed_rows = len(patches.context) + len(patches.targets) + len(places.action_tokens)
    d_packed = torch.randn(packed_rows, width, device=session.device)
    fused = Provider("fused", assemble(FUSED), inputs, (d_packed,))
    eager = fused._replace(name="eager", function=assemble(REFERENCE))
    exact = fused.in_double(assemble(REFERENCE, exact=True))
    providers = [fused, eager, eager._replace(name="compiled", function=compiled(eager.function))]
    parts = {"fused": fused, "plain": eager, "exact": exact}
    is_able = session.check(case, parts, ("packed", *names))
    session.measure(case, providers if is_able else providers[1:])


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


def feature_inputs(
    patches: PatchIndex, images: int, width: int, device: str
) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    """Return names and tensors: context as autocast leaves it, mask token and the mixer's weights in float32."""
    weights = [(width, width + NUM_ACTIONS), (width,), (width, width), (width,), (width, width), (width,)]
    layers = [leaf(*shape, device=device, scale=width**-0.5) for shape in weights]
    names = "d_context", "d_mask_token", "d_w1", "d_b1", "d_w2", "d_b2", "d_w3", "d_b3"
    return names, (*_rows(patches, width, device), *layers)


def sequence_inputs(
    patches: PatchIndex, images: int, width: int, device: str
) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    """Return names and tensors: context as autocast leaves it, mask token and action tokens in float32."""
    tokens = leaf(images, NUM_ACTIONS, width, device=device)
    return ("d_context", "d_mask_token", "d_action_tokens"), (*_rows(patches, width, device), tokens)


def _rows(patches: PatchIndex, width: int, device: str) -> tuple[Tensor, Tensor]:
    return leaf(len(patches.context), width, device=device, dtype=torch.bfloat16), leaf(width, device=device)


def assembled(
    ops: Ops, given: Sequence[Tensor], rows: tuple[PatchIndex, PackedLayout], device: str, *, exact: bool
) -> Function:
    """Return the operation as the predictor calls it, under autocast; exact: in float64 without."""
    positions, action = (tensor.double() if exact else tensor for tensor in given)

    def assemble(context: Tensor, mask_token: Tensor, *others: Tensor) -> Tensor:
        layers, tokens = ((), others[0]) if len(others) == 1 else (others, None)
        with torch.autocast(device, torch.bfloat16, enabled=not exact):
            return ops.predictor_input(
                context,
                mask_token,
                positions,
                *rows,
                action_tokens=tokens,
                mixer=Mixer(action, *layers) if layers else None,
            )

    return assemble
