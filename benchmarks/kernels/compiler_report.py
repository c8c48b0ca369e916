"""What needs no GPU: what the compiler makes of every launch, tiles that fit badly, and floors.

Times here are what an H200 would need at least; nothing of this was run.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import rooflines, tables
from benchmarks.harness.records import BACKWARD, FORWARD, Record
from benchmarks.harness.rooflines import Cost
from benchmarks.harness.session import Case, Session
from benchmarks.harness.tables import Column, describe, figure, record_table, shape
from benchmarks.kernels.conditioning import IMAGES, NUM_ACTIONS, NUM_CONTEXT, NUM_PATCHES, WIDTH
from benchmarks.kernels.recompilation import NEW_LENGTHS
from benchmarks.kernels.residual_norm import ROWS, WIDTHS
from iwm_fast.kernels import residual_norm
from iwm_fast.kernels.attention import op as ragged_attention
from iwm_fast.kernels.attention.packed import Packed
from iwm_fast.kernels.launch import IS_INTERPRETING, Launch
from iwm_fast.kernels.offline_compile import compile_for, source_digest
from iwm_fast.kernels.predictor_input import op as predictor_input

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


def measure(session: Session, architectures: Sequence[int]) -> None:
    """Record every figure; compiling takes some minutes the first time.

    Raises:
        RuntimeError: under the interpreter.
    """
    check_compilable()
    for arch in architectures:
        for module, operation in MODULES.items():
            launches = operation.shipped_launches(arch)
            print(f"... sm_{arch}: {len(launches)} launches of {module}", file=sys.stderr, flush=True)
            for name, launch in launches.items():
                session.note(
                    _case("launch", arch=arch, module=module, launch=name), "fused", figures=figures(launch, arch)
                )
        for head_dim in ragged_attention.HEAD_DIMS:
            tile_waste(session, arch, head_dim)
        for head_dim in ragged_attention.HEAD_DIMS:
            count_kernels(session, arch, head_dim)
    floors(session)


def _case(what: str, **shape: int | str) -> Case:
    return Case(what, shape, dtype="")


def figures(launch: Launch, arch: int) -> dict[str, Any]:
    """Return what comes of compiling a launch."""
    found = compile_for(launch, arch)
    programs = rooflines.programs_per_multiprocessor(found.registers, found.shared_bytes, launch.num_warps, arch)
    counts = {"warps": launch.num_warps, "stages": launch.num_stages, "programs": programs}
    return found._asdict() | counts | {"source": source_digest(launch, arch)}


def tile_waste(session: Session, arch: int, head_dim: int) -> None:
    """Record scores computed per score needed, by the launches of dense batches and by square tiles."""
    for length in WASTE_LENGTHS:
        found = dense_launches(arch, length, head_dim)
        waste = {pass_: rooflines.launches_waste(launches, length) for pass_, launches in found.items()}
        waste |= {f"{tile}x{tile}": rooflines.library_waste(length, tile) for tile in (128, 192)}
        session.note(_case("tile waste", arch=arch, d=head_dim, N=length), "fused", figures=waste)


def count_kernels(session: Session, arch: int, head_dim: int) -> None:
    """Record how many kernels have to be compiled for dense batches of every length from 50 to 400."""
    kernels = {
        (launch.kernel, str(launch.constants), launch.num_warps)
        for length in NEW_LENGTHS
        for launches in dense_launches(arch, length, head_dim).values()
        for launch in launches
    }
    case = _case("binaries", arch=arch, d=head_dim, N=f"{NEW_LENGTHS[0]}-{NEW_LENGTHS[-1]}")
    session.note(case, "fused", figures={"kernels": len(kernels)})


def dense_launches(arch: int, length: int, head_dim: int) -> dict[str, list[Launch]]:
    """Return attention's launches for sequences of one length, on tensors without memory."""
    qkv = torch.empty(length, 3, 1, head_dim, dtype=torch.bfloat16, device="meta")
    packed, out, lse = Packed(qkv, None, length), qkv[:, 0], torch.empty(1, length, device="meta")
    return {
        FORWARD: ragged_attention.forward_launches(arch, packed, out, lse),
        BACKWARD: ragged_attention.backward_launches(arch, packed, out=out, lse=lse, d_out=out, d_qkv=qkv),
    }


