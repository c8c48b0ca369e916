"""Figures of reports, drawn by matplotlib as SVG whose colours are the page's, or as PNG for a README."""

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
    """Colours of a figure."""

    ink: str
    soft: str
    line: str
    series: tuple[str, ...]


# found again in the SVG, where they become the page's own colours, light or dark
_OF_PAGE = Palette("#010203", "#010204", "#010205", ("#010211", "#010212", "#010213", "#010214"))
_LIGHT = Palette("#1c1c1a", "#63625d", "#dddcd6", ("#2a6fc9", "#d06a1f", "#16876a", "#9a4bb5"))
_VARIABLES = dict(
    zip((*_OF_PAGE[:3], *_OF_PAGE.series), ("ink", "soft", "line", *(f"series-{n}" for n in range(1, 5))), strict=True)
)


def _style(colours: Palette) -> Any:
    quiet = ("axes.labelcolor", "xtick.color", "ytick.color", "xtick.labelcolor", "ytick.labelcolor")
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "iwm-fast",
        "font.size": 9.0,
        "text.color": colours.ink,
        "axes.edgecolor": colours.line,
        "grid.color": colours.line,
        **dict.fromkeys(quiet, colours.soft),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }


@dataclass(frozen=True, kw_only=True)
class Dots:
    """One line of a dot plot: a value for each seed."""

    label: str
    values: Sequence[float]


@contextmanager
def _canvas(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(_style(_OF_PAGE)):
        figure = Figure(figsize=(width, height), layout="constrained")
        axis = figure.subplots()
        yield figure, axis


def _to_svg(figure: Figure) -> str:
    """Return a figure as an SVG element in the page's colours, as wide as the page lets it be."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, name in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    head, rest = svg.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest


def curves(lines: Mapping[str, tuple[Sequence[int], Sequence[float]]], *, unit: str) -> str:
    """Draw some curves over steps.

    Args:
        lines: steps and values by name, at most four.
        unit: what the values are.
    """
    with _canvas(4.6, 2.6) as (figure, axis):
        for (name, (steps, values)), colour in zip(lines.items(), _OF_PAGE.series, strict=False):
            axis.plot(steps, values, color=colour, linewidth=1.6, label=name)
        axis.set_xlabel("step")
        axis.set_ylabel(unit)
        axis.grid(axis="y", linewidth=0.6)
        if len(lines) > 1:
            axis.legend(fontsize=8)
        return _to_svg(figure)


def shares(parts: Mapping[str, float], *, unit: str) -> str:
    """Draw what makes up a whole, as bars that begin where the one before ends."""
    with _canvas(4.6, 0.5 + 0.27 * len(parts)) as (figure, axis):
        begin = 0.0
        for place, size in enumerate(parts.values()):
            axis.barh(place, size, left=begin, height=0.6, color=_OF_PAGE.series[0])
            begin += size
            axis.text(begin, place, f"  {size:.3g}", va="center", fontsize=8)
        axis.set_yticks(range(len(parts)), list(parts))
        axis.invert_yaxis()
        axis.set_xlim(0, begin * 1.15 or 1.0)
        axis.set_xlabel(unit)
        return _to_svg(figure)


def dot_plot(rows: Sequence[Dots], *, unit: str) -> str:
    """Draw one dot for each seed and a line at the mean, row by row."""
    with _canvas(4.6, 0.7 + 0.36 * len(rows)) as (figure, axis):
        _draw_dots(axis, rows, unit, _OF_PAGE)
        return _to_svg(figure)


def _draw_dots(axis: Axes, rows: Sequence[Dots], unit: str, colours: Palette) -> None:
    for place, row in enumerate(rows):
        if row.values:
            mean = sum(row.values) / len(row.values)
            axis.plot(row.values, [place] * len(row.values), "o", color=colours.series[0], markersize=5, alpha=0.75)
            axis.vlines(mean, place - 0.3, place + 0.3, color=colours.ink, linewidth=1.6)
    axis.set_yticks(range(len(rows)), [row.label for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(unit)
    axis.locator_params(axis="x", nbins=5)
    axis.grid(axis="x", linewidth=0.6)


@dataclass(frozen=True, kw_only=True)
class DotPlot:
    """One panel of a figure."""

    title: str
    note: str
    """Below the title, in soft letters."""
    unit: str
    rows: Sequence[Dots]


def save_dot_plots(path: Path, plots: Sequence[DotPlot]) -> None:
    """Write dot plots in two columns as one PNG in light colours, in rows as high as the higher of their two."""
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
            note = textwrap.fill(plot.note, 64)
            axis.set_title(plot.title, fontsize=10, loc="left", pad=9 + 10 * len(note.splitlines()))
            axis.annotate(
                note, (0, 1), (0, 5), "axes fraction", "offset points", fontsize=7.5, color=_LIGHT.soft, va="bottom"
            ).set_in_layout(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
