"""The page of `iwm imagine`: one self-contained HTML file, for light and dark mode and any width."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from iwm_fast.pipelines.storage.atomic import replace_file
from iwm_fast.rendering.charts import Plot, draw_plot
from iwm_fast.rendering.html import card, escape, page, section
from iwm_fast.rendering.image_grid import ImageGrid, Panel

# Images up to this many pixels high are embedded as PNG and enlarged with sharp pixels. Larger photographs are embedded
# as JPEG, because PNG would make them about ten times as large.
_MAX_PNG_HEIGHT = 96

# Rules of this page, added to those of all pages. On narrow screens each example takes a row of its own.
_STYLE = """
section { margin-top: 1.2rem; padding: 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
section h2 { margin: 0 0 .5rem; }
dl { display: flex; flex-wrap: wrap; gap: 4px 24px; margin: 0 0 14px; font-size: 0.87rem; }
dl div { display: flex; flex-wrap: wrap; gap: 0 6px; }
dt { color: var(--soft); }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.examples { display: grid; gap: 10px; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
.example { display: grid; gap: 10px; grid-template-rows: subgrid; grid-row: span var(--rows); }
figure { margin: 0; min-width: 0; }
img { min-width: 0; border-radius: 4px; outline: 1px solid var(--line); outline-offset: -1px; }
img.small { image-rendering: pixelated; }
.right img { outline: 3px solid var(--good); }
.right .caption { color: var(--good); font-weight: 600; }
figcaption { margin-top: 4px; font-size: 0.78rem; line-height: 1.35; overflow-wrap: anywhere; }
.role { display: block; color: var(--soft); }
@media (max-width: 600px) {
  .examples { grid-template-columns: minmax(0, 1fr); gap: 14px; }
  .example { grid-template-rows: none; grid-row: auto; grid-template-columns: repeat(auto-fill, minmax(90px, 1fr));
    gap: 8px; }
  .example + .example { border-top: 1px solid var(--line); padding-top: 14px; }
}
"""
_INTRODUCTION = """<p>From the tokens of the <b>source</b> image and the change <b>asked for</b>, the predictor computes
the tokens of the changed image. The version of the image whose tokens are nearest to them is <b>retrieved</b>. A green
frame marks a correct retrieval. What the pixel decoder, if there is one, makes of the predicted tokens is
<b>imagined</b>; the decoder invents nothing, so blur and grey are what the tokens leave open. Images are chosen for
their colours, not for what was predicted.</p>
<p>The <b>absolute</b> readout takes the prediction as it is. The <b>difference</b> readout takes the prediction for the
change, minus the prediction for no change, plus the tokens of the source itself.</p>"""


def write_imagine_page(
    path: Path, sections: Sequence[ImageGrid], plots: Sequence[Plot], title: str, *, run: str
) -> None:
    """Write the page of a run as one HTML file with embedded images; `title` is the sentence below its heading."""
    head = [f"<h1>What the world model of {escape(run)} imagines</h1>", f'<p class="soft">{escape(title)}.</p>']
    cards = [card(plot.title, f'<p class="soft small">{escape(plot.note)}</p>', draw_plot(plot)) for plot in plots]
    grids = [section("Over many images", '<div class="grid">', *cards, "</div>")] if cards else []
    body = [*head, _INTRODUCTION, *map(_section, sections), *grids]
    text = page(f"{run}: what the world model imagines", body, _STYLE)
    replace_file(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def _section(grid: ImageGrid) -> str:
    # The grid has an element per column, because panels of an example must stay together on narrow screens.
    examples = "\n".join(_example(panels, grid.labels) for panels in zip(*grid.rows, strict=True))
    numbers = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in grid.numbers.items()
    )
    size = f"--columns: {len(grid.rows[0])}; --rows: {len(grid.rows)}"
    return "\n".join(
        (
            "<section>",
            f"<h2>{escape(grid.title)}</h2>" if grid.title else "",
            f"<dl>{numbers}</dl>" if numbers else "",
            f'<div class="examples" style="{size}">\n{examples}\n</div>',
            "</section>",
        )
    )


def _example(panels: Sequence[Panel], labels: Sequence[str]) -> str:
    return '<div class="example">' + "".join(map(_figure, panels, labels)) + "</div>"


def _figure(panel: Panel, label: str) -> str:
    image_class = ' class="small"' if len(panel.pixels) <= _MAX_PNG_HEIGHT else ""
    image = f'<img{image_class} src="{data_uri(panel.pixels)}" alt="{escape(f"{label}: {panel.caption}")}">'
    caption = f'<span class="role">{escape(label)}</span><span class="caption">{escape(panel.caption)}</span>'
    figure_class = ' class="right"' if panel.is_correct else ""
    return f"<figure{figure_class}>{image}<figcaption>{caption}</figcaption></figure>"


def data_uri(pixels: UInt8[np.ndarray, "H W 3"]) -> str:
    """Return an image as an address that contains it: a small one as PNG, a large one as JPEG."""
    image_format = "PNG" if len(pixels) <= _MAX_PNG_HEIGHT else "JPEG"
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **({"quality": 90} if image_format == "JPEG" else {}))
    return f"data:image/{image_format.lower()};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
