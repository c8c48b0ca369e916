"""Figures that need no GPU: the compiler's resource usage of all launches, scores wasted in tiles, and rooflines.

Nothing here is executed; times are lower bounds for an H200.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import rooflines, tables
from benchmarks.harness.masks import GRID, masked_batch
from benchmarks.harness.records import BACKWARD, FORWARD, Record
from benchmarks.harness.rooflines import Cost
from benchmarks.harness.session import Case, Session
from benchmarks.kernels.attention import IMAGES, NUM_ACTIONS, NUM_HEADS
from benchmarks.kernels.conditioning import WIDTH
from benchmarks.kernels.residual_norm import ROWS, WIDTHS
from iwm_fast.kernels import residual_norm
from iwm_fast.kernels.attention import op as ragged_attention
from iwm_fast.kernels.attention.kernels import backward_launches, forward_launches
from iwm_fast.kernels.attention.sequences import Sequences
from iwm_fast.kernels.launch import Launch
from iwm_fast.kernels.offline_compile import compile_for, source_digest
from iwm_fast.kernels.predictor_input import op as predictor_input

ARCHITECTURES = (80, 90, 100)
WASTE_LENGTHS = (64, 102, 128, 196, 201, 212, 256)
MODULES = {"ragged_attention": ragged_attention, "predictor_input": predictor_input, "residual_norm": residual_norm}
LAUNCH = "launch"


def measure(session: Session, architectures: Sequence[int]) -> None:
    """Record the resource usage of every launch; compiling takes a few minutes the first time."""
    for arch in architectures:
        for module, operation in MODULES.items():
            launches = operation.shipped_launches(arch)
            print(f"... sm_{arch}: {len(launches)} launches of {module}", file=sys.stderr, flush=True)
            for name, launch in launches.items():
                case = Case(LAUNCH, {"arch": arch, "module": module, "launch": name}, dtype="")
                session.record(case, "fused", figures=launch_figures(launch, arch))


def launch_figures(launch: Launch, arch: int) -> dict[str, Any]:
    """Compile a launch; return its resource usage and the digest of its source."""
    report = compile_for(launch, arch)
    programs = rooflines.programs_per_multiprocessor(report.registers, report.shared_bytes, launch.num_warps, arch)
    counts = {"warps": launch.num_warps, "stages": launch.num_stages, "programs": programs}
    return report._asdict() | counts | {"source": source_digest(launch, arch)}


def sections(records: Sequence[Record], architectures: Sequence[int]) -> str:
    """Return all tables for these architectures, under headings."""
    texts = {}
    for arch in architectures:
        texts |= launch_tables(records, arch)
        texts[f"Scores computed per score needed, sm_{arch}"] = waste_table(arch)
    texts["Calculated lower bounds at an H200's 4.3 TB/s and 790 TFLOP/s"] = floor_table()
    return tables.sections(texts, records, "##")


_COLUMNS = {"registers": "registers", "spilled B": "spill_bytes", "shared B": "shared_bytes",
            "fast MMA": "fast_products", "all MMA": "matrix_products", "warps": "warps", "stages": "stages",
            "programs/SM": "programs"}  # fmt: skip


def launch_tables(records: Sequence[Record], arch: int) -> dict[str, str]:
    """Return the table of each module's launches on an architecture, by heading.

    Where versions of Triton differ, a cell holds the figures of all, the oldest version first.
    """
    texts = {}
    for module in MODULES:
        figures: dict[str, dict[str, dict[str, Any]]] = {}
        for record in select_launches(records, arch=arch, module=module):
            figures.setdefault(str(record.shape["launch"]), {})[record.machine.get("triton", "")] = record.figures
        rows = [[name, *(_cell(by_version, key) for key in _COLUMNS.values())] for name, by_version in figures.items()]
        texts[f"{module} on sm_{arch}"] = tables.table(["launch", *_COLUMNS], rows) if rows else ""
    return texts


def _cell(by_version: dict[str, dict[str, Any]], name: str) -> str:
    values = [str(figures[name]) for _, figures in sorted(by_version.items())]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def select_launches(records: Sequence[Record], **shape: int | str) -> list[Record]:
    """Return the records of launches with these entries of the shape."""
    return [record for record in records if record.what == LAUNCH and shape.items() <= record.shape.items()]


def spill_summary(records: Sequence[Record]) -> str:
    """Return a sentence with the number of launches, and of those that spill, by version of Triton and GPU."""
    counts = []
    for version, arch in dict.fromkeys((each.machine.get("triton"), each.shape["arch"]) for each in records):
        launches = [each for each in select_launches(records, arch=arch) if each.machine.get("triton") == version]
        spilled = sum(record.figures["spill_bytes"] > 0 for record in launches)
        counts.append(f"triton {version}, sm_{arch}: {len(launches)} launches, {spilled} spill")
    return "; ".join(counts) + "."


def waste_table(arch: int) -> str:
    """Return scores computed per score needed, for the launches of equal lengths and for square tiles of 128."""
    rows = []
    for head_dim in ragged_attention.HEAD_DIMS:
        for length in WASTE_LENGTHS:
            waste = [rooflines.launch_waste(launches, length) for launches in dense_launches(arch, length, head_dim)]
            cells = [f"{value:.2f}" if value else "-" for value in waste]
            rows.append([head_dim, length, *cells, f"{rooflines.square_tile_waste(length, 128):.2f}"])
    return tables.table(["d", "N", FORWARD, BACKWARD, "128x128"], rows)


def dense_launches(arch: int, length: int, head_dim: int) -> tuple[list[Launch], list[Launch]]:
    """Return attention's launches of both passes for sequences of one length, on meta tensors."""
    qkv = torch.empty(length, 3, 1, head_dim, dtype=torch.bfloat16, device="meta")
    sequences, out, lse = Sequences.of_equal_length(length), qkv[:, 0], torch.empty(1, length, device="meta")
    return forward_launches(arch, qkv, sequences, out, lse), backward_launches(arch, qkv, sequences, out, qkv, lse)


