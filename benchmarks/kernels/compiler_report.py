"""What needs no GPU: what the compiler makes of every launch, tiles that fit badly, and floors.

Times here are what an H200 would need at least; nothing of this was run.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.harness import tables
from benchmarks.harness.records import BACKWARD, FORWARD, Record
from benchmarks.harness.rooflines import (
    H200_BYTES_PER_S,
    H200_FLOPS_PER_S,
    Cost,
    attention_costs,
    conditioning_costs,
    launches_waste,
    library_waste,
    norm_costs,
    programs_per_multiprocessor,
)
from benchmarks.kernels.conditioning import IMAGES, NUM_ACTIONS, NUM_CONTEXT, NUM_PATCHES, WIDTH
from benchmarks.kernels.recompilation import NEW_LENGTHS
from benchmarks.kernels.residual_norm import ROWS, WIDTHS
from iwm_fast.kernels import residual_norm
from iwm_fast.kernels.attention import op as ragged_attention
from iwm_fast.kernels.attention.packed import Packed
from iwm_fast.kernels.launch import IS_INTERPRETING, Launch
from iwm_fast.kernels.offline_compile import compile_for, source_digest
from iwm_fast.kernels.predictor_input import op as predictor_input

Machine = dict[str, Any]
ARCHITECTURES = (80, 90, 100)
WASTE_LENGTHS = (50, 64, 128, 196, 197, 212, 256, 320, 400)
MODULES = {"ragged_attention": ragged_attention, "predictor_input": predictor_input, "residual_norm": residual_norm}


def check_compilable() -> None:
    """Refuse to go on where kernels were decorated for the interpreter.

    Raises:
        RuntimeError: with the remedy.
    """
    if IS_INTERPRETING:
        raise RuntimeError(
            "offline figures need Triton's compiler, but TRITON_INTERPRET is set: kernels are functions of the "
            "interpreter; unset it (env -u TRITON_INTERPRET python -m benchmarks.kernels)"
        )


def measure(architectures: Sequence[int], machine: Machine) -> Iterator[Record]:
    """Yield every figure; compiling takes some minutes the first time.

    Raises:
        RuntimeError: under the interpreter.
    """
    check_compilable()
    for arch in architectures:
        for module, operation in MODULES.items():
            launches = operation.shipped_launches(arch)
            print(f"... sm_{arch}: {len(launches)} launches of {module}", file=sys.stderr, flush=True)
            for name, launch in launches.items():
                yield compiled_launch(arch, module, name, launch, machine)
        yield from tile_waste(arch, machine)
        yield from binaries(arch, machine)
    yield from floors(machine)


def compiled_launch(arch: int, module: str, name: str, launch: Launch, machine: Machine) -> Record:
    """Compile one launch."""
    found = compile_for(launch, arch)
    programs = programs_per_multiprocessor(found.registers, found.shared_bytes, launch.num_warps, arch)
    figures = found._asdict() | {"warps": launch.num_warps, "stages": launch.num_stages, "programs": programs}
    figures["source"] = source_digest(launch, arch)
    shape: dict[str, int | str] = {"arch": arch, "module": module, "launch": name}
    return Record(what="launch", provider="fused", shape=shape, figures=figures, machine=machine)


def tile_waste(arch: int, machine: Machine) -> Iterator[Record]:
    """Yield scores computed per score needed, by the launches of dense batches and by square tiles."""
    for head_dim in ragged_attention.HEAD_DIMS:
        for length in WASTE_LENGTHS:
            found = dense_launches(arch, length, head_dim)
            figures = {pass_: launches_waste(launches, length) for pass_, launches in found.items()}
            figures |= {f"{tile}x{tile}": library_waste(length, tile) for tile in (128, 192)}
            shape: dict[str, int | str] = {"arch": arch, "d": head_dim, "N": length}
            yield Record(what="tile waste", provider="fused", shape=shape, figures=figures, machine=machine)


def binaries(arch: int, machine: Machine) -> Iterator[Record]:
    """Yield how many kernels have to be compiled for dense batches of every length from 50 to 400."""
    for head_dim in ragged_attention.HEAD_DIMS:
        kernels = set()
        for length in NEW_LENGTHS:
            for launches in dense_launches(arch, length, head_dim).values():
                kernels |= {(launch.kernel, str(launch.constants), launch.num_warps) for launch in launches}
        shape: dict[str, int | str] = {"arch": arch, "d": head_dim, "N": f"{NEW_LENGTHS[0]}-{NEW_LENGTHS[-1]}"}
        figures = {"kernels": len(kernels)}
        yield Record(what="binaries", provider="fused", shape=shape, figures=figures, machine=machine)


def dense_launches(arch: int, length: int, head_dim: int) -> dict[str, list[Launch]]:
    """Return attention's launches for sequences of one length, on tensors without memory."""
    qkv = torch.empty(length, 3, 1, head_dim, dtype=torch.bfloat16, device="meta")
    packed, out, lse = Packed(qkv, None, length), qkv[:, 0], torch.empty(1, length, device="meta")
    return {
        FORWARD: ragged_attention.forward_launches(arch, packed, out, lse),
        BACKWARD: ragged_attention.backward_launches(arch, packed, out=out, lse=lse, d_out=out, d_qkv=qkv),
    }


