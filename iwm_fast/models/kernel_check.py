"""Before the first step of a fused run: do the kernels compute on this GPU what PyTorch computes?

A compiler or driver can break a kernel silently. Shapes, masks and precision are those of the run.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from iwm_fast.config.run import RunConfig
from iwm_fast.kernels.attention.sequences import Sequences
from iwm_fast.kernels.ops import FUSED, REFERENCE, Ops
from iwm_fast.kernels.predictor_input.layout import PackedLayout, PatchIndex, packed_layout
from iwm_fast.kernels.predictor_input.op import FeatureMixer
from iwm_fast.models.layers import NORM_EPS
from iwm_fast.models.student import compute_dtype
from iwm_fast.pipelines.sampling.masks import draw_masks, ragged_index

log = logging.getLogger(__name__)

NUM_IMAGES = 8
# Largest relative error of any result or gradient, by dtype of the products: several roundings of half precision, and
# far below the error of a wrong product, which is of order one.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4}
# Bias of the mixer's hidden units when gradients are compared, positive in one half and negative in the other. It is
# larger than what their inputs add, so that each unit is always on or always off: rounding turns units close to zero on
# or off, which changes gradients as much as a wrong kernel does.
_HIDDEN_BIAS = 8.0


class _Case(NamedTuple):
    """An operation with random inputs."""

    name: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    """(ops, *inputs) -> results."""
    inputs: list[Tensor]
    has_gradients: bool = True
    """Whether gradients of the inputs are compared, too."""


def check_kernels(config: RunConfig, device: torch.device) -> None:
    """Compare results and gradients of the fused operations with PyTorch's in float32.

    Raises:
        RuntimeError: naming the operation whose error is above the tolerance, and the remedy.
    """
    began = time.perf_counter()
    limit = tolerance(config)
    for name, error in kernel_errors(config, device):
        # Not `error > limit`, which would let a NaN pass.
        if not error <= limit:
            raise RuntimeError(
                f"the fused {name} differs from PyTorch's by relative errors of {error:.3g}, accepted is {limit:g}; "
                "set runtime.ops=reference and report this with the output of `iwm doctor`"
            )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    log.info("fused operations agree with PyTorch's (%.1f s)", time.perf_counter() - began)


def tolerance(config: RunConfig) -> float:
    """Return the largest relative error that is accepted in the run's precision."""
    return TOLERANCE[compute_dtype(config) or torch.float32]


def kernel_errors(config: RunConfig, device: torch.device, operation: str = "") -> Iterator[tuple[str, float]]:
    """Yield the name of each fused operation of the run, and the largest relative error of its results and gradients.

    `operation` limits them to one of attention, residual_norm and predictor_input.
    """
    dtype = compute_dtype(config) or torch.float32
    for case in _cases(config, device, dtype):
        if not case.name.startswith(operation):
            continue
        exact = [tensor.float() for tensor in case.inputs]
        with torch.autocast(device.type, enabled=False):
            expected = _results_and_gradients(case, REFERENCE, exact)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            actual = _results_and_gradients(case, FUSED, case.inputs)
        errors = [_relative_error(*pair) for pair in zip(actual, expected, strict=True)]
        yield case.name, max(errors, key=_nan_last)


