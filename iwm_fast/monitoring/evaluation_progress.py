"""A progress bar for evaluations, on the terminal of rank 0."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from iwm_fast.runtime.distributed import RankInfo

Item = TypeVar("Item")


def track_progress(
    items: Iterable[Item], total: int, description: str, rank_info: RankInfo | None = None
) -> Iterator[Item]:
    """Yield the items while showing a progress bar, if this is rank 0 and standard error is a terminal.

    Args:
        items: items of this rank.
        total: number of items.
        description: text beside the bar, such as "images ranked".
        rank_info: this process; None if it is the only one.
    """
    is_main = rank_info is None or rank_info.rank == 0
    if not (is_main and sys.stderr.isatty()):
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        for item in items:
            yield item
            bar.advance(task)
