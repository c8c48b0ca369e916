"""Sheets of labelled pictures: sections of rows of (image, caption), written as PNG."""

import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# inches
_MARGIN, _LABEL, _GAP, _SECTION_GAP, _LINE = 0.2, 0.95, 0.12, 0.3, 0.145
# characters to an inch of a caption or a note, which are 7.5 points high
_CHARACTERS = 15.5
_INK, _SOFT, _RIGHT = "#1b1f24", "#5b6570", "#1a7f37"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture of a sheet."""

    pixels: UInt8[np.ndarray, "H W 3"]
    caption: str = ""
    is_right: bool = False
    """Whether it gets a frame that says: this is the right answer."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Rows of panels that belong together; a column is one case."""

    labels: tuple[str, ...]
    """What each row shows."""
    rows: tuple[tuple[Panel, ...], ...]
    """As many rows as labels, all of one length."""
    title: str = ""
    numbers: dict[str, str] = field(default_factory=dict)
    """What was measured on these panels, with its unit or scale."""


def save_sheet(path: Path, labels: Sequence[str], rows: Sequence[Sequence[Panel]], title: str) -> None:
    """Draw labelled rows of panels; pixels stay sharp."""
    save_sections(path, [Section(labels=tuple(labels), rows=tuple(map(tuple, rows)))], title)


def save_sections(path: Path, sections: Sequence[Section], title: str, panel_inches: float = 1.9) -> None:
    """Draw sections one below the other, all panels of one size; pixels stay sharp."""
    num_columns = max(len(section.rows[0]) for section in sections)
    width = 2 * _MARGIN + _LABEL + num_columns * (panel_inches + _GAP)
    title_lines = _wrap(title, (width - 2 * _MARGIN) / 1.35)
    heights = [_section_height(section, panel_inches, width) for section in sections]
    height = 2 * _MARGIN + 0.2 * len(title_lines) + sum(heights)
    figure = Figure(figsize=(width, height))
    _write(figure, _MARGIN, _MARGIN, title_lines, size=10.5, weight="bold")
    top = _MARGIN + 0.2 * len(title_lines)
    for section, lasts in zip(sections, heights, strict=True):
        _draw_section(figure, section, top, panel_inches)
        top += lasts
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")


def _section_height(section: Section, panel_inches: float, width: float) -> float:
    rows = sum(panel_inches + _caption_height(row, panel_inches) for row in section.rows)
    return rows + _heading_height(section, width) + _SECTION_GAP


def _heading_height(section: Section, width: float) -> float:
    return 0.2 * bool(section.title) + _LINE * len(_note(section, width))


def _note(section: Section, width: float) -> list[str]:
    return _wrap(" · ".join(f"{name} {value}" for name, value in section.numbers.items()), width - 2 * _MARGIN)


def _caption_height(row: Sequence[Panel], panel_inches: float) -> float:
    return _LINE * max(len(_wrap(panel.caption, panel_inches)) for panel in row) + _GAP


def _draw_section(figure: Figure, section: Section, top: float, panel_inches: float) -> None:
    width = figure.get_figwidth()
    top += _SECTION_GAP / 2
    if section.title:
        _write(figure, _MARGIN, top, [section.title], size=9.5, weight="bold")
    note = _note(section, width)
    _write(figure, _MARGIN, top + 0.2 * bool(section.title), note, color=_SOFT)
    top += _heading_height(section, width) + 0.05
    for label, row in zip(section.labels, section.rows, strict=True):
        _write(figure, _MARGIN, top + panel_inches / 2 - 0.08, _wrap(label, _LABEL - 0.1), size=8.5)
        for column, panel in enumerate(row):
            left = _MARGIN + _LABEL + column * (panel_inches + _GAP)
            _draw_panel(_place(figure, left, top, panel_inches), panel)
            _write(figure, left, top + panel_inches + 0.04, _wrap(panel.caption, panel_inches),
                   color=_RIGHT if panel.is_right else _SOFT)  # fmt: skip
        top += panel_inches + _caption_height(row, panel_inches)


def _draw_panel(axis: Axes, panel: Panel) -> None:
    axis.imshow(panel.pixels, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(color=_RIGHT if panel.is_right else "#c9d0d6", linewidth=2.5 if panel.is_right else 0.6)


def _place(figure: Figure, left: float, top: float, side: float) -> Axes:
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))


def _write(figure: Figure, left: float, top: float, lines: list[str], **style: object) -> None:
    width, height = figure.get_size_inches()
    style = {"size": 7.5, "color": _INK, "linespacing": 1.3} | style
    figure.text(left / width, 1 - top / height, "\n".join(lines), va="top", **style)  # type: ignore[arg-type]


def _wrap(text: str, inches: float) -> list[str]:
    return textwrap.wrap(text, max(8, int(inches * _CHARACTERS)))


def require_writable(path: Path, name: str = "picture") -> None:
    """Check that a file can be written before the work that it is to show is done; its folder is made.

    Raises:
        ValueError: naming the setting, if it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("that is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"{name} must name a file in a folder that can be written to, got {str(path)!r}: {reason}"
        ) from error


def shade(pixels: UInt8[np.ndarray, "H W 3"], is_hidden: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    """Paint hidden patches of a (grid, grid) mask in flat grey."""
    side = len(pixels) // len(is_hidden)
    hidden = np.kron(is_hidden, np.ones((side, side), bool))
    return np.where(hidden[..., None], np.uint8(128), pixels)
