"""Run in a process without the interpreter: compile what is shipped, and start it as Triton would, without a GPU.

python compile_shipped.py figures 90 all      a JSON line per setting
python compile_shipped.py figures 90 sample   likewise, but of what the committed figures were made from, only a sample
python compile_shipped.py binaries            how many binaries each kernel has after calls of many sizes
"""

import json
import sys
from collections import Counter

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from benchmarks.harness import records, results
from iwm_fast.kernels.attention import op
from iwm_fast.kernels.attention.packed import Packed
from iwm_fast.kernels.launch import Launch, compilable
from iwm_fast.kernels.offline_compile import Compiled, compile_for, source_digest
from iwm_fast.kernels.ops import shipped_launches


class NoDriver:
    """Says that there is an H100, which is all that compiling asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


# of the settings whose source the committed figures were made from, one in so many is compiled all the same
SAMPLE_EVERY = 20


def figures(architecture: int, extent: str) -> None:
    """Print what the compiler made of each setting: now, or when the committed figures were made from the same source.

    Both are printed where both are known.
    """
    committed = {
        record.shape["launch"]: record.figures
        for record in records.read(results.OFFLINE)
        if record.what == "launch" and record.shape["arch"] == architecture
    }
    for number, (name, launch) in enumerate(shipped_launches(architecture).items()):
        kept = committed.get(name, {})
        is_current = kept.get("source") == source_digest(launch, architecture)
        found = {name: kept[name] for name in Compiled._fields} if is_current else None
        if found is None or extent == "all" or number % SAMPLE_EVERY == 0:
            compiled = compile_for(launch, architecture)._asdict()
            print(json.dumps({"name": name, "committed": found, **compiled}), flush=True)
        else:
            print(json.dumps({"name": name, "committed": found, **found}), flush=True)


def specialize(launch: Launch) -> None:
    """Let Triton choose or make the binary it would start."""
    given = {name: MockTensor(v.dtype) if isinstance(v, torch.Tensor) else v for name, v in launch.arguments.items()}
    launch.kernel.warmup(**given, **compilable(launch.constants), grid=launch.grid, **launch.options)


def binaries() -> None:
    driver.set_active(NoDriver())
    kernels, distinct = Counter(), set()
    for longest, images, heads in [(130, 1, 1), (131, 16, 12), (160, 17, 6), (192, 3, 16)]:
        qkv = torch.empty(longest * images, 3, heads, 32, dtype=torch.bfloat16, device="meta")
        packed = Packed(qkv, torch.empty(images + 1, dtype=torch.int32, device="meta"), longest)
        out, lse = qkv[:, 0], torch.empty(heads, len(qkv), device="meta")
        for launch in op.forward_launches(90, packed, out, lse):
            specialize(launch)
            distinct.add((launch.kernel.__name__, str(launch.constants)))
            kernels[launch.kernel.__name__] = sum(len(cache[0]) for cache in launch.kernel.device_caches.values())
    print(json.dumps({"binaries": sum(kernels.values()), "settings": len(distinct)}))


if __name__ == "__main__":
    figures(int(sys.argv[2]), sys.argv[3]) if sys.argv[1] == "figures" else binaries()
