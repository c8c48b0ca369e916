"""Figures that need no GPU: the compiler's resource usage of all launches, scores wasted in tiles, and rooflines.

Nothing here is executed; times are lower bounds for an H200.
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
from iwm_fast.kernels.attention.packed import PackedQKV
from iwm_fast.kernels.launch import IS_INTERPRETING, Launch
from iwm_fast.kernels.offline_compile import compile_for, source_digest
from iwm_fast.kernels.predictor_input import op as predictor_input

ARCHITECTURES = (80, 90, 100)
WASTE_LENGTHS = (50, 64, 128, 196, 197, 212, 256, 320, 400)
MODULES = {"ragged_attention": ragged_attention, "predictor_input": predictor_input, "residual_norm": residual_norm}


def require_compiler() -> None:
    """Raise RuntimeError if Triton interprets kernels, because TRITON_INTERPRET was set when they were decorated."""
    if IS_INTERPRETING:
        raise RuntimeError(
            "offline figures need Triton's compiler, but TRITON_INTERPRET is set, so Triton interprets all kernels; "
            "unset it (env -u TRITON_INTERPRET python -m benchmarks.kernels)"
        )


def measure(session: Session, architectures: Sequence[int]) -> None:
    """Record all figures; compiling takes a few minutes the first time."""
    require_compiler()
    for arch in architectures:
        for module, operation in MODULES.items():
            launches = operation.shipped_launches(arch)
            print(f"... sm_{arch}: {len(launches)} launches of {module}", file=sys.stderr, flush=True)
            for name, launch in launches.items():
                case = _case("launch", arch=arch, module=module, launch=name)
                session.record(case, "fused", figures=launch_figures(launch, arch))
        for head_dim in ragged_attention.HEAD_DIMS:
            record_tile_waste(session, arch, head_dim)
        for head_dim in ragged_attention.HEAD_DIMS:
            record_kernel_count(session, arch, head_dim)
    record_floors(session)


def _case(what: str, **shape: int | str) -> Case:
    return Case(what, shape, dtype="")


def launch_figures(launch: Launch, arch: int) -> dict[str, Any]:
    """Compile a launch; return its resource usage and the digest of its source."""
    report = compile_for(launch, arch)
    programs = rooflines.programs_per_multiprocessor(report.registers, report.shared_bytes, launch.num_warps, arch)
    counts = {"warps": launch.num_warps, "stages": launch.num_stages, "programs": programs}
    return report._asdict() | counts | {"source": source_digest(launch, arch)}


def record_tile_waste(session: Session, arch: int, head_dim: int) -> None:
    """Record scores computed per score needed, for the launches of dense batches and for square tiles."""
    for length in WASTE_LENGTHS:
        by_pass = dense_launches(arch, length, head_dim)
        waste = {pass_: rooflines.launch_waste(launches, length) for pass_, launches in by_pass.items()}
        waste |= {f"{tile}x{tile}": rooflines.square_tile_waste(length, tile) for tile in (128, 192)}
        session.record(_case("tile waste", arch=arch, d=head_dim, N=length), "fused", figures=waste)


def record_kernel_count(session: Session, arch: int, head_dim: int) -> None:
    """Record how many kernels are compiled for dense batches of all lengths from 50 to 400."""
    kernels = {
        (launch.kernel, str(launch.constants), launch.num_warps)
        for length in NEW_LENGTHS
        for launches in dense_launches(arch, length, head_dim).values()
        for launch in launches
    }
    case = _case("binaries", arch=arch, d=head_dim, N=f"{NEW_LENGTHS[0]}-{NEW_LENGTHS[-1]}")
    session.record(case, "fused", figures={"kernels": len(kernels)})


def dense_launches(arch: int, length: int, head_dim: int) -> dict[str, list[Launch]]:
    """Return attention's launches by pass for sequences of one length, on meta tensors."""
    qkv = torch.empty(length, 3, 1, head_dim, dtype=torch.bfloat16, device="meta")
    packed, out, lse = PackedQKV(qkv, None, length), qkv[:, 0], torch.empty(1, length, device="meta")
    return {
        FORWARD: ragged_attention.forward_launches(arch, packed, out, lse),
        BACKWARD: ragged_attention.backward_launches(arch, packed, out=out, lse=lse, d_out=out, d_qkv=qkv),
    }


