"""Forward and backward of the complete predictor: how much faster operations speed up a training step."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.providers import Provider, compiled, random_leaf
from benchmarks.harness.records import BOTH
from benchmarks.harness.rooflines import Cost
from benchmarks.harness.session import Case, Session
from benchmarks.kernels.attention_baselines import SDPA, attend_dense, with_backend
from benchmarks.kernels.conditioning import NUM_ACTIONS, random_split
from iwm_fast.config.run import EncoderConfig, ModelConfig, PredictorConfig, RunConfig
from iwm_fast.kernels.ops import FUSED, REFERENCE, Ops
from iwm_fast.models.layers import initialize_
from iwm_fast.models.predictor import Predictor
from iwm_fast.monitoring.flops import PatchCounts, predictor_flops
from iwm_fast.pipelines.batch import RaggedIndex

GRID = 14
ENCODER_DIM = 768
DEPTH = 18
QUICK_DEPTH = 6
IMAGES = 256
_NUM_CHECKED = 8
"""Images for which the step is also computed in float64."""

Wrap = Callable[[Any], Any]
StepInputs = tuple[Tensor, Tensor, RaggedIndex, RaggedIndex]
"""Context tokens, actions, context and targets."""


def run(session: Session) -> None:
    """Measure the paper's predictor: 18 blocks of width 384 with 12 heads."""
    config = PredictorConfig(dim=384, depth=QUICK_DEPTH if session.quick else DEPTH, num_heads=12)
    measure_step(session, config, IMAGES)


def measure_step(session: Session, config: PredictorConfig, images: int, grid: int = GRID) -> None:
    """Measure one predictor on a batch; half of the patches are context."""
    half = grid**2 // 2
    sizes = {"context": half, "targets": grid**2 - half, "dim": config.dim, "depth": config.depth, "B": images}
    counts = PatchCounts(context=np.array([half]), target=np.array([grid**2 - half]))
    run_config = RunConfig(model=ModelConfig(encoder=EncoderConfig(dim=ENCODER_DIM), predictor=config))
    # Backward takes twice the operations of forward.
    cost = Cost(0, 3 * images * round(predictor_flops(run_config, counts)))
    case = Case("predictor step", {**sizes, "heads": config.num_heads}, costs={BOTH: cost})
    if not session.has_time(case):
        return

    def provide(name: str, ops: Ops, count: int, wrap: Wrap = lambda model: model, exact: bool = False) -> Provider:
        model, inputs = build(config, ops, grid).to(session.device), make_batch(count, grid, session.device)
        return step_provider(name, model, inputs, wrap, exact=exact)

    num_checked = min(_NUM_CHECKED, images)
    fused, plain = provide("fused", FUSED, num_checked), provide("plain", REFERENCE, num_checked)
    exact = provide("float64", REFERENCE, num_checked, exact=True)
    names = ["predicted", "d_context", *(f"d_{name}" for name, _ in build(config, FUSED, grid).named_parameters())]
    runs_fused = session.check(case, names, fused=fused, plain=plain, exact=exact)
    dense = REFERENCE._replace(ragged_attention=attend_dense)
    providers = [
        provide("eager", REFERENCE, images),
        provide("compiled", REFERENCE, images, compiled),
        provide("cuDNN, compiled", dense, images, lambda model: with_backend(SDPA["cuDNN"], compiled(model))),
    ]
    if runs_fused:
        compiled_fused = provide("fused, compiled", FUSED, images, compiled)
        providers = [provide("fused", FUSED, images), compiled_fused, *providers]
    session.measure(case, providers, [BOTH])


def build(config: PredictorConfig, ops: Ops, grid: int) -> Predictor:
    """Build a predictor on the CPU with the same weights for all operations."""
    predictor = Predictor(config, encoder_dim=ENCODER_DIM, grid=grid, num_actions=NUM_ACTIONS, ops=ops)
    generator = torch.Generator().manual_seed(0)
    initialize_(predictor, generator)
    if predictor.mixer is not None:
        predictor.mixer.initialize_(generator)
    return predictor


def make_batch(images: int, grid: int, device: str) -> StepInputs:
    """Return the inputs of a step, the same in each call."""
    torch.manual_seed(0)
    half = grid**2 // 2
    patches, _ = random_split(images, grid**2, half, 0, device)
    image = torch.arange(images + 1, dtype=torch.int32, device=device)
    context, target = (
        RaggedIndex(patch=row % grid**2, row=row, offsets=image * longest, longest=longest, total=len(row))
        for row, longest in ((patches.context, half), (patches.targets, grid**2 - half))
    )
    action = torch.randn(images, NUM_ACTIONS, device=device)
    return random_leaf(len(patches.context), ENCODER_DIM, device=device), action, context, target


def step_provider(
    name: str, model: Predictor, inputs: StepInputs, wrap: Wrap = lambda model: model, *, exact: bool = False
) -> Provider:
    """Return a model's training step under autocast, with the gradients of the context tokens and of all weights.

    With exact=True the step runs in float64 on the same values; this converts the model in place.
    """
    tokens, action, context, target = inputs
    torch.manual_seed(1)
    d_out = torch.randn(len(target.row), ENCODER_DIM, device=tokens.device)
    if exact:
        model, action, d_out = model.double(), action.double(), d_out.double()
        tokens = tokens.detach().double().requires_grad_()
    predict = wrap(model)

    def forward(context_tokens: Tensor, *_: Tensor) -> Tensor:
        with torch.autocast(context_tokens.device.type, torch.bfloat16, enabled=not exact):
            predicted = predict(context_tokens, action, context, target)
        return predicted if exact else predicted.float()

    return Provider(name, forward, (tokens, *model.parameters()), (d_out,))
