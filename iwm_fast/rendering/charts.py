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
import numpy as np
from jaxtyping import Float32
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


class IntervalPoint(NamedTuple):
    """A value with the ends of its interval, at a place on the x axis."""

    x: float
    value: float
    low: float
    high: float


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
    # Without the metadata, which are longer than the marks of a small chart and change with the date.
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
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


def draw_scatter_chart(points: Sequence[tuple[float, float]], *, x_label: str, y_label: str) -> str:
    """Draw points and return an SVG element."""
    with _canvas(4.6, 2.6) as (figure, axis):
        axis.plot(*zip(*points, strict=True), "o", color=_PLACEHOLDERS.series[0], markersize=4, alpha=0.7)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.grid(linewidth=0.6)
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
    labels, places, height = _place_rows(rows, 34)
    with _canvas(4.6, 0.7 + 0.36 * height) as (figure, axis):
        _draw_intervals(axis, rows, places, bound, _PLACEHOLDERS)
        axis.set_xlim(*_limits(rows))
        axis.set_ylim(height - 0.5, -0.5)
        axis.set_yticks(places, labels)
        # Right-aligned, because it may be wider than the axis and the labels are on the left.
        axis.set_xlabel(textwrap.fill(unit, 60), loc="right")
        axis.locator_params(axis="x", nbins=5)
        return _to_svg(figure)


def _place_rows(rows: Sequence[ForestRow], width: int) -> tuple[list[str], list[float], float]:
    """Return the labels in lines of `width` characters, the rows' places from the top, and the height of all rows.

    A row of one line has the height 1, and a first row of that height the place 0.
    """
    labels, places, height = [], [], 0.0
    for row in rows:
        lines = textwrap.wrap(row.label, width)
        row_height = max(1.0, 0.6 * len(lines))
        labels.append("\n".join(lines))
        places.append(height + (row_height - 1) / 2)
        height += row_height
    return labels, places, height


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
    placed = [_place_rows(group.rows, 58) for group in groups]
    num_lines = sum(
        len(title) + len(note) + rows_height + 0.7
        for title, note, (_, _, rows_height) in zip(titles, notes, placed, strict=True)
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
        for group, title, note, (labels, offsets, rows_height) in zip(groups, titles, notes, placed, strict=True):
            axis.text(1.02, y, group.verdict, transform=beside, va="center", fontweight="bold")
            for line, weight, size, colour in (
                *((text, "bold", 9, _LIGHT.ink) for text in title),
                *((text, "normal", 8, _LIGHT.soft) for text in note),
            ):
                # The white background hides the grid lines behind the text.
                axis.text(
                    -0.73, y, line, transform=beside, va="center", backgroundcolor="#ffffff",
                    fontweight=weight, fontsize=size, color=colour,
                )  # fmt: skip
                y += 1
            places = [y + offset for offset in offsets]
            for row, label, place in zip(group.rows, labels, places, strict=True):
                axis.text(-0.02, place, label, transform=beside, va="center", ha="right", fontsize=8)
                ends = f"  ({row.low:+.3f} to {row.high:+.3f})" if math.isfinite(row.low) else "  (one seed)"
                axis.text(1.02, place, f"{row.mean:+.3f}{ends}", transform=beside, va="center", fontsize=8)
            _draw_intervals(axis, group.rows, places, group.bound, _LIGHT)
            y += rows_height + 0.7
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


@dataclass(frozen=True, kw_only=True)
class RecoveryPlot:
    """Asked-for, or true, against recovered values, with the identity line and the line of no change."""

    title: str
    note: str
    """Text above the plot, in a soft colour."""
    limits: tuple[float, float]
    """Range of the parameter."""
    no_change: float
    """Value that changes nothing."""
    x_label: str
    """Name of the values on the x axis."""
    asked: Float32[np.ndarray, "images"]
    recovered: Mapping[str, Float32[np.ndarray, "images"]]
    """Recovered values by the name of the series; at most four."""


@dataclass(frozen=True, kw_only=True)
class RankHistogram:
    """How often the correct answer has each rank, with the share that each rank has by chance."""

    title: str
    note: str
    """Text above the plot, in a soft colour."""
    num_candidates: int
    """The last rank."""
    ranks: Mapping[str, Float32[np.ndarray, "queries"]]
    """Ranks, from 1, by the name of the series; at most four."""


@dataclass(frozen=True, kw_only=True)
class IntervalChart:
    """Values with their intervals over a logarithmic axis; the points of a series are joined by lines."""

    title: str
    note: str
    """Text above the plot, in a soft colour."""
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[IntervalPoint]]
    """Points by the name of the series. The fifth series has the colour of the first one and another marker."""


Plot = RecoveryPlot | RankHistogram | IntervalChart
# More bars could not be told apart.
_MAX_BINS = 64
_MAX_TICKS = 6


