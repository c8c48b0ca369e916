"""Run in a process without the interpreter: compile what is shipped, and start it as Triton would, without a GPU.

python compile_shipped.py figures 90      a JSON line per setting
python compile_shipped.py binaries        how many binaries each kernel has after calls of many sizes
"""

import json
import sys
from collections import Counter

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from kernels import ragged_attention
from kernels.launch import Launch, compilable
from kernels.offline import compile_for
from kernels.ops import shipped_launches
from kernels.packed_rows import Packed


class NoDriver:
    """Says that there is an H100, which is all that compiling asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def figures(architecture: int) -> None:
    for name, launch in shipped_launches(architecture).items():
        print(json.dumps({"name": name, **compile_for(launch, architecture)._asdict()}), flush=True)


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
        for launch in ragged_attention.forward_launches(90, packed, out, lse):
            specialize(launch)
            distinct.add((launch.kernel.__name__, str(launch.constants)))
            kernels[launch.kernel.__name__] = sum(len(cache[0]) for cache in launch.kernel.device_caches.values())
    print(json.dumps({"binaries": sum(kernels.values()), "settings": len(distinct)}))


if __name__ == "__main__":
    figures(int(sys.argv[2])) if sys.argv[1] == "figures" else binaries()