def floors(session: Session) -> None:
    """Record what an H200 needs at least, per task and pass."""
    for head_dim in ragged_attention.HEAD_DIMS:
        for length in WASTE_LENGTHS:
            case = _case("floor", task="attention", N=length, d=head_dim, H=12, B=1024)
            _floors(session, case, rooflines.attention_costs([length] * 1024, 12, head_dim))
    context, tokens = IMAGES * NUM_CONTEXT, IMAGES * NUM_ACTIONS
    targets = IMAGES * NUM_PATCHES - context
    for task, num_tokens, has_mixer in (("feature", 0, True), ("sequence", tokens, False)):
        costs = rooflines.conditioning_costs((context, targets, num_tokens), WIDTH, has_mixer=has_mixer)
        _floors(session, _case("floor", task=f"{task} conditioning", P=WIDTH, B=IMAGES), costs)
    for width in WIDTHS:
        _floors(session, _case("floor", task="residual norm", D=width, M=ROWS), rooflines.norm_costs(ROWS, width))


def _floors(session: Session, case: Case, costs: dict[str, Cost]) -> None:
    for pass_ in (FORWARD, BACKWARD):
        num_bytes, flops = costs[pass_]
        bytes_ms, flops_ms = 1e3 * num_bytes / rooflines.H200_BYTES_PER_S, 1e3 * flops / rooflines.H200_FLOPS_PER_S
        floors_ms = {"bytes_ms": bytes_ms, "flops_ms": flops_ms}
        session.note(case, "", pass_, bytes=num_bytes, flops=flops or None, figures=floors_ms)


_LAUNCH = {
    "launch": shape("launch"),
    "registers": figure("registers"),
    "spilled B": figure("spill_bytes"),
    "shared B": figure("shared_bytes"),
    "fast MMA": figure("fast_products"),
    "all MMA": figure("matrix_products"),
    "warps": figure("warps"),
    "stages": figure("stages"),
    "programs/SM": figure("programs"),
}
_WASTE = {name: shape(name) for name in ("d", "N")} | {
    name: figure(name, ".2f") for name in (FORWARD, BACKWARD, "128x128", "192x192")
}
_FLOOR: dict[str, Column] = {
    "task": shape("task"),
    "shape": lambda record: describe({name: size for name, size in record.shape.items() if name != "task"}),
    "pass": lambda record: record.pass_,
    "GB": lambda record: f"{(record.bytes or 0) / 1e9:.3f}",
    "GFLOP": lambda record: f"{(record.flops or 0) / 1e9:.1f}",
    "bytes, ms": figure("bytes_ms", ".4f"),
    "FLOPs, ms": figure("flops_ms", ".4f"),
}


def sections(records: Sequence[Record], architectures: Sequence[int]) -> str:
    """Return all tables for these architectures, each under a heading."""
    found = {}
    for arch in architectures:
        found |= launch_tables(records, arch)
        waste = f"{waste_table(records, arch)}\n\n{binaries_line(records, arch)}"
        found[f"Scores computed per score needed, sm_{arch}"] = waste
    found["Floors at an H200's 4.3 TB/s and 790 TFLOP/s; measured times come from a GPU only"] = floor_table(records)
    return tables.sections(found, records, "##")


def launch_tables(records: Sequence[Record], arch: int) -> dict[str, str]:
    """Return each module's launches on an architecture by a heading."""
    launches = {module: _of(records, "launch", arch=arch, module=module) for module in MODULES}
    return {f"{module} on sm_{arch}": record_table(found, _LAUNCH) for module, found in launches.items()}


def waste_table(records: Sequence[Record], arch: int) -> str:
    """Return scores computed per score needed."""
    return record_table(_of(records, "tile waste", arch=arch), _WASTE)


def floor_table(records: Sequence[Record]) -> str:
    """Return bytes, operations and the time that an H200 needs for each."""
    return record_table(_of(records, "floor"), _FLOOR)


def _of(records: Sequence[Record], what: str, **shape: int | str) -> list[Record]:
    return [record for record in records if record.what == what and shape.items() <= record.shape.items()]


def spill_line(records: Sequence[Record]) -> str:
    """Return per architecture how many launches there are and how many of them spill, in words."""
    parts = []
    for arch in dict.fromkeys(record.shape["arch"] for record in _of(records, "launch")):
        own = _of(records, "launch", arch=arch)
        spilled = sum(record.figures["spill_bytes"] > 0 for record in own)
        parts.append(f"sm_{arch}: {len(own)} launches, {spilled} spill")
    return "; ".join(parts) + "."


def binaries_line(records: Sequence[Record], arch: int) -> str:
    """Return how much is compiled for all lengths, in words."""
    found = _of(records, "binaries", arch=arch)
    parts = [f"{one.figures['kernels']} kernels for N={one.shape['N']} at d={one.shape['d']}" for one in found]
    return f"Compiled in all, forward and backward of dense batches: {', '.join(parts)}; a new length compiles nothing."
