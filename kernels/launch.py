"""How a kernel is started: a launch is data, so that what runs on a GPU is what is interpreted and compiled offline.

Without a GPU there is Triton's interpreter (`TRITON_INTERPRET=1` before the first import of `kernels`): it takes CPU
tensors, is exact in float64, float32 and float16, and gets bfloat16 arithmetic silently wrong; see `interpretable`.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

IS_INTERPRETING = bool(knobs.runtime.interpret)
"""Whether kernels were decorated for the interpreter; decided when `kernels` is imported."""


class Launch(NamedTuple):
    """One start of one kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int | float | None]
    """What may change from call to call without compiling anew; None stands for an absent tensor."""
    constants: dict[str, Any]
    """What is compiled in."""
    num_warps: int
    num_stages: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """What Triton is told beside arguments and constants."""
        # said aloud, as Triton is about to change the default
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Start the kernel on its tensors' device; a grid without programs starts nothing."""
        if 0 in self.grid:
            return
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        if device.type == "cpu":
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)
            return
        # Triton starts kernels on the current device, wherever the tensors are
        with torch.cuda.device(device):
            self.kernel[self.grid](**self.arguments, **compilable(self.constants), **self.options)


def compilable(constants: dict[str, Any]) -> dict[str, Any]:
    """Return constants as Triton 3.6 takes them: the entries of a tuple are constants each, however deep."""
    # a launch is made for every call, and this takes longer than starting it
    return _compilable(tuple(constants.items()))


@functools.cache
def _compilable(constants: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return {name: _constant(value) if isinstance(value, tuple) else value for name, value in constants}


def _constant(value: Any) -> Any:
    return tuple(map(_constant, value)) if isinstance(value, tuple) else tl.constexpr(value)


def architecture(device: torch.device) -> int:
    """Return the compute capability of a device times ten (an H100 or H200: 90); the interpreter takes sm_90's place.

    Raises:
        RuntimeError: if `device` is no GPU and kernels are not interpreted.
    """
    if IS_INTERPRETING:
        return 90
    if device.type != "cuda":
        raise RuntimeError(
            f"fused operations run on NVIDIA GPUs, got device {str(device)!r}; set runtime.ops=reference, "
            "or TRITON_INTERPRET=1 in the environment to interpret them, slowly"
        )
    return _capability(device.index)


@functools.cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def cache_folder() -> str:
    """Return where compiled kernels are kept; TRITON_CACHE_DIR sets it."""
    return str(knobs.cache.dir)


def interpretable(tensor: Tensor) -> Tensor:
    """Return the tensor, under the interpreter with bfloat16 as float32: results are rounded by torch afterwards."""
    return tensor.float() if IS_INTERPRETING and tensor.dtype == torch.bfloat16 else tensor


def check_dtype(name: str, tensor: Tensor) -> None:
    """Refuse what no kernel is written for.

    Raises:
        TypeError: with the accepted dtypes.
    """
    # finite differences need float64, which only the interpreter multiplies
    accepted = (torch.bfloat16, torch.float16, torch.float32) + ((torch.float64,) if IS_INTERPRETING else ())
    if tensor.dtype not in accepted:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        raise TypeError(f"{name} must have one of the dtypes {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Refuse strided inputs: kernels read rows in place.

    Raises:
        ValueError: with strides and remedy.
    """
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got shape {tuple(tensor.shape)} with strides {tensor.stride()}; "
            "pass tensor.contiguous()"
        )


def power_of_two_tiles(width: int, smallest: int, most: int = 3) -> tuple[int, ...]:
    """Cover `width` by powers of two, the largest first; only the last may reach beyond.

    Triton's tiles have powers of two as sides. 384 columns are 256 + 128, 208 keys 128 + 64 + 16, not 512 and 256.

    Args:
        width: at least 1.
        smallest: no piece is smaller; a power of two.
        most: pieces at most; the last one is rounded up.
    """
    found: list[int] = []
    left = width
    while left > 0:
        piece = 1 << (left.bit_length() - 1)
        if piece < left and len(found) == most - 1:
            piece *= 2
        found.append(max(piece, smallest))
        left -= found[-1]
    return tuple(found)
