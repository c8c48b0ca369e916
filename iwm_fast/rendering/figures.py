"""Figures of matplotlib: as SVG elements in the colours of the surrounding page, or as PNG files in light colours."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image


class Palette(NamedTuple):
    """Colours of a chart as #rrggbb; the names are those of the CSS variables in `html`."""

    ink: str
    soft: str
    line: str
    series: tuple[str, ...]


# A page has other colours in dark mode, but matplotlib cannot write CSS variables. Charts are therefore drawn in
# colours that occur nowhere else, which `to_svg` replaces by the variables.
PLACEHOLDERS = Palette("#010203", "#010204", "#010205", ("#010211", "#010212", "#010213", "#010214"))
LIGHT = Palette("#1c1c1a", "#63625d", "#dddcd6", ("#2a6fc9", "#d06a1f", "#16876a", "#9a4bb5"))
_CSS_VARIABLES = ("ink", "soft", "line", "series-1", "series-2", "series-3", "series-4")


def style(colours: Palette) -> Any:
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


@contextmanager
def svg_canvas(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure of `width` x `height` inches and its axes; it must be drawn and saved inside the context."""
    with matplotlib.rc_context(style(PLACEHOLDERS)):
        figure = Figure(figsize=(width, height), layout="constrained")
        axis = figure.subplots()
        yield figure, axis


def to_svg(figure: Figure) -> str:
    """Return a figure as an SVG element in the colours of the page, without a size of its own."""
    text = io.StringIO()
    # Without the metadata, which are longer than the marks of a small chart and change with the date.
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for placeholder, name in zip((*PLACEHOLDERS[:3], *PLACEHOLDERS.series), _CSS_VARIABLES, strict=True):
        svg = svg.replace(placeholder, f"var(--{name})")
    # Without width and height, the element is as wide as its card and keeps the aspect ratio of its viewBox.
    head, rest = svg.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file of 110 pixels per inch; its folder is created.

    The file has a palette of 64 colours, which suffice for charts and make it half as large.
    """
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png", dpi=110)
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(pixels) as image:
        image.convert("RGB").quantize(64).save(path, format="PNG", optimize=True)
