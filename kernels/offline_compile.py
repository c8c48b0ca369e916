"""Compile a launch for a GPU that is not there: registers, spills, shared memory and matrix instructions are real.

Not under the interpreter; its functions have no compiler behind them.
"""

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from iwm_fast.kernels.launch import Launch, compilable

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory a program may have, by architecture."""
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""The fast matrix product of each architecture, in PTX."""

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Compiled(NamedTuple):
    """What the compiler made of a launch."""

    registers: int
    """Per thread."""
    spill_bytes: int
    """Per thread; local memory included."""
    shared_bytes: int
    """Per program."""
    fast_products: int
    """Instructions of `MATRIX_INSTRUCTION`."""
    matrix_products: int
    """Those and `mma.sync`."""


def source_digest(launch: Launch, architecture: int) -> str:
    """Return a short name of all that the compiler is given: code, types, constants, options, and its own version."""
    parts = (_source(launch).hash(), architecture, sorted(launch.options.items()), triton.__version__)
    return hashlib.sha256(str(parts).encode()).hexdigest()[:16]


def compile_for(launch: Launch, architecture: int) -> Compiled:
    """Compile for an architecture (80, 90, 100); tensors give dtypes only and may be on the meta device."""
    compiled: Any = triton.compile(_source(launch), target=GPUTarget("cuda", architecture, 32), options=launch.options)
    registers, spilled = _resources(compiled.asm["cubin"])
    fast = compiled.asm["ptx"].count(MATRIX_INSTRUCTION[architecture])
    other = 0 if architecture == 80 else compiled.asm["ptx"].count("mma.sync")
    return Compiled(registers, spilled, compiled.metadata.shared, fast, fast + other)


def _source(launch: Launch) -> ASTSource:
    arguments = {name: value for name, value in launch.arguments.items() if value is not None}
    absent = {name: None for name, value in launch.arguments.items() if value is None}
    constants = compilable(launch.constants) | absent
    names = launch.kernel.arg_names
    signature = {name: _type(arguments[name]) if name in arguments else "constexpr" for name in names}
    # allocators align to 256 bytes; an offset tensor costs one more compilation, which is not what is examined here
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if signature[name].startswith("*")}
    return ASTSource(launch.kernel, signature, constants, aligned)


def _type(value: Tensor | int | float | None) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]
