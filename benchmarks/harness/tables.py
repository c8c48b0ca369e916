"""Measurements as plain-text tables that are Markdown too: on the terminal and in the README."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.harness.records import Record


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; numbers stand to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(headings), *cells]) for i in range(len(headings))]
    is_number = [_is_number([row[i] for row in cells]) for i in range(len(headings))]
    lines = [list(headings), *cells]
    text = [
        _line([_pad(cell, width, right) for cell, width, right in zip(row, widths, is_number, strict=True)])
        for row in lines
    ]
    rule = _line(
        ["-" * (width - 1) + ":" if right else "-" * width for width, right in zip(widths, is_number, strict=True)]
    )
    return "\n".join([text[0], rule, *text[1:]])


def _is_number(column: list[str]) -> bool:
    found = [cell for cell in column if cell not in ("", "-")]
    return bool(found) and all(cell[0].isdigit() for cell in found)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _pad(cell: str, width: int, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)


def describe(shape: dict[str, int | str]) -> str:
    """Return a shape in words."""
    return " ".join(f"{name}={value}" for name, value in shape.items())


def timings(records: Sequence[Record]) -> str:
    """Return medians in ms, a row for each task and pass, a column for each provider.

    In brackets the share of the time that the task's bytes take at the measured bandwidth.
    """
    timed = [record for record in records if record.pass_]
    names = list(dict.fromkeys(record.provider for record in timed))
    groups: dict[Any, dict[str, Record]] = {}
    for record in timed:
        groups.setdefault(record.group, {})[record.provider] = record
    rows = []
    for found in groups.values():
        any_record = next(iter(found.values()))
        cells = [_timing(found[name]) if name in found else "-" for name in names]
        rows.append([describe(any_record.shape), any_record.pass_, *cells])
    return table(["shape", "pass", *names], rows)


def section(what: str, records: Sequence[Record]) -> str:
    """Return the table that fits a task."""
    return new_lengths(records) if what == "new lengths" else timings(records)


def new_lengths(records: Sequence[Record]) -> str:
    """Return what a call costs that brings a new length, in ms, and how many kernels were compiled for it."""
    names = ["mean_ms", "longest_ms", "first_calls_ms"]
    rows = []
    for record in records:
        if record.failure is None:
            times = [record.median_ms, record.p80_ms, *(record.figures[name] for name in names)]
            counts = [record.figures["calls"], record.figures["compilations"]]
            rows.append([describe(record.shape), record.provider, *(f"{one:.2f}" for one in times), *counts])
    headings = ["shape", "provider", "median", "p80", "mean", "longest", "first five", "calls", "Triton compilations"]
    return table(headings, rows)


def _timing(record: Record) -> str:
    if record.failure is not None or record.median_ms is None:
        return "raises"
    share = "" if record.share_of_floor is None else f" ({100 * record.share_of_floor:.0f} %)"
    return f"{record.median_ms:.3f}{share}"


def failures(records: Sequence[Record]) -> list[str]:
    """Return a line for each provider that raised."""
    failed = [record for record in records if record.failure is not None]
    lines = [
        f"{record.what} {describe(record.shape)} {record.pass_}, {record.provider}: {record.failure}"
        for record in failed
    ]
    return list(dict.fromkeys(lines))


def errors(records: Sequence[Record]) -> str:
    """Return relative errors to float64: of the fused operation, and in brackets of plain PyTorch in bfloat16."""
    groups: dict[Any, dict[str, Record]] = {}
    for record in records:
        groups.setdefault((record.what, describe(record.shape)), {})[record.provider] = record
    rows = []
    for (what, shape), found in groups.items():
        if "fused" not in found or "plain" not in found:
            continue
        fused, plain = found["fused"].figures, found["plain"].figures
        worst = max(fused, key=lambda name: fused[name] / max(plain[name], 1e-12))
        for name in dict.fromkeys([next(iter(fused)), worst]):
            rows.append([what.removesuffix(" error"), shape, name, f"{fused[name]:.1e}", f"{plain[name]:.1e}"])
    return table(["task", "shape", "tensor", "fused", "plain bfloat16"], rows)