def record_floors(session: Session) -> None:
    """Record the minimum time on an H200 by operation and pass."""
    for head_dim in ragged_attention.HEAD_DIMS:
        for length in WASTE_LENGTHS:
            case = _case("floor", task="attention", N=length, d=head_dim, H=12, B=1024)
            _record_floor(session, case, rooflines.attention_costs([length] * 1024, 12, head_dim))
    context, tokens = IMAGES * NUM_CONTEXT, IMAGES * NUM_ACTIONS
    targets = IMAGES * NUM_PATCHES - context
    for task, num_tokens, has_mixer in (("feature", 0, True), ("sequence", tokens, False)):
        costs = rooflines.conditioning_costs((context, targets, num_tokens), WIDTH, has_mixer=has_mixer)
        _record_floor(session, _case("floor", task=f"{task} conditioning", P=WIDTH, B=IMAGES), costs)
    for width in WIDTHS:
        case = _case("floor", task="residual norm", D=width, M=ROWS)
        _record_floor(session, case, rooflines.norm_costs(ROWS, width))


def _record_floor(session: Session, case: Case, costs: dict[str, Cost]) -> None:
    for pass_ in (FORWARD, BACKWARD):
        num_bytes, flops = costs[pass_]
        bytes_ms, flops_ms = 1e3 * num_bytes / rooflines.H200_BYTES_PER_S, 1e3 * flops / rooflines.H200_FLOPS_PER_S
        floors_ms = {"bytes_ms": bytes_ms, "flops_ms": flops_ms}
        session.record(case, "", pass_, bytes=num_bytes, flops=flops or None, figures=floors_ms)


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
    "operation": shape("task"),
    "shape": lambda record: describe({name: size for name, size in record.shape.items() if name != "task"}),
    "pass": lambda record: record.pass_,
    "GB": lambda record: f"{(record.bytes or 0) / 1e9:.3f}",
    "GFLOP": lambda record: f"{(record.flops or 0) / 1e9:.1f}",
    "bytes, ms": figure("bytes_ms", ".4f"),
    "FLOPs, ms": figure("flops_ms", ".4f"),
}


def sections(records: Sequence[Record], architectures: Sequence[int]) -> str:
    """Return all tables for these architectures, under headings."""
    texts = {}
    for arch in architectures:
        texts |= launch_tables(records, arch)
        waste = f"{waste_table(records, arch)}\n\n{kernel_count_summary(records, arch)}"
        texts[f"Scores computed per score needed, sm_{arch}"] = waste
    texts["Calculated lower bounds at an H200's 4.3 TB/s and 790 TFLOP/s"] = floor_table(records)
    return tables.sections(texts, records, "##")


def launch_tables(records: Sequence[Record], arch: int) -> dict[str, str]:
    """Return the table of each module's launches on an architecture, by heading."""
    launches = {module: _select(records, "launch", arch=arch, module=module) for module in MODULES}
    return {f"{module} on sm_{arch}": record_table(rows, _LAUNCH) for module, rows in launches.items()}


def waste_table(records: Sequence[Record], arch: int) -> str:
    """Return a table of scores computed per score needed."""
    return record_table(_select(records, "tile waste", arch=arch), _WASTE)


def floor_table(records: Sequence[Record]) -> str:
    """Return a table of bytes, operations and the time that each of them takes on an H200."""
    return record_table(_select(records, "floor"), _FLOOR)


def _select(records: Sequence[Record], what: str, **shape: int | str) -> list[Record]:
    return [record for record in records if record.what == what and shape.items() <= record.shape.items()]


def spill_summary(records: Sequence[Record]) -> str:
    """Return a sentence with the number of launches, and of those that spill, per architecture."""
    counts = []
    for arch in dict.fromkeys(record.shape["arch"] for record in _select(records, "launch")):
        launches = _select(records, "launch", arch=arch)
        spilled = sum(record.figures["spill_bytes"] > 0 for record in launches)
        counts.append(f"sm_{arch}: {len(launches)} launches, {spilled} spill")
    return "; ".join(counts) + "."


def kernel_count_summary(records: Sequence[Record], arch: int) -> str:
    """Return a sentence with the number of kernels compiled for all lengths of dense batches."""
    counts = [
        f"{record.figures['kernels']} kernels for N={record.shape['N']} at d={record.shape['d']}"
        for record in _select(records, "binaries", arch=arch)
    ]
    return f"Compiled in total for forward and backward of dense batches: {', '.join(counts)}; a new length needs none."
