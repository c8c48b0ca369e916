"""The pictures of `imagine` as one self-contained page: light or dark as the reader's machine is, for any width."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from iwm_fast.pipelines.storage.atomic import replace_file
from iwm_fast.rendering.image_grid import Panel, Section

# smaller images are kept to the bit and shown with sharp pixels; a photograph would be ten times as large as JPEG
_SMALL = 96

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f8fa; --ink: #1b1f24; --soft: #5b6570; --line: #d5dbe1;
  --right: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --paper: #0f1317; --card: #181e24; --ink: #e8ecf0; --soft: #9aa6b2;
  --line: #323c46; --right: #4cc36b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 16px 48px; max-width: 1180px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 1.05rem; margin: 0 0 8px; }
p { margin: 0 0 12px; max-width: 75ch; }
.soft { color: var(--soft); }
section { margin-top: 20px; padding: 16px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
dl { display: flex; flex-wrap: wrap; gap: 4px 24px; margin: 0 0 14px; font-size: 0.87rem; }
dl div { display: flex; flex-wrap: wrap; gap: 0 6px; }
dt { color: var(--soft); }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.cases { display: grid; gap: 10px; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
.case { display: grid; gap: 10px; grid-template-rows: subgrid; grid-row: span var(--rows); }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; border-radius: 4px; outline: 1px solid var(--line); outline-offset: -1px; }
img.small { image-rendering: pixelated; }
.right img { outline: 3px solid var(--right); outline-offset: -1px; }
.right .found { color: var(--right); font-weight: 600; }
figcaption { margin-top: 4px; font-size: 0.78rem; line-height: 1.35; overflow-wrap: anywhere; }
.role { display: block; color: var(--soft); }
@media (max-width: 600px) {
  body { padding: 16px 10px 32px; }
  section { padding: 12px 10px; }
  .cases { grid-template-columns: minmax(0, 1fr); gap: 14px; }
  .case { grid-template-rows: none; grid-row: auto; grid-template-columns: repeat(var(--rows), minmax(0, 1fr));
    gap: 8px; }
  .case + .case { border-top: 1px solid var(--line); padding-top: 14px; }
}
"""


def write_page(path: Path, sections: Sequence[Section], title: str, run: str) -> None:
    """Write the page; its pictures are inside it, so that it can be sent as one file."""
    body = "\n".join(_section(section) for section in sections)
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(run)}: what the world model imagines</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>What the world model of {html.escape(run)} imagines</h1>
<p class="soft">{html.escape(title)}.</p>
<p>From the <b>source</b> image's tokens and the change <b>asked for</b>, the predictor says which tokens the changed
image has. They are looked up among versions of that image: the nearest is <b>retrieved</b>. A green frame says that it
is the right one. Images are spread evenly over the validation set and not picked.</p>
{body}
</body>
</html>
"""
    replace_file(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def _section(section: Section) -> str:
    cases = zip(*section.rows, strict=True)
    shown = "\n".join(_case(panels, section.labels) for panels in cases)
    numbers = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in section.numbers.items()
    )
    size = f"--columns: {len(section.rows[0])}; --rows: {len(section.rows)}"
    return "\n".join(
        (
            "<section>",
            f"<h2>{html.escape(section.title)}</h2>" if section.title else "",
            f"<dl>{numbers}</dl>" if numbers else "",
            f'<div class="cases" style="{size}">\n{shown}\n</div>',
            "</section>",
        )
    )


def _case(panels: Sequence[Panel], labels: Sequence[str]) -> str:
    return '<div class="case">' + "".join(map(_figure, panels, labels)) + "</div>"


def _figure(panel: Panel, label: str) -> str:
    words = html.escape(panel.caption)
    is_small = ' class="small"' if len(panel.pixels) <= _SMALL else ""
    image = f'<img{is_small} src="{_data_uri(panel.pixels)}" alt="{html.escape(f"{label}: {panel.caption}")}">'
    caption = f'<span class="role">{html.escape(label)}</span><span class="found">{words}</span>'
    is_right = ' class="right"' if panel.is_right else ""
    return f"<figure{is_right}>{image}<figcaption>{caption}</figcaption></figure>"


def _data_uri(pixels: UInt8[np.ndarray, "H W 3"]) -> str:
    kind = "PNG" if len(pixels) <= _SMALL else "JPEG"
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