def floors(machine: Machine) -> Iterator[Record]:
    """Yield what an H200 needs at least, per task and pass."""
    for head_dim in ragged_attention.HEAD_DIMS:
        for length in WASTE_LENGTHS:
            shape = {"N": length, "d": head_dim, "H": 12, "B": 1024}
            yield from _floors("attention", shape, attention_costs([length] * 1024, 12, head_dim), machine)
    context, tokens = IMAGES * NUM_CONTEXT, IMAGES * NUM_ACTIONS
    targets, shape = IMAGES * NUM_PATCHES - context, {"P": WIDTH, "B": IMAGES}
    costs = conditioning_costs((context, targets, 0), WIDTH, has_mixer=True)
    yield from _floors("feature conditioning", shape, costs, machine)
    costs = conditioning_costs((context, targets, tokens), WIDTH, has_mixer=False)
    yield from _floors("sequence conditioning", shape, costs, machine)
    for width in WIDTHS:
        yield from _floors("residual norm", {"D": width, "M": ROWS}, norm_costs(ROWS, width), machine)


def _floors(task: str, shape: dict[str, int], costs: dict[str, Cost], machine: Machine) -> Iterator[Record]:
    for pass_ in (FORWARD, BACKWARD):
        cost = costs[pass_]
        figures = {"bytes_ms": 1e3 * cost.bytes / H200_BYTES_PER_S, "flops_ms": 1e3 * cost.flops / H200_FLOPS_PER_S}
        yield Record(
            what="floor",
            provider="",
            shape={"task": task, **shape},
            pass_=pass_,
            bytes=cost.bytes,
            flops=cost.flops or None,
            figures=figures,
            machine=machine,
        )


def launch_table(records: Sequence[Record], arch: int, module: str) -> str:
    """Return a module's launches on an architecture."""
    names = [
        "registers",
        "spill_bytes",
        "shared_bytes",
        "fast_products",
        "matrix_products",
        "warps",
        "stages",
        "programs",
    ]
    rows = [
        [record.shape["launch"], *(record.figures[name] for name in names)]
        for record in records
        if record.what == "launch" and (record.shape["arch"], record.shape["module"]) == (arch, module)
    ]
    headings = ["launch", "registers", "spilled B", "shared B", "fast MMA", "all MMA", "warps", "stages", "programs/SM"]
    return tables.table(headings, rows)


def waste_table(records: Sequence[Record], arch: int) -> str:
    """Return scores computed per score needed."""
    names = [FORWARD, BACKWARD, "128x128", "192x192"]
    rows = [
        [record.shape["d"], record.shape["N"], *(f"{record.figures[name]:.2f}" for name in names)]
        for record in records
        if record.what == "tile waste" and record.shape["arch"] == arch
    ]
    return tables.table(["d", "N", *names], rows)


def binaries_line(records: Sequence[Record], arch: int) -> str:
    """Return how much is compiled for all lengths, in words."""
    found = [record for record in records if record.what == "binaries" and record.shape["arch"] == arch]
    parts = [f"{one.figures['kernels']} kernels for N={one.shape['N']} at d={one.shape['d']}" for one in found]
    return f"Compiled in all, forward and backward of dense batches: {', '.join(parts)}; a new length compiles nothing."


def floor_table(records: Sequence[Record]) -> str:
    """Return bytes, operations and the time that an H200 needs for each."""
    rows = []
    for record in records:
        if record.what == "floor":
            shape = {name: value for name, value in record.shape.items() if name != "task"}
            ms = [f"{record.figures[name]:.4f}" for name in ("bytes_ms", "flops_ms")]
            amounts = f"{(record.bytes or 0) / 1e9:.3f}", f"{(record.flops or 0) / 1e9:.1f}"
            rows.append([record.shape["task"], tables.describe(shape), record.pass_, *amounts, *ms])
    return tables.table(["task", "shape", "pass", "GB", "GFLOP", "bytes, ms", "FLOPs, ms"], rows)
