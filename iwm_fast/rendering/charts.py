"""Charts drawn by matplotlib: as SVG elements in the colours of the surrounding page, or as PNG files."""

import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure


class Palette(NamedTuple):
    """Colours of a chart as #rrggbb; the names are those of the CSS variables in `html`."""

    ink: str
    soft: str
    line: str
    series: tuple[str, ...]


# A page has other colours in dark mode, but matplotlib cannot write CSS variables. Charts are therefore drawn in
# colours that occur nowhere else, which `_to_svg` replaces by the variables.
_PLACEHOLDERS = Palette("#010203", "#010204", "#010205", ("#010211", "#010212", "#010213", "#010214"))
_LIGHT = Palette("#1c1c1a", "#63625d", "#dddcd6", ("#2a6fc9", "#d06a1f", "#16876a", "#9a4bb5"))
_CSS_VARIABLES = ("ink", "soft", "line", "series-1", "series-2", "series-3", "series-4")


def _style(colours: Palette) -> Any:
    """Return matplotlib's rc parameters for a palette."""
    soft_texts = ("axes.labelcolor", "xtick.color", "ytick.color", "xtick.labelcolor", "ytick.labelcolor")
    return {
        # Text stays text, in the page's font. A fixed salt makes element ids, and so the file, reproducible.
        "svg.fonttype": "none",
        "svg.hashsalt": "iwm-fast",
        "font.size": 9.0,
        "text.color": colours.ink,
        "axes.edgecolor": colours.line,
        "grid.color": colours.line,
        **dict.fromkeys(soft_texts, colours.soft),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }


@dataclass(frozen=True, kw_only=True)
class DotSeries:
    """A labelled line of a dot plot."""

    label: str
    values: Sequence[float]
    """One value per seed; may be empty."""


@contextmanager
def _canvas(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure of `width` x `height` inches and its axes; it must be drawn and saved inside the context."""
    with matplotlib.rc_context(_style(_PLACEHOLDERS)):
        figure = Figure(figsize=(width, height), layout="constrained")
        axis = figure.subplots()
        yield figure, axis


def _to_svg(figure: Figure) -> str:
    """Return a figure as an SVG element in the colours of the page, without a size of its own."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for placeholder, name in zip((*_PLACEHOLDERS[:3], *_PLACEHOLDERS.series), _CSS_VARIABLES, strict=True):
        svg = svg.replace(placeholder, f"var(--{name})")
    # Without width and height, the element is as wide as its card and keeps the aspect ratio of its viewBox.
    head, rest = svg.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest


def draw_line_chart(lines: Mapping[str, tuple[Sequence[int], Sequence[float]]], *, unit: str) -> str:
    """Draw values over steps and return an SVG element.

    Args:
        lines: steps and values, by name; at most four lines, one per colour.
        unit: label of the y axis.
    """
    with _canvas(4.6, 2.6) as (figure, axis):
        for (name, (steps, values)), colour in zip(lines.items(), _PLACEHOLDERS.series, strict=False):
            axis.plot(steps, values, color=colour, linewidth=1.6, label=name)
        axis.set_xlabel("step")
        axis.set_ylabel(unit)
        axis.grid(axis="y", linewidth=0.6)
        if len(lines) > 1:
            axis.legend(fontsize=8)
        return _to_svg(figure)


def draw_waterfall_chart(parts: Mapping[str, float], *, unit: str) -> str:
    """Draw the parts of a total as horizontal bars, each starting where the bar above ends; return an SVG element."""
    with _canvas(4.6, 0.5 + 0.27 * len(parts)) as (figure, axis):
        total = 0.0
        for y, size in enumerate(parts.values()):
            axis.barh(y, size, left=total, height=0.6, color=_PLACEHOLDERS.series[0])
            total += size
            axis.text(total, y, f"  {size:.3g}", va="center", fontsize=8)
        axis.set_yticks(range(len(parts)), list(parts))
        axis.invert_yaxis()
        # The number of the last bar is written to its right and needs 15 % of the width.
        axis.set_xlim(0, total * 1.15 or 1.0)
        axis.set_xlabel(unit)
        return _to_svg(figure)


def draw_dot_plot(rows: Sequence[DotSeries], *, unit: str) -> str:
    """Draw rows of dots, one per seed, with a vertical line at the mean of each row; return an SVG element."""
    with _canvas(4.6, 0.7 + 0.36 * len(rows)) as (figure, axis):
        _draw_dots(axis, rows, unit, _PLACEHOLDERS)
        return _to_svg(figure)


def _draw_dots(axis: Axes, rows: Sequence[DotSeries], unit: str, colours: Palette) -> None:
    for y, row in enumerate(rows):
        if row.values:
            mean = sum(row.values) / len(row.values)
            axis.plot(row.values, [y] * len(row.values), "o", color=colours.series[0], markersize=5, alpha=0.75)
            axis.vlines(mean, y - 0.3, y + 0.3, color=colours.ink, linewidth=1.6)
    axis.set_yticks(range(len(rows)), [row.label for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(unit)
    axis.locator_params(axis="x", nbins=5)
    axis.grid(axis="x", linewidth=0.6)


@dataclass(frozen=True, kw_only=True)
class DotPlot:
    """A dot plot with its title, as `save_dot_plots` draws it."""

    title: str
    note: str
    """Text between title and plot, in a soft colour."""
    unit: str
    """Label of the x axis."""
    rows: Sequence[DotSeries]


def save_dot_plots(path: Path, plots: Sequence[DotPlot]) -> None:
    """Write dot plots as one PNG file in light colours, in up to two columns; the taller of two sets their height."""
    num_columns = min(2, len(plots))
    pairs = [plots[first : first + num_columns] for first in range(0, len(plots), num_columns)]
    heights = [1.4 + 0.34 * max(len(plot.rows) for plot in pair) for pair in pairs]
    with matplotlib.rc_context(_style(_LIGHT) | {"figure.facecolor": "#ffffff"}):
        figure = Figure(figsize=(6.2 * num_columns, sum(heights)), layout="constrained")
        axes = figure.subplots(len(pairs), num_columns, squeeze=False, height_ratios=heights)
        for axis in axes.flat[len(plots) :]:
            axis.set_visible(False)
        for axis, plot in zip(axes.flat, plots, strict=False):
            _draw_dots(axis, plot.rows, plot.unit, _LIGHT)
            # The note takes no part in the layout, or it would squeeze the plot; the title's padding makes room for it.
            note = textwrap.fill(plot.note, 64)
            axis.set_title(plot.title, fontsize=10, loc="left", pad=9 + 10 * len(note.splitlines()))
            axis.annotate(
                note, (0, 1), (0, 5), "axes fraction", "offset points", fontsize=7.5, color=_LIGHT.soft, va="bottom"
            ).set_in_layout(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
