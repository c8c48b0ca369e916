"""The pictures of `imagine` as one self-contained page: light or dark as the reader's machine is, for any width."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from iwm_fast.pipelines.storage.atomic import replace_file
from iwm_fast.rendering.html import escape, page
from iwm_fast.rendering.image_grid import Panel, Section

# smaller images are kept to the bit and shown with sharp pixels; a photograph would be ten times as large as JPEG
_SMALL = 96

# what this page has beside the rules that all pages share
_STYLE = """
section { margin-top: 1.2rem; padding: 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
section h2 { margin: 0 0 .5rem; }
dl { display: flex; flex-wrap: wrap; gap: 4px 24px; margin: 0 0 14px; font-size: 0.87rem; }
dl div { display: flex; flex-wrap: wrap; gap: 0 6px; }
dt { color: var(--soft); }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.cases { display: grid; gap: 10px; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
.case { display: grid; gap: 10px; grid-template-rows: subgrid; grid-row: span var(--rows); }
figure { margin: 0; min-width: 0; }
img { min-width: 0; border-radius: 4px; outline: 1px solid var(--line); outline-offset: -1px; }
img.small { image-rendering: pixelated; }
.right img { outline: 3px solid var(--good); }
.right .found { color: var(--good); font-weight: 600; }
figcaption { margin-top: 4px; font-size: 0.78rem; line-height: 1.35; overflow-wrap: anywhere; }
.role { display: block; color: var(--soft); }
@media (max-width: 600px) {
  .cases { grid-template-columns: minmax(0, 1fr); gap: 14px; }
  .case { grid-template-rows: none; grid-row: auto; grid-template-columns: repeat(var(--rows), minmax(0, 1fr));
    gap: 8px; }
  .case + .case { border-top: 1px solid var(--line); padding-top: 14px; }
}
"""
_INTRODUCTION = """<p>From the <b>source</b> image's tokens and the change <b>asked for</b>, the predictor says which
tokens the changed image has. They are looked up among versions of that image: the nearest is <b>retrieved</b>. A green
frame says that it is the right one. Images are spread evenly over the validation set and not picked.</p>"""


def write_page(path: Path, sections: Sequence[Section], title: str, run: str) -> None:
    """Write the page; its pictures are inside it, so that it can be sent as one file."""
    head = [f"<h1>What the world model of {escape(run)} imagines</h1>", f'<p class="soft">{escape(title)}.</p>']
    body = [*head, _INTRODUCTION, *map(_section, sections)]
    text = page(f"{run}: what the world model imagines", body, _STYLE)
    replace_file(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def _section(section: Section) -> str:
    cases = zip(*section.rows, strict=True)
    shown = "\n".join(_case(panels, section.labels) for panels in cases)
    numbers = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in section.numbers.items()
    )
    size = f"--columns: {len(section.rows[0])}; --rows: {len(section.rows)}"
    return "\n".join(
        (
            "<section>",
            f"<h2>{escape(section.title)}</h2>" if section.title else "",
            f"<dl>{numbers}</dl>" if numbers else "",
            f'<div class="cases" style="{size}">\n{shown}\n</div>',
            "</section>",
        )
    )


def _case(panels: Sequence[Panel], labels: Sequence[str]) -> str:
    return '<div class="case">' + "".join(map(_figure, panels, labels)) + "</div>"


def _figure(panel: Panel, label: str) -> str:
    words = escape(panel.caption)
    is_small = ' class="small"' if len(panel.pixels) <= _SMALL else ""
    image = f'<img{is_small} src="{_data_uri(panel.pixels)}" alt="{escape(f"{label}: {panel.caption}")}">'
    caption = f'<span class="role">{escape(label)}</span><span class="found">{words}</span>'
    is_right = ' class="right"' if panel.is_right else ""
    return f"<figure{is_right}>{image}<figcaption>{caption}</figcaption></figure>"


def _data_uri(pixels: UInt8[np.ndarray, "H W 3"]) -> str:
    kind = "PNG" if len(pixels) <= _SMALL else "JPEG"
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