def _cases(config: RunConfig, device: torch.device, dtype: torch.dtype) -> Iterator[_Case]:
    """Yield every operation of the run's networks in the shapes of its batches."""
    masks = draw_masks(config.mask, config.grid, config.seed, 0, np.arange(NUM_IMAGES))
    context, target = (ragged_index(mask, int(mask.sum())).to(device) for mask in (masks.context, masks.target))
    generator = torch.Generator(device).manual_seed(config.seed)

    def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    def attention_case(name: str, dim: int, num_heads: int, sequences: Sequences, rows: int) -> _Case:
        inputs = [draw(rows, 3, num_heads, dim // num_heads, dtype=dtype)]
        return _Case(f"attention of {name}", lambda ops, qkv: ops.ragged_attention(qkv, sequences), inputs)

    def norm_case(name: str, dim: int, rows: int) -> _Case:
        inputs = [draw(rows, dim, dtype=dtype), draw(rows, dim), 1 + draw(dim, scale=0.1), draw(dim)]
        return _Case(f"residual_norm of {name}", lambda ops, *tensors: ops.residual_norm(*tensors, NORM_EPS), inputs)

    encoder, predictor, num_patches = config.model.encoder, config.model.predictor, config.grid**2
    visible = Sequences.from_lengths(context.offsets, context.lengths)
    sizes = encoder.dim, encoder.num_heads
    yield attention_case("the encoder", *sizes, visible, len(context.row))
    yield attention_case("the teacher", *sizes, Sequences.of_equal_length(num_patches), NUM_IMAGES * num_patches)
    yield norm_case("the encoder", encoder.dim, len(context.row))
    if predictor.depth == 0:
        return
    num_actions, width = len(config.views.entries), predictor.dim
    num_tokens = num_actions if predictor.conditioning == "sequence" else 0
    layout = packed_layout(
        context.offsets, target.offsets, num_tokens, num_context=len(context.row), num_targets=len(target.row)
    )
    lengths = [sum(pair) + num_tokens for pair in zip(context.lengths, target.lengths, strict=True)]
    packed = Sequences.from_lengths(layout.offsets, lengths)
    yield attention_case("the predictor", width, predictor.num_heads, packed, sum(lengths))
    yield norm_case("the predictor", width, sum(lengths))
    positions, conditions = draw(num_patches, width), []
    if predictor.conditioning == "sequence":
        conditions = [draw(NUM_IMAGES, num_tokens, width)]
    if predictor.conditioning == "feature":
        conditions = [draw(NUM_IMAGES, num_actions)]
        for fan_in in (width + num_actions, width, width):
            conditions += [draw(width, fan_in, scale=fan_in**-0.5), draw(width)]
    inputs = [draw(len(context.row), width, dtype=dtype), draw(width), *conditions]
    yield from _predictor_input_cases(
        predictor.conditioning, inputs, positions, PatchIndex(context.row, target.row), layout
    )


def _predictor_input_cases(
    conditioning: str, inputs: list[Tensor], positions: Tensor, patches: PatchIndex, layout: PackedLayout
) -> Iterator[_Case]:
    """Yield one case for the predictor's input, or with feature conditioning two: of results and of gradients."""

    def assemble(ops: Ops, context_rows: Tensor, mask_token: Tensor, *conditions: Tensor) -> Tensor:
        named = {"action_tokens": conditions[0]} if conditioning == "sequence" else {}
        mixer = FeatureMixer(*conditions) if conditioning == "feature" else None
        return ops.predictor_input(context_rows, mask_token, positions, patches, layout, mixer=mixer, **named)

    if conditioning != "feature":
        yield _Case("predictor_input", assemble, inputs)
        return
    yield _Case("predictor_input", assemble, inputs, has_gradients=False)
    *others, w1, _, w2, _, w3, b3 = inputs
    bias = _HIDDEN_BIAS * (1 - 2 * (torch.arange(len(b3), device=b3.device) % 2)).float()
    # Units that are on have outputs of about the bias, which the next layer scales down.
    inputs = [*others, w1, bias, w2 / _HIDDEN_BIAS, bias, w3 / _HIDDEN_BIAS, b3]
    yield _Case("predictor_input with gradients", assemble, inputs)


def _results_and_gradients(case: _Case, ops: Ops, inputs: list[Tensor]) -> list[Tensor]:
    """Return the results and, if the case has gradients, that of each input for a fixed gradient of the results."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    results = case.function(ops, *inputs)
    results = [results] if isinstance(results, Tensor) else list(results)
    if not case.has_gradients:
        return [out.detach() for out in results]
    # Random, so that sums over rows do not cancel: that would leave little but rounding errors in gradients of biases.
    generator = torch.Generator(results[0].device).manual_seed(0)
    gradients = [torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype) for out in results]
    return [out.detach() for out in results] + list(torch.autograd.grad(results, inputs, gradients))


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def _nan_last(error: float) -> tuple[bool, float]:
    return math.isnan(error), error
