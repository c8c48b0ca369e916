"""Compile a launch for a GPU that this machine need not have, and report registers, spills and instructions.

The figures come from the real compiler and assembler. They are not available in the interpreter, whose kernels are
plain Python functions.
"""

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from iwm_fast.kernels.launch import Launch, as_constexpr

MAX_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Largest shared memory of a program in bytes, by architecture; source: CUDA C++ Programming Guide."""
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""PTX name of the fastest tensor-core instruction of each architecture."""

_POINTER_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class CompilationReport(NamedTuple):
    """Resources and tensor-core instructions of a compiled kernel."""

    registers: int
    """Registers per thread."""
    spill_bytes: int
    """Bytes per thread that do not fit in registers and are kept in memory: stack and local memory."""
    shared_bytes: int
    """Bytes of shared memory per program."""
    fast_products: int
    """Number of instructions of the kind that `MATRIX_INSTRUCTION` names for the architecture."""
    matrix_products: int
    """Number of all tensor-core instructions: `fast_products` and the slower `mma.sync`."""


def source_digest(launch: Launch, architecture: int) -> str:
    """Return a digest of all that determines the compiled code: source, types, constants, options, Triton's version.

    The source is all device code of the kernel's file. Triton's own hash would also change with the line that it is on.
    """
    globals_of_kernel = launch.kernel.__globals__.values()
    source = [value.src for value in globals_of_kernel if isinstance(value, triton.JITFunction)]
    source += [str(value) for value in globals_of_kernel if isinstance(value, tl.constexpr)]
    ast = _ast_source(launch)
    inputs = (
        source,
        ast.name,
        ast.signature,
        ast.constants,
        ast.attrs,
        architecture,
        launch.options,
        triton.__version__,
    )
    return hashlib.sha256(str(inputs).encode()).hexdigest()[:16]


def compile_for(launch: Launch, architecture: int) -> CompilationReport:
    """Compile a launch for compute capability 8.0, 9.0 or 10.0, passed as 80, 90 or 100.

    Its tensors may be on the meta device, since only their dtypes are used.
    """
    target = GPUTarget("cuda", architecture, 32)
    compiled: Any = triton.compile(_ast_source(launch), target=target, options=launch.options)
    registers, spill_bytes = _resource_usage(compiled.asm["cubin"])
    num_fast = compiled.asm["ptx"].count(MATRIX_INSTRUCTION[architecture])
    # On sm_80 mma.sync is the fast instruction and is already counted.
    num_slow = 0 if architecture == 80 else compiled.asm["ptx"].count("mma.sync")
    return CompilationReport(registers, spill_bytes, compiled.metadata.shared, num_fast, num_fast + num_slow)


def _ast_source(launch: Launch) -> ASTSource:
    """Return what Triton's own launcher would compile for these arguments."""
    arguments = {name: value for name, value in launch.arguments.items() if value is not None}
    absent = {name: None for name, value in launch.arguments.items() if value is None}
    constants = as_constexpr(launch.constants) | absent
    names = launch.kernel.arg_names
    signature = {name: _type_of(arguments[name]) if name in arguments else "constexpr" for name in names}
    # PyTorch's allocator aligns tensors to 256 bytes, so pointers are declared divisible by 16. A view that is not
    # aligned would be compiled once more, with slower loads; that variant is not examined here.
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if signature[name].startswith("*")}
    return ASTSource(launch.kernel, signature, constants, aligned)


def _type_of(value: Tensor | int) -> str:
    return _POINTER_TYPES[value.dtype] if isinstance(value, Tensor) else "i32"


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Return registers and spilled bytes per thread, as NVIDIA's `cuobjdump` (part of Triton) reads them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]
