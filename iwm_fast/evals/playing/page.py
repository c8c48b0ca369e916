"""The page of `iwm play`: one HTML file with plain JavaScript, which asks a server or holds all answers itself."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iwm_fast.evals.playing.player import Answer, Control
from iwm_fast.rendering.html import escape, page
from iwm_fast.rendering.imagine_page import data_uri

_SCRIPT = Path(__file__).with_name("page.js")

# Titles of the pictures, in the order in which they are shown.
_PICTURES = {
    "source": ("source", "what the model sees"),
    "asked for": ("asked for", "the change, rendered"),
    "absolute": ("imagined", "the prediction, decoded"),
    "difference": ("imagined, effect only", "the effect of the action on the source, decoded"),
    "retrieved": ("retrieved", "the version with the nearest tokens"),
}

_STYLE = """
#images { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: .8rem 0; }
#images button { padding: 0; border: 2px solid transparent; border-radius: .4rem; background: none; cursor: pointer; }
#images button[aria-pressed=true] { border-color: var(--series-1); }
#images img { width: 4rem; min-width: 0; border-radius: .25rem; }
#pictures { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); margin: 1rem 0; }
#pictures figure { margin: 0; } #pictures img { min-width: 0; border-radius: .3rem; aspect-ratio: 1; }
#pictures img, #images img { image-rendering: pixelated; }
figcaption { font-size: .85rem; line-height: 1.35; margin-top: .3rem; } figcaption span { display: block; }
#controls { display: grid; gap: .2rem 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
#controls label { display: grid; grid-template-columns: 6.5rem 1fr 5.5rem; align-items: center; gap: .6rem; }
#controls label.switch { grid-template-columns: 6.5rem auto 1fr; }
#controls output { text-align: right; font-variant-numeric: tabular-nums; }
input[type=range] { width: 100%; accent-color: var(--series-1); }
#distances { display: grid; grid-template-columns: max-content 1fr max-content; gap: .2rem .8rem; align-items: center;
  max-width: 34rem; font-variant-numeric: tabular-nums; }
#distances div { height: .6rem; border-radius: .2rem; background: var(--series-1); }
#message { color: var(--bad); min-height: 1.5em; }
"""


def build_page(
    run: str,
    controls: Sequence[Control],
    images: Sequence[str],
    *,
    has_decoder: bool,
    can_upload: bool,
    answers: dict[str, Any] | None = None,
) -> str:
    """Return the page.

    Args:
        run: name of the run.
        controls: sliders and switches.
        images: addresses of the images to choose from.
        has_decoder: whether imagined pictures are shown.
        can_upload: whether a server takes further images.
        answers: for a page without a server, answers by image and control, and their pictures; then one control is
            moved at a time.
    """
    upload = '<label class="small">your own: <input type="file" id="upload" accept="image/*"></label>'
    note = "" if has_decoder else f"Imagined pictures need a decoder: <code>iwm decode run={escape(run)}</code>."
    if answers is not None:
        note += " Answers were computed beforehand, for one control at a time."
    body = [
        f"<h1>What the world model of {escape(run)} imagines</h1>",
        f'<p class="soft">Move a slider: from the tokens of the source and the change, the predictor computes the '
        f"tokens of the changed image. {note}</p>",
        f'<div id="images">{upload if can_upload else ""}</div>',
        f'<div id="controls">{"".join(map(_control, controls))}</div>',
        f'<div id="pictures">{_figures(has_decoder)}</div>',
        '<section class="card"><h3>Distance to the tokens of the image asked for</h3><div id="distances"></div>'
        '<p class="small soft">Mean squared difference per number. "No change" are the tokens of the source.</p>'
        "</section>",
        '<p id="message" role="status"></p>',
        f'<script type="application/json" id="data">{_script_data(controls, images, answers)}</script>',
        f"<script>{_SCRIPT.read_text(encoding='utf-8')}</script>",
    ]
    return page(f"{run}: play", body, _STYLE)


def _figures(has_decoder: bool) -> str:
    """Return empty frames for the pictures, with their titles."""
    imagined = () if has_decoder else ("absolute", "difference")
    return "".join(
        f'<figure class="card"><img data-picture="{name}" alt="{title}"><figcaption><b>{title}</b>'
        f'<span class="soft" data-caption="{name}">{explanation}</span></figcaption></figure>'
        for name, (title, explanation) in _PICTURES.items()
        if name not in imagined
    )


def _script_data(controls: Sequence[Control], images: Sequence[str], answers: dict[str, Any] | None) -> str:
    """Return what the script reads, as JSON in which nothing ends its element early."""
    sliders = [
        {"name": item.name, "low": item.low, "neutral": item.neutral, "high": item.high, "isSwitch": item.is_switch}
        for item in controls
    ]
    text = json.dumps({"controls": sliders, "images": list(images), "answers": answers})
    return text.replace("<", "\\u003c")


def _control(control: Control) -> str:
    """Return the element of a slider or switch."""
    name, words = escape(control.name), escape(control.words)
    if control.is_switch:
        return (
            f'<label class="switch"><span>{name}</span><input type="checkbox" data-control="{name}">'
            f'<span class="small soft">the source has it; the action asks to {words}</span></label>'
        )
    return (
        f'<label><span>{words}</span><input type="range" data-control="{name}" min="{control.low:g}" '
        f'max="{control.high:g}" step="any" value="{control.neutral:g}"><output data-value="{name}"></output></label>'
    )


def to_json(answer: Answer) -> dict[str, Any]:
    """Return an answer as the page's script takes it."""
    pictures = {name: data_uri(pixels) for name, pixels in answer.pictures.items()}
    return {"pictures": pictures, "captions": answer.captions, "distances": answer.distances}
