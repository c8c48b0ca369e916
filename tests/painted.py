"""Shards of painted regions: what an image shows says what each pixel's class is."""

import json
from pathlib import Path

import numpy as np

from samples import encode, write_tar

COLOURS = np.array([(30, 30, 30), (220, 60, 40), (40, 190, 70), (50, 80, 230)], np.uint8)
"""Of the classes, in the order of their numbers."""
NAMES = ("dark", "red", "green", "blue")
IGNORED = 255


def painted(path: Path, count: int, *, seed: int, classes: int = 4, has_masks: bool = True) -> str:
    """Write a shard of images of two halves of two classes each, whose upper and lower rims are ignored.

    `cls` is the class of the left half, json.right the name of the right one's, json.wide whether the image is wider
    than high.
    """
    generator, content = np.random.default_rng(seed), []
    for number in range(count):
        height, width = generator.integers(40, 80, 2)
        left, right = generator.permutation(classes)[:2]
        mask = np.full((height, width), left, np.uint8)
        mask[:, width // 2 :] = right
        pixels = np.clip(COLOURS[mask] + generator.normal(0, 4, (height, width, 3)), 0, 255).astype(np.uint8)
        mask[:2], mask[-2:] = IGNORED, IGNORED
        note = {"right": NAMES[right], "wide": bool(width > height)}
        parts = {"jpg": encode(pixels), "cls": str(left).encode(), "json": json.dumps(note).encode()}
        parts |= {"seg.png": encode(mask, "PNG")} if has_masks else {}
        content += [(f"{number:04}.{end}", part) for end, part in parts.items()]
    write_tar(path, content)
    return str(path)
