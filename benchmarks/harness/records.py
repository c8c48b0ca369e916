"""Measurements as JSON lines, written as soon as they are taken."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Shape = Mapping[str, int | str]
"""Sizes and options by name."""

FORWARD, BACKWARD, BOTH = PASSES = ("forward", "backward", "forward+backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement, or one set of figures."""

    what: str
    provider: str
    """Name of the implementation; "" for a calculated figure."""
    shape: Shape
    dtype: str = ""
    pass_: str = ""
    """One of PASSES, or "" if the measurement has no passes."""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    repeats: int | None = None
    host_ms: float | None = None
    """Median time that the host needs to enqueue the work."""
    bytes: int | None = None
    """Minimum number of bytes that any implementation has to move."""
    flops: int | None = None
    share_of_floor: float | None = None
    """Time that the bytes take at the copy bandwidth measured in the same run, divided by the median time."""
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Figures other than the times above, by name."""
    failure: str | None = None
    """Type and first line of the error, if the provider raised."""
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def group(self) -> tuple[Any, ...]:
        """Fields that records must share to be comparable."""
        return self.what, tuple(self.shape.items()), self.dtype, self.pass_


def to_line(record: Record) -> str:
    """Return a record as one line of JSON, without empty fields."""
    fields = {name.rstrip("_"): value for name, value in dataclasses.asdict(record).items()}
    non_empty = {name: value for name, value in fields.items() if value not in (None, {}, "")}
    return json.dumps({"what": record.what, "provider": record.provider, "shape": record.shape} | non_empty)


def from_line(line: str) -> Record:
    """Parse a line that `to_line` returned."""
    fields = json.loads(line)
    return Record(**{"pass_" if name == "pass" else name: value for name, value in fields.items()})


def append(path: Path, record: Record) -> None:
    """Append one record to a file and close it, so that a later crash loses nothing that was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(to_line(record) + "\n")


def read(path: Path) -> list[Record]:
    """Return all records of a file."""
    return [from_line(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def latest(records: Iterable[Record]) -> list[Record]:
    """Return each group's records of its latest run, because numbers of different runs are not comparable."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    selected = []
    for group in groups.values():
        newest = max(str(record.machine.get("run", "")) for record in group)
        selected += {record.provider: record for record in group if record.machine.get("run", "") == newest}.values()
    return selected
