"""Self-contained HTML pages with a common style, for light and dark mode and for any screen width, without scripts."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from iwm_fast.pipelines.errors import printable_lines

_STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --card: #ffffff; --ink: #1c1c1a; --soft: #63625d; --line: #dddcd6;
  --series-1: #2a6fc9; --series-2: #d06a1f; --series-3: #16876a; --series-4: #9a4bb5; --good: #16794f; --bad: #b3341f;
  --open: #8a6a12; }
@media (prefers-color-scheme: dark) { :root { --paper: #191918; --card: #222220; --ink: #ecebe6; --soft: #a5a49d;
  --line: #3b3a36; --series-1: #6ea8f2; --series-2: #f0995a; --series-3: #4cc29f; --series-4: #c78ae0; --good: #5cc795;
  --bad: #f08a76; --open: #d9b65a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; } p { margin: .3rem 0; max-width: 46rem; } .soft { color: var(--soft); }
small, .small { font-size: .85rem; }
.grid { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.tiles { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); margin-top: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; min-width: 0; }
.tile b { display: block; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } svg { display: block; width: 100%; max-width: 34rem; height: auto; }
img { display: block; width: 100%; min-width: 40rem; height: auto; } section > .card + .card { margin-top: .8rem; }
svg text { fill: var(--ink); font-family: system-ui, sans-serif; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: .3rem .7rem .3rem 0; vertical-align: top; border-bottom: 1px solid var(--line); }
 td.number, th.number { text-align: right; }
.arms td:first-child, .arms th:first-child { position: sticky; left: 0; background: var(--card); }
.arms { width: auto; } .arms td + td, .arms th + th { text-align: right; padding-left: 1rem; }
pre { overflow-x: auto; font-size: .8rem; margin: .5rem 0; } summary { cursor: pointer; }
.holds { color: var(--good); } .fails { color: var(--bad); } .undecided, .not-measured { color: var(--open); }
.verdict { font-weight: 600; }
"""


def page(title: str, body: Iterable[str], style: str = "") -> str:
    """Return a complete HTML document; `style` is CSS that follows the rules common to all pages."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def escape(text: object) -> str:
    """Return text in printable characters, with those that HTML reserves, quotes included, replaced by entities."""
    return html.escape(printable_lines(str(text)))


def section(title: str, *parts: str) -> str:
    """Return a section with a heading; `parts` are HTML, `title` is text."""
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(parts) + "</section>"


def card(title: str, *parts: str) -> str:
    """Return a framed box with a small heading; `parts` are HTML, `title` is text."""
    return f'<div class="card"><h3>{escape(title)}</h3>\n' + "\n".join(parts) + "</div>"


def metric_tiles(values: dict[str, str]) -> str:
    """Return the most important numbers of a page in large letters; `values` maps captions to numbers as text."""
    boxes = "".join(
        f'<div class="card tile"><b>{escape(value)}</b><span class="soft small">{escape(name)}</span></div>'
        for name, value in values.items()
    )
    return f'<div class="tiles">{boxes}</div>'


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], css_class: str = "") -> str:
    """Return a table that scrolls sideways if it is too wide; columns of numbers are aligned to the right.

    With the class "arms", its first column stays in view and all others are aligned to the right.
    """
    cells = [list(row) for row in rows]
    is_number = [bool(cells) and all(_is_numeric(row[index]) for row in cells) for index in range(len(columns))]
    classes = [' class="number"' if numeric else "" for numeric in is_number]
    head = "".join(f"<th{css}>{escape(name)}</th>" for css, name in zip(classes, columns, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{css}>{escape(cell)}</td>" for css, cell in zip(classes, row, strict=True)) + "</tr>\n"
        for row in cells
    )
    opening = f'<table class="{css_class}">' if css_class else "<table>"
    return f'<div class="scroll">{opening}<tr>{head}</tr>\n{body}</table></div>'


def _is_numeric(cell: object) -> bool:
    # The first character decides, so that "0.40 to 0.46" and "12.5 %" are aligned like numbers.
    return str(cell) == "" or str(cell)[0] in "0123456789-+±"


def embedded_png(path: Path, description: str) -> str:
    """Return a PNG file as an image inside the page; on narrow screens it scrolls instead of shrinking further."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<div class="scroll"><img alt="{escape(description)}" src="data:image/png;base64,{data}"></div>'


def collapsible(title: str, text: str) -> str:
    """Return preformatted text that is hidden until its title is clicked."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