def floor_table() -> str:
    """Return bytes, operations and the time that each of them takes on an H200, for the shapes that are timed."""
    context, target = masked_batch(IMAGES)
    costs: dict[tuple[str, str], dict[str, Cost]] = {}
    for head_dim in (64, 32):
        for name, lengths in ((str(GRID**2), [GRID**2] * IMAGES), ("contexts", list(context.lengths))):
            shape = f"N={name} d={head_dim} H={NUM_HEADS} B={IMAGES}"
            costs["attention", shape] = rooflines.attention_costs(lengths, NUM_HEADS, head_dim)
    for kind, num_tokens in (("feature", 0), ("sequence", NUM_ACTIONS * IMAGES)):
        rows = (sum(context.lengths), sum(target.lengths), num_tokens)
        cost = rooflines.conditioning_costs(rows, WIDTH, has_mixer=kind == "feature")
        costs[f"{kind} conditioning", f"P={WIDTH} B={IMAGES}"] = cost
    for width in WIDTHS:
        costs["residual norm", f"D={width} M={ROWS}"] = rooflines.norm_costs(ROWS, width)
    rows = [[*key, pass_, *_floor_cells(cost[pass_])] for key, cost in costs.items() for pass_ in (FORWARD, BACKWARD)]
    return tables.table(["operation", "shape", "pass", "GB", "GFLOP", "bytes, ms", "FLOPs, ms"], rows)


def _floor_cells(cost: Cost) -> list[str]:
    bytes_ms = 1e3 * cost.bytes / rooflines.H200_BYTES_PER_S
    flops_ms = 1e3 * cost.flops / rooflines.H200_FLOPS_PER_S
    return [f"{cost.bytes / 1e9:.3f}", f"{cost.flops / 1e9:.1f}", f"{bytes_ms:.3f}", f"{flops_ms:.3f}"]
