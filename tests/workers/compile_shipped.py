"""Compile the shipped launches without a GPU, in a process without the interpreter.

python compile_shipped.py figures 90 all      print a JSON line per launch configuration
python compile_shipped.py figures 90 sample   the same; launches with current committed figures are only sampled
python compile_shipped.py binaries            count the binaries that Triton compiles for calls of many sizes
python compile_shipped.py digest              print the digest of a launch, and that of the same kernel further down
"""

import json
import sys
from collections import Counter

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from benchmarks.harness import results
from benchmarks.kernels.compiler_report import MODULES
from iwm_fast.kernels.attention import op
from iwm_fast.kernels.attention.sequences import Sequences
from iwm_fast.kernels.launch import Launch, as_constexpr
from iwm_fast.kernels.offline_compile import CompilationReport, compile_for, source_digest


def shipped_launches(architecture: int) -> dict[str, Launch]:
    """Return all launches of an architecture by name."""
    return {name: each for module in MODULES.values() for name, each in module.shipped_launches(architecture).items()}


class NoDriver:
    """A driver for an H100 that is not there: Triton asks it for nothing else when it only compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


# One in this many launches is compiled although its committed figures are current.
SAMPLE_EVERY = 20


def figures(architecture: int, extent: str) -> None:
    """Print, for each launch, the committed figures if they are of the same source, and those of the compiler.

    A launch that is not compiled is printed with its committed figures for both.
    """
    committed = {
        record.shape["launch"]: record.figures
        for record in results.read(results.offline(triton.__version__).stem)
        if record.what == "launch" and record.shape["arch"] == architecture
    }
    for number, (name, launch) in enumerate(shipped_launches(architecture).items()):
        figures_of_launch = committed.get(name, {})
        is_current = figures_of_launch.get("source") == source_digest(launch, architecture)
        current = {field: figures_of_launch[field] for field in CompilationReport._fields} if is_current else None
        if current is None or extent == "all" or number % SAMPLE_EVERY == 0:
            compiled = compile_for(launch, architecture)._asdict()
            print(json.dumps({"name": name, "committed": current, **compiled}), flush=True)
        else:
            print(json.dumps({"name": name, "committed": current, **current}), flush=True)


def specialize(launch: Launch) -> None:
    """Let Triton compile the binary that the launch needs, unless it already has it."""
    arguments = {
        name: MockTensor(value.dtype) if isinstance(value, torch.Tensor) else value
        for name, value in launch.arguments.items()
    }
    launch.kernel.warmup(**arguments, **as_constexpr(launch.constants), grid=launch.grid, **launch.options)


def binaries() -> None:
    """Print how many binaries Triton compiled for calls of many sizes, and how many it should need."""
    driver.set_active(NoDriver())
    binaries_by_kernel, settings = Counter(), set()
    for longest, num_sequences, num_heads in [(130, 1, 1), (131, 16, 12), (160, 17, 6), (192, 3, 16)]:
        qkv = torch.empty(longest * num_sequences, 3, num_heads, 32, dtype=torch.bfloat16, device="meta")
        sequences = Sequences(torch.empty(num_sequences + 1, dtype=torch.int32, device="meta"), 1, longest)
        out, lse = qkv[:, 0], torch.empty(num_heads, len(qkv), device="meta")
        for launch in op.forward_launches(90, qkv, sequences, out, lse):
            specialize(launch)
            settings.add((launch.kernel.__name__, str(launch.constants)))
            num_binaries = sum(len(cache[0]) for cache in launch.kernel.device_caches.values())
            binaries_by_kernel[launch.kernel.__name__] = num_binaries
    print(json.dumps({"binaries": sum(binaries_by_kernel.values()), "settings": len(settings)}))


def digest() -> None:
    """Print the digests of a launch before and after its kernel moves to another line, and with another constant."""
    launch = next(iter(shipped_launches(90).values()))
    digests = [source_digest(launch, 90)]
    launch.kernel.starting_line_number += 1
    launch.kernel.hash = None
    constants = launch.constants | {"SCALE": 1.0}
    digests += [source_digest(launch, 90), source_digest(launch._replace(constants=constants), 90)]
    print(json.dumps({"digests": digests}))


if __name__ == "__main__":
    if sys.argv[1] == "figures":
        figures(int(sys.argv[2]), sys.argv[3])
    else:
        {"binaries": binaries, "digest": digest}[sys.argv[1]]()
