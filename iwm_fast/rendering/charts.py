"""Charts drawn by matplotlib: as SVG elements in the colours of the surrounding page, or as PNG files."""

import io
import math
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
class ForestRow:
    """One comparison of a forest plot: a mean difference with its interval, and the differences that it is the mean of.

    The ends of the interval may be infinite.
    """

    label: str
    mean: float
    low: float
    high: float
    differences: Sequence[float]
    """One value per seed."""


@dataclass(frozen=True, kw_only=True)
class ForestGroup:
    """The comparisons of one claim, as `save_forest_plot` draws them."""

    title: str
    verdict: str
    note: str
    """Text below the title, in a soft colour."""
    bound: float
    """Where the intervals have to lie above; marked if it is not zero."""
    rows: Sequence[ForestRow]


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
            # Above the axes, where it covers no curve.
            figure.legend(loc="outside upper left", fontsize=8)
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


def draw_forest_plot(rows: Sequence[ForestRow], *, bound: float, unit: str) -> str:
    """Draw differences with their intervals, zero and the bound marked, and return an SVG element.

    Args:
        rows: from top to bottom.
        bound: where the intervals have to lie above.
        unit: label of the x axis.
    """
    with _canvas(4.6, 0.7 + 0.36 * len(rows)) as (figure, axis):
        places = [float(number) for number in range(len(rows))]
        _draw_intervals(axis, rows, places, bound, _PLACEHOLDERS)
        axis.set_xlim(*_limits(rows))
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_yticks(places, [row.label for row in rows])
        axis.set_xlabel(unit)
        axis.locator_params(axis="x", nbins=5)
        return _to_svg(figure)


def _draw_intervals(
    axis: Axes, rows: Sequence[ForestRow], places: Sequence[float], bound: float, colours: Palette
) -> None:
    """Draw a line of each row at its height in `places`, in a colour for above, below or across the bound."""
    axis.axvline(0, color=colours.ink, linewidth=0.8)
    if bound and places:
        axis.vlines(bound, min(places) - 0.45, max(places) + 0.45, color=colours.ink, linewidth=0.8, linestyle=":")
    left, right = _limits(rows)
    for row, y in zip(rows, places, strict=True):
        above, below, across = colours.series[2], colours.series[1], colours.soft
        colour = above if row.low > bound else below if row.high < bound else across
        # An interval of one seed is infinite; it ends at the border of the plot.
        axis.hlines(y, max(row.low, left), min(row.high, right), color=colour, linewidth=2)
        axis.plot(row.differences, [y + 0.22] * len(row.differences), "o", color=colour, markersize=2.5, alpha=0.7)
        axis.plot([row.mean], [y], "s", color=colour, markersize=6)
    axis.grid(axis="x", linewidth=0.6)


def _limits(rows: Sequence[ForestRow]) -> tuple[float, float]:
    """Return the ends of an x axis that shows zero, all differences and all finite ends of intervals."""
    values = [0.0, *(value for row in rows for value in (row.low, row.high, *row.differences) if math.isfinite(value))]
    margin = 0.06 * (max(values) - min(values) or 1.0)
    return min(values) - margin, max(values) + margin


def save_forest_plot(path: Path, groups: Sequence[ForestGroup], *, unit: str) -> None:
    """Write a forest plot of all groups, on one axis and in light colours, as a PNG file of 1,200 pixels' width."""
    width, line_height = 10.9, 0.27
    notes = [textwrap.wrap(group.note, 120) for group in groups]
    titles = [textwrap.wrap(group.title, 95) for group in groups]
    num_lines = sum(
        len(title) + len(note) + len(group.rows) + 0.7 for title, note, group in zip(titles, notes, groups, strict=True)
    )
    height = line_height * num_lines + 0.7
    rows = [row for group in groups for row in group.rows]
    with matplotlib.rc_context(_style(_LIGHT) | {"figure.facecolor": "#ffffff", "axes.spines.left": False}):
        figure = Figure(figsize=(width, height))
        axis = figure.add_axes((0.33, 0.55 / height, 0.44, 1 - 0.65 / height))
        axis.set_xlim(*_limits(rows))
        axis.set_ylim(num_lines, -0.3)
        axis.set_yticks([])
        axis.set_xlabel(unit)
        # Texts stand beside the axis: x in widths of the axis, y in lines.
        beside = axis.get_yaxis_transform()
        y = 0.0
        for group, title, note in zip(groups, titles, notes, strict=True):
            axis.text(1.02, y, group.verdict, transform=beside, va="center", fontweight="bold")
            for line, weight, size, colour in (
                *((text, "bold", 9, _LIGHT.ink) for text in title),
                *((text, "normal", 8, _LIGHT.soft) for text in note),
            ):
                # On white, because the lines of the axis pass behind the text.
                axis.text(
                    -0.73, y, line, transform=beside, va="center", backgroundcolor="#ffffff",
                    fontweight=weight, fontsize=size, color=colour,
                )  # fmt: skip
                y += 1
            places = [y + number for number in range(len(group.rows))]
            for row, place in zip(group.rows, places, strict=True):
                axis.text(-0.02, place, row.label, transform=beside, va="center", ha="right", fontsize=8)
                ends = f"  ({row.low:+.3f} to {row.high:+.3f})" if math.isfinite(row.low) else "  (one seed)"
                axis.text(1.02, place, f"{row.mean:+.3f}{ends}", transform=beside, va="center", fontsize=8)
            _draw_intervals(axis, group.rows, places, group.bound, _LIGHT)
            y += len(group.rows) + 0.7
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
