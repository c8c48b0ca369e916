"""Records as Markdown tables, aligned so that they are also readable on a terminal."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.harness.records import Record, Shape

Column = Callable[[Record], Any]
"""Returns the cell of a record."""


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table whose columns of numbers are aligned to the right."""
    lines = [[str(cell) for cell in row] for row in (headings, *rows)]
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    is_number = [_is_number(column[1:]) for column in columns]
    rule = ["-" * (width - right) + ":" * right for width, right in zip(widths, is_number, strict=True)]
    formats = [f"{'>' if right else '<'}{width}" for width, right in zip(widths, is_number, strict=True)]
    padded = [map(format, line, formats) for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (padded[0], rule, *padded[1:]))


def _is_number(column: Iterable[str]) -> bool:
    cells = [cell for cell in column if cell not in ("", "-")]
    return bool(cells) and all(cell[0].isdigit() for cell in cells)


def record_table(records: Sequence[Record], columns: Mapping[str, Column], captions: Iterable[str] = ()) -> str:
    """Return a table with a row per record, its columns under their headings, and captions; "" without records."""
    rows = [[column(record) for column in columns.values()] for record in records]
    caption = "; ".join(dict.fromkeys(captions))
    return table(list(columns), rows) + (f"\n\n{caption}." if caption else "") if rows else ""


def shape(name: str) -> Column:
    """Return a column with an entry of the shape."""
    return lambda record: record.shape[name]


def figure(name: str, form: str = "") -> Column:
    """Return a column with a formatted figure; "-" where it is missing."""
    return lambda record: format(record.figures[name], form) if name in record.figures else "-"


def time(name: str, form: str, unit_ms: float = 1.0) -> Column:
    """Return a column with one of a record's times, in units of `unit_ms` milliseconds."""
    return lambda record: format((getattr(record, name) or 0.0) / unit_ms, form)


def provider(record: Record) -> str:
    """Return the cell with the provider's name."""
    return record.provider


def image_rates(form: str) -> Column:
    """Return a column with the images per second at the 80th and at the 20th percentile of the time for B images."""

    def column(record: Record) -> str:
        slow, fast = (1e3 * int(record.shape["B"]) / (ms or 1.0) for ms in (record.p80_ms, record.p20_ms))
        return f"{slow:{form}}-{fast:{form}}"

    return column


def describe(shape: Shape) -> str:
    """Return a shape as text, such as "N=196 d=64"."""
    return " ".join(f"{name}={value}" for name, value in shape.items())


def failures(records: Sequence[Record]) -> list[str]:
    """Return a line per provider that raised, without duplicates."""
    failed = (record for record in records if record.failure is not None)
    lines = (f"{each.what} {describe(each.shape)} {each.pass_}, {each.provider}: {each.failure}" for each in failed)
    return list(dict.fromkeys(lines))


def sections(tables: Mapping[str, str], records: Sequence[Record], level: str) -> str:
    """Return the non-empty tables under headings of this level ("##" or "###"), and a list of the errors."""
    texts = {**tables, "Errors": "\n".join(f"- {line}" for line in failures(records))}
    return "\n\n".join(f"{level} {heading}\n\n{text}" for heading, text in texts.items() if text)
