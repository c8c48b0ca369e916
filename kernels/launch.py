"""How a kernel is started: a launch is data, so the same one can run on a GPU, be interpreted or be compiled offline.

Without a GPU, kernels run in Triton's interpreter (set `TRITON_INTERPRET=1` before `kernels` is first imported). It
takes CPU tensors and is exact in float64, float32 and float16. Its bfloat16 arithmetic is silently wrong, so
`upcast_for_interpreter` converts bfloat16 inputs to float32.
"""

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

# Triton reads TRITON_INTERPRET when `@triton.jit` decorates a function; setting it later changes nothing.
IS_INTERPRETING = bool(knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter; fixed when `kernels` is imported."""

# Tests of the gradients by finite differences need float64, which only the interpreter multiplies.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32) + ((torch.float64,) if IS_INTERPRETING else ())


def why_not_launchable() -> str:
    """Return what this machine lacks to start kernels on a GPU; empty if nothing.

    Triton compiles the code that starts a kernel with the machine's C compiler and Python's headers.
    """
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler: install gcc, or set CC to one"
    scheme = sysconfig.get_default_scheme()
    # As Triton does: Debian's own scheme is for what pip installs, and Python's headers are elsewhere.
    header = Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme), "Python.h")
    if not header.exists():
        return f"Triton needs {header}: install Python's headers (python3-dev)"
    return ""


class Launch(NamedTuple):
    """One start of one kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int | None]
    """Values that may change from call to call; None stands for an absent tensor.

    Kernels list their integers in `do_not_specialize`, because Triton otherwise compiles separate binaries for 1, for
    multiples of 16 and for all other values.
    """
    constants: dict[str, Any]
    """Values of the kernel's `tl.constexpr` parameters; each new combination is compiled."""
    num_warps: int
    num_stages: int = 1

    @classmethod
    def of(
        cls, kernel: Any, grid: tuple[int, ...], values: Iterable[Any], constants: dict[str, Any], *, num_warps: int
    ) -> "Launch":
        """Return a launch with these values of the kernel's parameters, in their order; constants come last there.

        Raises:
            ValueError: if the number of values is not that of the parameters before the constants.
        """
        names = kernel.arg_names[: len(kernel.arg_names) - len(constants)]
        return cls(kernel, grid, dict(zip(names, values, strict=True)), constants, num_warps)

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options, which Triton takes as further keyword arguments."""
        # enable_fp_fusion is stated because its default is about to change in Triton.
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Start the kernel on the device of its tensors; do nothing if the grid has no programs."""
        # CUDA refuses an empty grid.
        if 0 in self.grid:
            return
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        if device.type == "cpu":
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)
            return
        # Triton starts a kernel on the current device, even if its tensors are on another one.
        with torch.cuda.device(device):
            self.kernel[self.grid](**self.arguments, **as_constexpr(self.constants), **self.options)


def as_constexpr(constants: dict[str, Any]) -> dict[str, Any]:
    """Return the constants as Triton 3.6 accepts them: every entry of a (nested) tuple wrapped in `tl.constexpr`."""
    # Cached, because a launch is built in every call and wrapping takes longer than starting the kernel.
    return _wrap_constants(tuple(constants.items()))


@functools.cache
def _wrap_constants(constants: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return {name: _wrap(value) if isinstance(value, tuple) else value for name, value in constants}


def _wrap(value: Any) -> Any:
    return tuple(map(_wrap, value)) if isinstance(value, tuple) else tl.constexpr(value)


_library = torch.library.Library("iwm_fast", "FRAGMENT")


def register_op(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register an operation whose inside torch.compile does not trace, and return a function that calls it.

    A new number of rows then needs no new graph. In eager mode torch's dispatcher is left out: it would double the host
    time of a small operation, and so would `torch.library.custom_op`.

    Args:
        schema: name and types of the operation in torch's schema language.
        function: the implementation, without a gradient.
        fake: returns results of the same shapes and dtypes for tensors without memory.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"iwm_fast::{name}", fake, lib=_library)
    op = getattr(torch.ops.iwm_fast, name).default
    return lambda *arguments: op(*arguments) if torch.compiler.is_compiling() else function(*arguments)


def architecture(device: torch.device) -> int:
    """Return a GPU's compute capability times ten, which is 90 for an H100 or H200.

    The interpreter uses the launch configurations of sm_90, so the result is 90 there.

    Raises:
        RuntimeError: if `device` is not a GPU and kernels are not interpreted.
    """
    if IS_INTERPRETING:
        return 90
    if device.type != "cuda":
        raise RuntimeError(
            f"fused operations run on NVIDIA GPUs, got device {str(device)!r}; set runtime.ops=reference, "
            "or set TRITON_INTERPRET=1 in the environment to run them slowly in Triton's interpreter"
        )
    return _compute_capability(device.index)


@functools.cache
def _compute_capability(device_index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


def cache_folder() -> str:
    """Return the folder in which Triton stores compiled kernels; the variable TRITON_CACHE_DIR sets it."""
    return str(knobs.cache.dir)


def upcast_for_interpreter(tensor: Tensor) -> Tensor:
    """Return the tensor; in the interpreter, return a bfloat16 tensor as float32, so that torch rounds the results."""
    return tensor.float() if IS_INTERPRETING and tensor.dtype == torch.bfloat16 else tensor


def check_tensor(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that no kernel can read.

    Raises:
        TypeError: if the dtype is not bfloat16, float16 or float32 (or, in the interpreter, float64).
        ValueError: if the tensor is not contiguous, since kernels compute the addresses of its rows from its shape.
    """
    if tensor.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {names}, got {str(tensor.dtype).removeprefix('torch.')}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got shape {tuple(tensor.shape)} with strides {tensor.stride()}; "
            "pass tensor.contiguous()"
        )
