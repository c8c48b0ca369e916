"""The world model's whole training step, forward and backward: what faster operations are worth in their place."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.providers import Provider, compiled, leaf
from benchmarks.harness.records import BOTH
from benchmarks.harness.rooflines import Cost
from benchmarks.harness.session import Case, Session
from benchmarks.kernels.attention_baselines import SDPA, attend_dense, by
from benchmarks.kernels.conditioning import NUM_ACTIONS, split
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
_CHECKED = 8
"""Images for which the step is computed in float64 too."""


Wrap = Callable[[Any], Any]
Given = tuple[Tensor, Tensor, RaggedIndex, RaggedIndex]
"""What a step takes: the context's tokens, actions, context and targets."""


def run(session: Session) -> None:
    """Measure the paper's predictor: 18 blocks of width 384 with 12 heads."""
    config = PredictorConfig(dim=384, depth=QUICK_DEPTH if session.is_quick else DEPTH, num_heads=12)
    step(session, config, IMAGES)


def step(session: Session, config: PredictorConfig, images: int, grid: int = GRID) -> None:
    """Measure one predictor on a batch; half of the patches are context."""
    half = grid**2 // 2
    sizes = {"context": half, "targets": grid**2 - half, "dim": config.dim, "depth": config.depth, "B": images}
    counts = PatchCounts(context=np.array([half]), target=np.array([grid**2 - half]))
    run_config = RunConfig(model=ModelConfig(encoder=EncoderConfig(dim=ENCODER_DIM), predictor=config))
    # forward and backward are three times forward
    cost = Cost(0, 3 * images * round(predictor_flops(run_config, counts)))
    case = Case("predictor step", {**sizes, "heads": config.num_heads}, costs={BOTH: cost})
    if not session.has_time(case):
        return

    def take_part(name: str, ops: Ops, count: int, wrap: Wrap = lambda model: model, exact: bool = False) -> Provider:
        model, given = build(config, ops, grid).to(session.device), batch(count, grid, session.device)
        return provider(name, model, given, wrap, exact=exact)

    few = min(_CHECKED, images)
    fused, plain = take_part("fused", FUSED, few), take_part("plain", REFERENCE, few)
    exact = take_part("float64", REFERENCE, few, exact=True)
    names = ["predicted", "d_context", *(f"d_{name}" for name, _ in build(config, FUSED, grid).named_parameters())]
    is_able = session.check(case, names, fused=fused, plain=plain, exact=exact)
    dense = REFERENCE._replace(ragged_attention=attend_dense)
    providers = [take_part("eager", REFERENCE, images), take_part("compiled", REFERENCE, images, compiled)]
    providers.append(take_part("cuDNN, compiled", dense, images, lambda model: by(SDPA["cuDNN"], compiled(model))))
    if is_able:
        own = take_part("fused", FUSED, images), take_part("fused, compiled", FUSED, images, compiled)
        providers = [*own, *providers]
    session.measure(case, providers, [BOTH])


def build(config: PredictorConfig, ops: Ops, grid: int) -> Predictor:
    """Build a predictor on the CPU; the weights are the same for all operations."""
    predictor = Predictor(config, encoder_dim=ENCODER_DIM, grid=grid, num_actions=NUM_ACTIONS, ops=ops)
    generator = torch.Generator().manual_seed(0)
    initialize_(predictor, generator)
    if predictor.mixer is not None:
        predictor.mixer.initialize_(generator)
    return predictor


def batch(images: int, grid: int, device: str) -> Given:
    """Return the inputs of a step; the same for everybody."""
    torch.manual_seed(0)
    half = grid**2 // 2
    patches, _ = split(images, grid**2, half, 0, device)
    image = torch.arange(images + 1, dtype=torch.int32, device=device)
    context, target = (
        RaggedIndex(patch=row % grid**2, row=row, offsets=image * longest, longest=longest, total=len(row))
        for row, longest in ((patches.context, half), (patches.targets, grid**2 - half))
    )
    action = torch.randn(images, NUM_ACTIONS, device=device)
    return leaf(len(patches.context), ENCODER_DIM, device=device), action, context, target


def provider(
    name: str, model: Predictor, given: Given, wrap: Wrap = lambda model: model, *, exact: bool = False
) -> Provider:
    """Return a model's training step under autocast, with the gradients of the tokens and of every weight.

    Exact: in float64 on the same values; changes the model in place.
    """
    tokens, action, context, target = given
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