def draw_plot(plot: Plot) -> str:
    """Return a plot as an SVG element, without its title and note."""
    with _canvas(4.6, 3.4) as (figure, axis):
        _draw_plot(axis, plot, _PLACEHOLDERS)
        return _to_svg(figure)


def save_plots(path: Path, plots: Sequence[Plot], title: str) -> None:
    """Write plots as one PNG file in light colours, in up to three columns."""
    num_columns = min(3, len(plots))
    num_rows = -(-len(plots) // num_columns)
    with matplotlib.rc_context(_style(_LIGHT) | {"figure.facecolor": "#ffffff"}):
        figure = Figure(figsize=(4.4 * num_columns, 0.4 + 4.2 * num_rows), layout="constrained")
        figure.suptitle(textwrap.fill(title, 58 * num_columns), fontsize=10.5)
        axes = figure.subplots(num_rows, num_columns, squeeze=False)
        for axis in axes.flat[len(plots) :]:
            axis.set_visible(False)
        for axis, plot in zip(axes.flat, plots, strict=False):
            _draw_plot(axis, plot, _LIGHT)
            _set_title(axis, plot.title, plot.note, 64)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def _draw_plot(axis: Axes, plot: Plot, colours: Palette) -> None:
    if isinstance(plot, IntervalChart):
        _draw_interval_series(axis, plot, colours)
    elif isinstance(plot, RecoveryPlot):
        _draw_recovery(axis, plot, colours)
        axis.locator_params(axis="x", nbins=7)
    else:
        _draw_histogram(axis, plot, colours)
        axis.locator_params(axis="x", nbins=7)
    axis.grid(linewidth=0.6)
    axis.set_axisbelow(True)
    # Below the axes, where it covers no points.
    axis.legend(
        fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, columnspacing=1.2, handlelength=1.6
    )


def _draw_recovery(axis: Axes, plot: RecoveryPlot, colours: Palette) -> None:
    axis.axline((plot.no_change, plot.no_change), slope=1, color=colours.ink, linewidth=1.0, label="identity")
    axis.axhline(plot.no_change, color=colours.ink, linewidth=1.0, linestyle="--", label="no change")
    for (name, values), colour in zip(plot.recovered.items(), colours.series, strict=False):
        axis.plot(plot.asked, values, "o", color=colour, markersize=3.5, alpha=0.6, markeredgewidth=0, label=name)
    margin = 0.05 * (plot.limits[1] - plot.limits[0])
    limits = plot.limits[0] - margin, plot.limits[1] + margin
    axis.set(xlim=limits, ylim=limits, xlabel=plot.x_label, ylabel="recovered")


def _draw_histogram(axis: Axes, plot: RankHistogram, colours: Palette) -> None:
    # Ranks from first + 1/2 to last + 1/2 share a bin; a tie may give half a rank, which counts as the next one.
    edges = np.unique(np.linspace(0, plot.num_candidates, min(plot.num_candidates, _MAX_BINS) + 1).round()) + 0.5
    for (name, ranks), colour in zip(plot.ranks.items(), colours.series, strict=False):
        counts, _ = np.histogram(ranks, edges)
        axis.stairs(counts / len(ranks) / np.diff(edges), edges, color=colour, linewidth=1.6, label=name)
    axis.axhline(1 / plot.num_candidates, color=colours.ink, linewidth=1.0, linestyle="--", label="by chance")
    axis.set(xlabel=f"rank among {plot.num_candidates}", ylabel="share of queries", ylim=(0, None))


def _draw_interval_series(axis: Axes, plot: IntervalChart, colours: Palette) -> None:
    for number, (name, points) in enumerate(plot.series.items()):
        x, value, low, high = np.array(sorted(points)).T
        axis.errorbar(
            x, value, (value - low, high - value), label=name, color=colours.series[number % len(colours.series)],
            marker="osD"[number // len(colours.series)], linewidth=1.4, markersize=4, capsize=2,
        )  # fmt: skip
    axis.set(xscale="log", xlabel=plot.x_label, ylabel=plot.y_label)
    places = sorted({point.x for points in plot.series.values() for point in points})
    if len(places) <= _MAX_TICKS:
        # At the points, instead of at powers of ten.
        axis.set_xticks(places, [f"{place:,g}" for place in places])
        axis.minorticks_off()


def _set_title(axis: Axes, title: str, note: str, width: int) -> None:
    """Write a title above a plot, and between them a note in a soft colour, broken into lines of `width` characters."""
    # The note takes no part in the layout, or it would squeeze the plot; the title's padding makes room for it.
    note = textwrap.fill(note, width)
    axis.set_title(title, fontsize=10, loc="left", pad=9 + 10 * len(note.splitlines()))
    axis.annotate(
        note, (0, 1), (0, 5), "axes fraction", "offset points", fontsize=7.5, color=_LIGHT.soft, va="bottom"
    ).set_in_layout(False)
