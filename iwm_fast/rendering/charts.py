"""Charts drawn by matplotlib: as SVG elements in the colours of the surrounding page, or as PNG files."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float32
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from iwm_fast.rendering.figures import LIGHT, PLACEHOLDERS, Palette, save_png, style, svg_canvas, to_svg


class IntervalPoint(NamedTuple):
    """A value with the ends of its interval, at a place on the x axis."""

    x: float
    value: float
    low: float
    high: float


def draw_line_chart(lines: Mapping[str, tuple[Sequence[int], Sequence[float]]], *, unit: str) -> str:
    """Draw values over steps and return an SVG element.

    Args:
        lines: steps and values, by name; at most four lines, one per colour.
        unit: label of the y axis.
    """
    with svg_canvas(4.6, 2.6) as (figure, axis):
        for (name, (steps, values)), colour in zip(lines.items(), PLACEHOLDERS.series, strict=False):
            axis.plot(steps, values, color=colour, linewidth=1.6, label=name)
        axis.set_xlabel("step")
        axis.set_ylabel(unit)
        axis.grid(axis="y", linewidth=0.6)
        if len(lines) > 1:
            # Above the axes, where it covers no curve.
            figure.legend(loc="outside upper left", fontsize=8)
        return to_svg(figure)


def draw_scatter_chart(points: Sequence[tuple[float, float]], *, x_label: str, y_label: str) -> str:
    """Draw points and return an SVG element."""
    with svg_canvas(4.6, 2.6) as (figure, axis):
        axis.plot(*zip(*points, strict=True), "o", color=PLACEHOLDERS.series[0], markersize=4, alpha=0.7)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.grid(linewidth=0.6)
        return to_svg(figure)


def draw_waterfall_chart(parts: Mapping[str, float], *, unit: str) -> str:
    """Draw the parts of a total as horizontal bars, each starting where the bar above ends; return an SVG element."""
    with svg_canvas(4.6, 0.5 + 0.27 * len(parts)) as (figure, axis):
        total = 0.0
        for y, size in enumerate(parts.values()):
            axis.barh(y, size, left=total, height=0.6, color=PLACEHOLDERS.series[0])
            total += size
            axis.text(total, y, f"  {size:.3g}", va="center", fontsize=8)
        axis.set_yticks(range(len(parts)), list(parts))
        axis.invert_yaxis()
        # The number of the last bar is written to its right and needs 15 % of the width.
        axis.set_xlim(0, total * 1.15 or 1.0)
        axis.set_xlabel(unit)
        return to_svg(figure)


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
    """Points by the name of the series. The fifth series has the colour of the first one and another marker. After the
    twelfth, both repeat."""


Plot = RecoveryPlot | RankHistogram | IntervalChart
# More bars could not be told apart.
_MAX_BINS = 64
_MAX_TICKS = 6


def draw_plot(plot: Plot) -> str:
    """Return a plot as an SVG element, without its title and note."""
    with svg_canvas(4.6, 3.4) as (figure, axis):
        _draw_plot(axis, plot, PLACEHOLDERS)
        return to_svg(figure)


def save_plots(path: Path, plots: Sequence[Plot], title: str) -> None:
    """Write plots as one PNG file in light colours, in up to three columns."""
    num_columns = min(3, len(plots))
    num_rows = -(-len(plots) // num_columns)
    with matplotlib.rc_context(style(LIGHT) | {"figure.facecolor": "#ffffff"}):
        figure = Figure(figsize=(4.4 * num_columns, 0.4 + 4.2 * num_rows), layout="constrained")
        figure.suptitle(textwrap.fill(title, 58 * num_columns), fontsize=10.5)
        axes = figure.subplots(num_rows, num_columns, squeeze=False)
        for axis in axes.flat[len(plots) :]:
            axis.set_visible(False)
        for axis, plot in zip(axes.flat, plots, strict=False):
            _draw_plot(axis, plot, LIGHT)
            _set_title(axis, plot.title, plot.note, 64)
        save_png(figure, path)


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
        # The interval of a skewed bootstrap may leave its value out; matplotlib refuses negative lengths.
        errors = np.maximum((value - low, high - value), 0)
        axis.errorbar(
            x, value, errors, label=name, color=colours.series[number % len(colours.series)],
            marker="osD"[number // len(colours.series) % 3], linewidth=1.4, markersize=4, capsize=2,
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
        note, (0, 1), (0, 5), "axes fraction", "offset points", fontsize=7.5, color=LIGHT.soft, va="bottom"
    ).set_in_layout(False)
