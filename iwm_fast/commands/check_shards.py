"""`iwm shards check`: report what the shards contain and which samples cannot be used."""

from collections import Counter

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from iwm_fast.config.commands import CHECK_DEFAULTS, CheckShardsConfig
from iwm_fast.pipelines.errors import printable
from iwm_fast.pipelines.storage.shard import describe_unused
from iwm_fast.pipelines.storage.shard_set import find_shards
from iwm_fast.pipelines.validate import ShardReport, validate_shards

# A broken download can damage thousands of samples. After this many lines of one kind, only their number is printed.
_MAX_LINES = 20


def check_shards(spec: str, config: CheckShardsConfig = CHECK_DEFAULTS, num_processes: int | None = None) -> None:
    """Decode all images and masks, print a report, and save indexes without the samples that cannot be decoded.

    `spec` names the shards as `data.train` does. With `num_processes` of None, there is one process per core.
    Images and masks of more than `max_pixels` pixels count as undecodable.

    Raises:
        ValueError: after the report is printed, if some shards cannot be used at all.
    """
    console = Console()
    paths = find_shards(spec)
    # `validate_shards` yields a report as soon as its shard is done, so the progress bar advances shard by shard.
    validated = validate_shards(paths, num_processes, image=config.image, max_pixels=config.max_pixels)
    reports = list(track(validated, "checking", total=len(paths), console=console, transient=True))
    console.print(_summary_table(reports))
    bad = [f"{report.path}:{bad.key} {bad.reason}" for report in reports for bad in report.bad]
    refusals = [report.refusal for report in reports if report.refusal]
    # Runs leave shards without an image out, unless there are no others.
    if not all(report.holds_no_image for report in reports):
        refusals = [report.refusal for report in reports if report.refusal and not report.holds_no_image]
    print_lines(console, bad)
    if bad:
        console.print("These samples are left out of the indexes and will not be drawn until their shard changes.")
    print_lines(console, _warnings(reports))
    if refusals:
        lines = "\n".join(refusals[:_MAX_LINES])
        raise ValueError(f"{len(refusals)} of {len(paths)} shards cannot be used:\n{lines}")


def print_lines(console: Console, lines: list[str]) -> None:
    """Print at most `_MAX_LINES` lines and the number of the rest."""
    for line in lines[:_MAX_LINES]:
        # Paths and keys may contain brackets, which rich would read as markup. Soft wrapping keeps paths copyable.
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
    if len(lines) > _MAX_LINES:
        console.print(f"... and {len(lines) - _MAX_LINES} more")


def _warnings(reports: list[ShardReport]) -> list[str]:
    """Return what runs leave out, and a line per shard with samples that evaluations on labels or masks may refuse."""
    warnings = describe_unused((report.path, report.unused) for report in reports)
    if not all(report.holds_no_image for report in reports):
        warnings += [f"{report.refusal}; runs leave it out" for report in reports if report.holds_no_image]
    # Data without any .json member is complete. A member is missing only if other samples have one.
    if any(report.num_json for report in reports):
        for report in reports:
            if report.first_without_json:
                missing = len(report.sizes) + len(report.bad) - report.num_json
                text = f"has no .json, unlike other samples; it is the first of {missing} in this shard"
                warnings.append(f"{report.path}:{report.first_without_json} {text}")
    for report in reports:
        if report.invalid_masks:
            first, count = report.invalid_masks[0], len(report.invalid_masks)
            text = f"has a PNG that is no segmentation map; it is the first of {count} in this shard"
            warnings.append(f"{report.path}:{first.key} {text}: {first.reason}")
    return warnings


def _summary_table(reports: list[ShardReport]) -> Table:
    formats = sum((report.formats for report in reports), Counter[str]())
    sizes = np.array([size for report in reports for size in report.sizes]).reshape(-1, 2)
    num_bad = sum(len(report.bad) for report in reports)
    table = Table("property", "value")
    table.add_row("shards", f"{len(reports)}")
    table.add_row("samples", f"{len(sizes) + num_bad}")
    table.add_row("images", ", ".join(f"{count} {name}" for name, count in formats.most_common()) or "none")
    if len(sizes):
        by_area = sizes[np.argsort(sizes.prod(axis=1))]
        selected = by_area[[0, len(by_area) // 2, -1]]
        table.add_row("smallest, median, largest", ", ".join(f"{width} x {height}" for width, height in selected))
    table.add_row("without a label", f"{sum(report.num_unlabelled for report in reports)}")
    table.add_row("with .json", f"{sum(report.num_json for report in reports)}")
    table.add_row("with a segmentation map", f"{sum(report.num_masks for report in reports)}")
    table.add_row("cannot be decoded", f"{num_bad}")
    return table
