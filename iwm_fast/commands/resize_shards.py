"""`iwm shards resize`: write shards again with smaller images, and report how much smaller they are."""

from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from iwm_fast.commands.check_shards import print_lines
from iwm_fast.pipelines.config import ResizeConfig
from iwm_fast.pipelines.resize_shards import ResizedShard, resize_shards
from iwm_fast.pipelines.storage.shard_set import find_shards


def resize(spec: str, destination: Path, config: ResizeConfig, num_processes: int | None = None) -> None:
    """Write the shards that `spec` names, as `data.train` does, into a folder with smaller images, and print a report.

    With `num_processes` of None, there is one process per core.

    Raises:
        ValueError: after the report is printed, if some shards cannot be used at all.
        FileNotFoundError, FileExistsError, OSError: if shards do not exist, or the folder cannot be written.
    """
    console, paths = Console(), find_shards(spec)
    resized = resize_shards(paths, destination, config, num_processes)
    shards = list(track(resized, "resizing", total=len(paths), console=console, transient=True))
    console.print(_summary_table(shards))
    print_lines(console, [f"{shard.source}:{key} {reason}" for shard in shards for key, reason in shard.left_out])
    print_lines(console, [f"{shard.refusal}; it is left out" for shard in shards if shard.holds_no_image])
    refusals = [shard.refusal for shard in shards if shard.refusal]
    # Runs leave shards without an image out, unless there are no others.
    if len(refusals) < len(shards):
        refusals = [shard.refusal for shard in shards if shard.refusal and not shard.holds_no_image]
    if refusals:
        raise ValueError("\n".join([f"{len(refusals)} of {len(paths)} shards cannot be used:", *refusals[:20]]))


def _summary_table(shards: list[ResizedShard]) -> Table:
    written = [shard for shard in shards if not shard.refusal]
    before, after = sum(shard.source_version[0] for shard in written), sum(shard.size_bytes for shard in written)
    num_earlier = sum(shard.is_earlier for shard in shards)
    table = Table("property", "value")
    table.add_row("shards", f"{len(written)}" + (f", {num_earlier} of them written before" if num_earlier else ""))
    table.add_row("images resized", f"{sum(shard.num_resized for shard in written)}")
    table.add_row("images copied", f"{sum(shard.num_copied for shard in written)}")
    table.add_row("samples left out", f"{sum(len(shard.left_out) for shard in written)}")
    table.add_row("GB before", f"{before / 1e9:.3f}")
    table.add_row("GB after", f"{after / 1e9:.3f}" + (f", {after / before:.0%} of it" if before else ""))
    return table
