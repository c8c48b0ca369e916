"""`iwm shards check`: what is in the shards, and what of it cannot be used."""

from collections import Counter

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from iwm_fast.pipelines.storage.shard_set import find_shards
from iwm_fast.pipelines.validate import ShardReport, validate

# the rest is counted: a table of thousands helps nobody
MOST_SHOWN = 20


def check_shards(spec: str, num_processes: int | None = None) -> None:
    """Decode every image and mask, print a report, and keep indexes without the samples that cannot be decoded.

    Raises:
        ValueError: after the report, if whole shards cannot be used.
    """
    console = Console()
    paths = find_shards(spec)
    found = track(validate(paths, num_processes), "checking", total=len(paths), console=console, transient=True)
    reports = list(found)
    console.print(_table(reports))
    bad = [f"{report.path}:{bad.key} {bad.reason}" for report in reports for bad in report.bad]
    refused = [report.refusal for report in reports if report.refusal]
    _print_some(console, bad)
    if bad:
        console.print("These samples are left out of the indexes and will not be drawn until their shard changes.")
    _print_some(console, _remarks(reports))
    if refused:
        shown = "\n".join(refused[:MOST_SHOWN])
        raise ValueError(f"{len(refused)} of {len(paths)} shards cannot be used:\n{shown}")


def _print_some(console: Console, lines: list[str]) -> None:
    for line in lines[:MOST_SHOWN]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if len(lines) > MOST_SHOWN:
        console.print(f"... and {len(lines) - MOST_SHOWN} more")


def _remarks(reports: list[ShardReport]) -> list[str]:
    """Say what no sample is left out for, but a task on labels will stumble over."""
    remarks = []
    if any(report.num_json for report in reports):
        for report in reports:
            if report.first_without_json:
                missing = len(report.sizes) + len(report.bad) - report.num_json
                what = f"the first of {missing} in its shard without .json, which others have"
                remarks.append(f"{report.path}:{report.first_without_json} {what}")
    for report in reports:
        if report.no_masks:
            first, what = report.no_masks[0], f"the first of {len(report.no_masks)} in its shard whose PNG is no mask"
            remarks.append(f"{report.path}:{first.key} {what}: {first.reason}")
    return remarks


def _table(reports: list[ShardReport]) -> Table:
    formats = sum((report.formats for report in reports), Counter[str]())
    sizes = np.array([size for report in reports for size in report.sizes]).reshape(-1, 2)
    num_bad = sum(len(report.bad) for report in reports)
    table = Table("what", "found")
    table.add_row("shards", f"{len(reports)}")
    table.add_row("samples", f"{len(sizes) + num_bad}")
    table.add_row("images", ", ".join(f"{count} {name}" for name, count in formats.most_common()) or "none")
    if len(sizes):
        pixels = sizes.prod(1)
        smallest, middle, largest = (sizes[i] for i in np.argsort(pixels)[[0, len(pixels) // 2, -1]])
        sides = (f"{width} x {height}" for width, height in (smallest, middle, largest))
        table.add_row("smallest, median, largest", ", ".join(sides))
    table.add_row("without a label", f"{sum(report.num_unlabelled for report in reports)}")
    table.add_row("with .json", f"{sum(report.num_json for report in reports)}")
    table.add_row("with a segmentation map", f"{sum(report.num_masks for report in reports)}")
    table.add_row("cannot be decoded", f"{num_bad}")
    return table
