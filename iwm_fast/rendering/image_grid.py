"""Grids of captioned images, with labelled rows and optional titles, written as PNG files."""

import math
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Lengths in inches: the margin of the page, the width of row labels, the gaps between panels and between sections, and
# the height of a line of a caption.
_MARGIN, _LABEL_WIDTH, _GAP, _SECTION_GAP, _LINE_HEIGHT = 0.2, 0.95, 0.12, 0.3, 0.145
_TITLE_LINE_HEIGHT = 0.2
_LEGEND_ENTRY_WIDTH = 0.9
# For text of 7.5 points. Lines are broken by counting characters, as a text's width is known only after drawing it.
_CHARACTERS_PER_INCH = 15.5
_INK, _SOFT, _GREEN = "#1b1f24", "#5b6570", "#1a7f37"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """An image with a caption below it."""

    pixels: UInt8[np.ndarray, "H W 3"]
    caption: str = ""
    is_correct: bool = False
    """Whether the image is a correct answer, which is marked by a green frame and a green caption."""
    grid: int = 1
    """Number of patches in each row and column of the image, between which lines are drawn."""


@dataclass(frozen=True, kw_only=True)
class ImageGrid:
    """A grid of panels with labelled rows; the panels of a column belong to the same example."""

    labels: tuple[str, ...]
    """Row labels, from top to bottom."""
    rows: tuple[tuple[Panel, ...], ...]
    """Panels of each labelled row; all rows have the same length."""
    title: str = ""
    numbers: dict[str, str] = field(default_factory=dict)
    """Measurements on these panels, by name, with their units."""
    legend: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Names of colours (red, green, blue; 0 to 255), which are explained below the panels."""


def save_image_grid(path: Path, labels: Sequence[str], rows: Sequence[Sequence[Panel]], title: str) -> None:
    """Write one grid of panels, whose rows have the same length, as a PNG file; its folder is created."""
    save_image_grids(path, [ImageGrid(labels=tuple(labels), rows=tuple(map(tuple, rows)))], title)


def save_image_grids(path: Path, sections: Sequence[ImageGrid], title: str, panel_inches: float = 1.9) -> None:
    """Write sections, one below the other, as a PNG file; its folder is created.

    Sections may differ in rows and columns, but all panels have sides of `panel_inches`. Enlarged pixels stay sharp.
    """
    num_columns = max(len(section.rows[0]) for section in sections)
    width = 2 * _MARGIN + _LABEL_WIDTH + num_columns * (panel_inches + _GAP)
    # The bold title has wider characters than a caption.
    title_lines = _wrap(title, (width - 2 * _MARGIN) / 1.35)
    heights = [_section_height(section, panel_inches, width) for section in sections]
    # The layout is computed before drawing, because the size of the figure depends on the wrapped captions.
    height = 2 * _MARGIN + _TITLE_LINE_HEIGHT * len(title_lines) + sum(heights)
    figure = Figure(figsize=(width, height))
    _write(figure, _MARGIN, _MARGIN, title_lines, size=10.5, weight="bold")
    top = _MARGIN + _TITLE_LINE_HEIGHT * len(title_lines)
    for section, section_height in zip(sections, heights, strict=True):
        _draw_section(figure, section, top, panel_inches)
        top += section_height
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")


def _section_height(section: ImageGrid, panel_inches: float, width: float) -> float:
    rows_height = sum(panel_inches + _caption_height(row, panel_inches) for row in section.rows)
    legend_height = _TITLE_LINE_HEIGHT * math.ceil(len(section.legend) / _entries_per_line(width))
    return rows_height + _heading_height(section, width) + legend_height + _SECTION_GAP


def _entries_per_line(width: float) -> int:
    return int((width - 2 * _MARGIN) / _LEGEND_ENTRY_WIDTH)


def _heading_height(section: ImageGrid, width: float) -> float:
    return _TITLE_LINE_HEIGHT * bool(section.title) + _LINE_HEIGHT * len(_number_lines(section, width))


def _number_lines(section: ImageGrid, width: float) -> list[str]:
    return _wrap(" · ".join(f"{name} {value}" for name, value in section.numbers.items()), width - 2 * _MARGIN)


def _caption_height(row: Sequence[Panel], panel_inches: float) -> float:
    return _LINE_HEIGHT * max(len(_wrap(panel.caption, panel_inches)) for panel in row) + _GAP


def _draw_section(figure: Figure, section: ImageGrid, top: float, panel_inches: float) -> None:
    width = figure.get_figwidth()
    top += _SECTION_GAP / 2
    if section.title:
        _write(figure, _MARGIN, top, [section.title], size=9.5, weight="bold")
    numbers = _number_lines(section, width)
    _write(figure, _MARGIN, top + _TITLE_LINE_HEIGHT * bool(section.title), numbers, color=_SOFT)
    top += _heading_height(section, width) + 0.05
    for label, row in zip(section.labels, section.rows, strict=True):
        _write(figure, _MARGIN, top + panel_inches / 2 - 0.08, _wrap(label, _LABEL_WIDTH - 0.1), size=8.5)
        for column, panel in enumerate(row):
            left = _MARGIN + _LABEL_WIDTH + column * (panel_inches + _GAP)
            _draw_panel(_add_axes(figure, left, top, panel_inches), panel)
            colour = _GREEN if panel.is_correct else _SOFT
            _write(figure, left, top + panel_inches + 0.04, _wrap(panel.caption, panel_inches), color=colour)
        top += panel_inches + _caption_height(row, panel_inches)
    for number, (name, colour) in enumerate(section.legend.items()):
        line, column = divmod(number, _entries_per_line(width))
        left, entry_top = _MARGIN + column * _LEGEND_ENTRY_WIDTH, top + line * _TITLE_LINE_HEIGHT
        swatch = _add_axes(figure, left, entry_top, 0.12)
        swatch.set_axis_off()
        swatch.add_patch(Rectangle((0, 0), 1, 1, color=np.divide(colour, 255)))
        _write(figure, left + 0.17, entry_top, [name])


def _draw_panel(axis: Axes, panel: Panel) -> None:
    axis.imshow(panel.pixels, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    borders = np.arange(1, panel.grid) * len(panel.pixels) / panel.grid - 0.5
    # A light line on a wider dark one is visible on any image.
    for linewidth, colour in ((1.2, "#00000080"), (0.5, "#ffffffd0")):
        for border in borders:
            axis.axhline(border, linewidth=linewidth, color=colour)
            axis.axvline(border, linewidth=linewidth, color=colour)
    for spine in axis.spines.values():
        spine.set(color=_GREEN if panel.is_correct else "#c9d0d6", linewidth=2.5 if panel.is_correct else 0.6)


def _add_axes(figure: Figure, left: float, top: float, side: float) -> Axes:
    """Add square axes; lengths are inches from the left and top, where matplotlib counts fractions from the bottom."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))


def _write(figure: Figure, left: float, top: float, lines: list[str], **style: object) -> None:
    """Write lines of text, `left` and `top` inches from the left and upper edge of the figure."""
    width, height = figure.get_size_inches()
    style = {"size": 7.5, "color": _INK, "linespacing": 1.3} | style
    figure.text(left / width, 1 - top / height, "\n".join(lines), va="top", **style)  # type: ignore[arg-type]


def _wrap(text: str, inches: float) -> list[str]:
    return textwrap.wrap(text, max(8, int(inches * _CHARACTERS_PER_INCH)))


def require_writable(path: Path, name: str = "picture") -> None:
    """Create the folder of a file and check, before long work, that the file can be written.

    Raises:
        ValueError: if it cannot; the message names `name`, the setting that the path comes from.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"{name} must name a file in a folder that can be written to, got {str(path)!r}: {reason}"
        ) from error


def shade(pixels: UInt8[np.ndarray, "H W 3"], is_hidden: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    """Return the image with its hidden patches painted grey; `is_hidden` has the shape (grid, grid)."""
    patch_size = len(pixels) // len(is_hidden)
    hidden = np.kron(is_hidden, np.ones((patch_size, patch_size), bool))
    return np.where(hidden[..., None], np.uint8(128), pixels)
