"""How far an evaluation is: one moving line, on rank 0's terminal only."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from iwm_fast.runtime.distributed import RankInfo

Item = TypeVar("Item")


def follow(items: Iterable[Item], total: int, what: str, rank_info: RankInfo | None = None) -> Iterator[Item]:
    """Yield the items; `what` says what they are, beside how many of this rank's `total` are done."""
    is_first = rank_info is None or rank_info.rank == 0
    if not (is_first and sys.stderr.isatty()):
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            bar.advance(task)
