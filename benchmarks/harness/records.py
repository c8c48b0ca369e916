"""Measurements as JSON lines, one each, written as they come."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Shape = Mapping[str, int | str]
"""Sizes and choices by name."""

FORWARD, BACKWARD, BOTH = PASSES = ("forward", "backward", "forward+backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement, or one figure."""

    what: str
    provider: str
    """Who did it; "" where nobody did."""
    shape: Shape
    dtype: str = ""
    pass_: str = ""
    """One of PASSES, or "" where there is none."""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    repeats: int | None = None
    host_ms: float | None = None
    """What the host needs to start the work."""
    bytes: int | None = None
    """Fewest that the task moves, whoever does it."""
    flops: int | None = None
    share_of_floor: float | None = None
    """Time that the bytes take at the bandwidth measured beside it, over the median."""
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What is no time."""
    failure: str | None = None
    """First line of the error, if the provider raised."""
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def group(self) -> tuple[Any, ...]:
        """What records that may be compared have in common."""
        return self.what, tuple(self.shape.items()), self.dtype, self.pass_


def to_line(record: Record) -> str:
    """Return a record as one line of JSON, without what it does not say."""
    fields = {name.rstrip("_"): value for name, value in dataclasses.asdict(record).items()}
    said = {name: value for name, value in fields.items() if value not in (None, {}, "")}
    return json.dumps({"what": record.what, "provider": record.provider, "shape": record.shape} | said)


def from_line(line: str) -> Record:
    """Return the record of a line."""
    fields = json.loads(line)
    return Record(**{"pass_" if name == "pass" else name: value for name, value in fields.items()})


def append(path: Path, record: Record) -> None:
    """Write one record behind those of a file: what is measured stays, whatever happens next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(to_line(record) + "\n")


def read(path: Path) -> list[Record]:
    """Return a file's records."""
    return [from_line(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def latest(records: Iterable[Record]) -> list[Record]:
    """Keep of each group the records of its latest run: numbers of different runs are not compared."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    kept = []
    for group in groups.values():
        newest = max(str(record.machine.get("run", "")) for record in group)
        kept += {record.provider: record for record in group if record.machine.get("run", "") == newest}.values()
    return kept
