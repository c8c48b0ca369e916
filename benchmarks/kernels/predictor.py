"""The world model's whole training step, forward and backward: what faster operations are worth in their place."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from benchmarks.harness.providers import Function, Provider, compiled, leaf
from benchmarks.harness.records import BOTH
from benchmarks.harness.rooflines import Cost, predictor_flops
from benchmarks.harness.session import Case, Session
from benchmarks.kernels import attention_baselines
from benchmarks.kernels.conditioning import NUM_ACTIONS, split
from iwm_fast.config.run import PredictorConfig
from iwm_fast.kernels.ops import FUSED, REFERENCE, Ops
from iwm_fast.models.layers import initialize_
from iwm_fast.models.predictor import Predictor
from iwm_fast.pipelines.batch import RaggedIndex

GRID = 14
ENCODER_DIM = 768
DEPTH = 18
QUICK_DEPTH = 6
IMAGES = 256
_CHECKED = 8
"""Images for which the step is computed in float64 too."""


class _Given(NamedTuple):
    """What a step takes beside the context's tokens."""

    action: Tensor
    context: RaggedIndex
    target: RaggedIndex


def run(session: Session) -> None:
    """Measure the paper's predictor: 18 blocks of width 384 with 12 heads."""
    config = PredictorConfig(dim=384, depth=QUICK_DEPTH if session.is_quick else DEPTH, num_heads=12)
    step(session, config, IMAGES)


def step(session: Session, config: PredictorConfig, images: int, grid: int = GRID) -> None:
    """Measure one predictor on a batch; half of the patches are context."""
    half = grid**2 // 2
    sizes = {"context": half, "targets": grid**2 - half, "dim": config.dim, "depth": config.depth, "B": images}
    flops = predictor_flops(sizes | {"encoder_dim": ENCODER_DIM})
    case = Case("predictor step", {**sizes, "heads": config.num_heads}, costs={BOTH: Cost(0, flops)})
    if not session.has_time(case):
        return

    def take_part(name: str, ops: Ops, count: int, wrap: Callable[[Any], Any] = lambda model: model) -> Provider:
        return provider(name, build(config, ops, grid).to(session.device), batch(count, grid, session.device), wrap)

    few = min(_CHECKED, images)
    fused, plain = take_part("fused", FUSED, few), take_part("plain", REFERENCE, few)
    exact = exact_provider(build(config, REFERENCE, grid).to(session.device), batch(few, grid, session.device), plain)
    names = ["predicted", "d_context", *(f"d_{name}" for name, _ in build(config, FUSED, grid).named_parameters())]
    plans = {
        "fused": (FUSED, lambda model: model),
        "fused, compiled": (FUSED, compiled),
        "eager": (REFERENCE, lambda model: model),
        "compiled": (REFERENCE, compiled),
        "cuDNN, compiled": (REFERENCE._replace(ragged_attention=attention_baselines.attend_by_default), _with_cudnn),
    }
    is_able = session.check(case, {"fused": fused, "plain": plain, "exact": exact}, names)
    left_out = set() if is_able else {"fused", "fused, compiled"}
    taking_part = {name: plan for name, plan in plans.items() if name not in left_out}
    session.measure(case, [take_part(name, plan[0], images, plan[1]) for name, plan in taking_part.items()], [BOTH])


def build(config: PredictorConfig, ops: Ops, grid: int) -> Predictor:
    """Build a predictor on the CPU; the weights are the same for all operations."""
    predictor = Predictor(config, encoder_dim=ENCODER_DIM, grid=grid, num_actions=NUM_ACTIONS, ops=ops)
    generator = torch.Generator().manual_seed(0)
    initialize_(predictor, generator)
    if predictor.mixer is not None:
        predictor.mixer.initialize_(generator)
    return predictor


def batch(images: int, grid: int, device: str) -> tuple[Tensor, _Given]:
    """Return context tokens and what goes with them; the same for everybody."""
    torch.manual_seed(0)
    half = grid**2 // 2
    patches, _ = split(images, grid**2, half, 0, device)
    image = torch.arange(images + 1, dtype=torch.int32, device=device)
    context, target = (
        RaggedIndex(patch=row % grid**2, row=row, offsets=image * longest, longest=longest, total=len(row))
        for row, longest in ((patches.context, half), (patches.targets, grid**2 - half))
    )
    action = torch.randn(images, NUM_ACTIONS, device=device)
    tokens = leaf(len(patches.context), ENCODER_DIM, device=device)
    return tokens, _Given(action, context, target)


def provider(
    name: str, model: Predictor, given: tuple[Tensor, _Given], wrap: Callable[[Any], Any] = lambda model: model
) -> Provider:
    """Return a model's training step under autocast, with the gradients of the tokens and of every weight."""
    tokens, others = given
    predict = wrap(model)

    def forward(context_tokens: Tensor, *_: Tensor) -> Tensor:
        with torch.autocast(context_tokens.device.type, torch.bfloat16):
            return predict(context_tokens, *others).float()

    torch.manual_seed(1)
    d_out = torch.randn(len(others.target.row), ENCODER_DIM, device=tokens.device)
    return Provider(name, forward, (tokens, *model.parameters()), (d_out,))


def exact_provider(model: Predictor, given: tuple[Tensor, _Given], plain: Provider) -> Provider:
    """Return the step in float64, on the values that `plain` has."""
    model, others = model.double(), given[1]._replace(action=given[1].action.double())

    def forward(context_tokens: Tensor, *_: Tensor) -> Tensor:
        return model(context_tokens, *others)

    tokens = plain.inputs[0].detach().double().requires_grad_()
    return Provider("float64", forward, (tokens, *model.parameters()), (plain.d_outputs[0].double(),))


def _with_cudnn(model: Predictor) -> Function:
    """Compile, with cuDNN as the only attention that PyTorch may choose."""
    predict = compiled(model)

    def forward(*inputs: Any) -> Tensor:
        with sdpa_kernel(attention_baselines.SDPA["cuDNN"]):
            return predict(*inputs)

    return forward
