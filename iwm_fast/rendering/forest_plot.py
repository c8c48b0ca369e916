"""Forest plots: comparisons with their intervals, as an SVG element for one claim or a PNG file for several."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from iwm_fast.rendering.figures import LIGHT, PLACEHOLDERS, Palette, save_png, style, svg_canvas, to_svg


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


def draw_forest_plot(rows: Sequence[ForestRow], *, bound: float, unit: str) -> str:
    """Draw differences with their intervals, zero and the bound marked, and return an SVG element.

    Args:
        rows: from top to bottom.
        bound: where the intervals have to lie above.
        unit: label of the x axis.
    """
    labels, places, height = _place_rows(rows, 34)
    with svg_canvas(4.6, 0.7 + 0.36 * height) as (figure, axis):
        axis.axvline(0, color=PLACEHOLDERS.ink, linewidth=0.8)
        _draw_intervals(axis, rows, places, bound, PLACEHOLDERS)
        axis.set_xlim(*_limits(rows))
        axis.set_ylim(height - 0.5, -0.5)
        axis.set_yticks(places, labels)
        # Right-aligned, because it may be wider than the axis and the labels are on the left.
        axis.set_xlabel(textwrap.fill(unit, 60), loc="right")
        axis.locator_params(axis="x", nbins=5)
        return to_svg(figure)


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
    if bound and places:
        axis.vlines(bound, min(places) - 0.45, max(places) + 0.45, color=colours.ink, linewidth=0.8, linestyle=":")
    for row, y in zip(rows, places, strict=True):
        above, below, across = colours.series[2], colours.series[1], colours.soft
        colour = above if row.low > bound else below if row.high < bound else across
        # The interval of one seed is infinite.
        if math.isfinite(row.low):
            axis.hlines(y, row.low, row.high, color=colour, linewidth=2)
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
    with matplotlib.rc_context(style(LIGHT) | {"figure.facecolor": "#ffffff", "axes.spines.left": False}):
        figure = Figure(figsize=(width, height))
        axis = figure.add_axes((0.33, 0.55 / height, 0.44, 1 - 0.65 / height))
        axis.axvline(0, color=LIGHT.ink, linewidth=0.8)
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
                *((text, "bold", 9, LIGHT.ink) for text in title),
                *((text, "normal", 8, LIGHT.soft) for text in note),
            ):
                # The white background keeps the grid lines out of the text.
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
            _draw_intervals(axis, group.rows, places, group.bound, LIGHT)
            y += rows_height + 0.7
        save_png(figure, path)
