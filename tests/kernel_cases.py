"""What the tests of fused operations share: where they run, inputs, tolerances, awkward gradients."""

import torch
from torch import Tensor

# the same tests: interpreted on a CPU, compiled where there is a GPU
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest ||got - wanted|| / ||wanted|| against a float64 reference, by dtype of the operation."""

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [torch.float64])
"""What a fused operation is tested in; bfloat16 is not interpreted, float64 not compiled."""

AWKWARD_GRADIENTS = ("expanded", "transposed", "offset")


def offsets_of(lengths: list[int]) -> Tensor:
    """Return where each sequence begins."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Draw normal numbers that are exact in `dtype`, so that a float64 reference sees the same inputs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def values_and_gradients(function, inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Return a function's outputs, then the gradient of a random projection of them to every input."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outs = function(*inputs)
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    gradients = [draw(*out.shape, dtype=torch.float16, seed=seed + i).to(out.dtype) for i, out in enumerate(outs)]
    torch.autograd.backward(outs, gradients)
    return [out.detach() for out in outs] + [tensor.grad for tensor in inputs]


def error(got: Tensor, wanted: Tensor) -> float:
    """Return ||got - wanted|| / ||wanted|| in float64; NaN anywhere gives NaN, which passes no comparison."""
    got, wanted = got.detach(), wanted.detach()
    difference = (got.double() - wanted.double()).norm()
    return float(difference / wanted.double().norm().clamp(min=1e-30)) if wanted.numel() else 0.0


def awkward(kind: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return a gradient as autograd may hand it over: expanded (from a sum), transposed, or amid other memory."""
    if kind == "expanded":
        return torch.ones((), dtype=dtype, device=DEVICE).expand(shape)
    if kind == "transposed":
        return draw(*reversed(shape), dtype=dtype).permute(*reversed(range(len(shape))))
    flat = draw(1 + shape.numel(), dtype=dtype)
    return flat[1:].view(shape)
