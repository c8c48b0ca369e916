"""Sheets of labelled pictures: rows of (image, caption), written as PNG."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display on a GPU node

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import UInt8

# characters that stand under a panel at this size
_CAPTION_WIDTH = 36


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture of a sheet."""

    pixels: UInt8[np.ndarray, "H W 3"]
    caption: str = ""


def save_sheet(path: Path, labels: Sequence[str], rows: Sequence[Sequence[Panel]], title: str) -> None:
    """Draw labelled rows of panels; pixels stay sharp."""
    size = (2.1 * len(rows[0]) + 0.3, 2.55 * len(rows) + 0.4)
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=size, squeeze=False, layout="constrained")
    for line, label, panels in zip(axes, labels, rows, strict=True):
        line[0].set_ylabel(label, fontsize=9)
        for axis, panel in zip(line, panels, strict=True):
            axis.imshow(panel.pixels, interpolation="nearest")
            axis.set_xlabel("\n".join(textwrap.wrap(panel.caption, _CAPTION_WIDTH)), fontsize=7)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def shade(pixels: UInt8[np.ndarray, "H W 3"], is_hidden: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    """Paint hidden patches of a (grid, grid) mask in flat grey."""
    side = len(pixels) // len(is_hidden)
    hidden = np.kron(is_hidden, np.ones((side, side), bool))
    return np.where(hidden[..., None], np.uint8(128), pixels)
