"""Image grids: lines between patches, and legends."""

import numpy as np
import pytest
from PIL import Image

from iwm_fast.rendering.image_grid import ImageGrid, Panel, save_image_grids


def draw(path, panel: Panel, **section) -> np.ndarray:
    save_image_grids(path, [ImageGrid(labels=("",), rows=((panel,),), **section)], "")
    with Image.open(path) as opened:
        return np.array(opened.convert("RGB")).astype(int)


@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.parametrize("grid", [2, 4])
def test_lines_separate_the_patches_of_dark_and_light_images(tmp_path, level, grid):
    plain, lined = (
        draw(tmp_path / f"{size}.png", Panel(pixels=np.full((32, 32, 3), level, np.uint8), grid=size))
        for size in (1, grid)
    )
    changed = np.abs(plain - lined).max(axis=-1) > 40
    # All pixels of a line's row or column change, between the frame's left and right or upper and lower ends.
    side = 1.9 * 110
    for is_line in (changed.sum(axis=0) > 0.9 * side, changed.sum(axis=1) > 0.9 * side):
        starts = np.flatnonzero(np.diff(is_line.astype(int)) == 1)
        assert len(starts) == grid - 1
        assert np.diff(starts) == pytest.approx([side / grid] * (grid - 2), abs=2)


def test_a_legend_has_a_swatch_for_each_name_and_enlarges_the_picture(tmp_path):
    panel = Panel(pixels=np.zeros((4, 4, 3), np.uint8))
    legend = {f"class {number}": (255, 10 * number, 0) for number in range(6)}
    plain, explained = draw(tmp_path / "a.png", panel), draw(tmp_path / "b.png", panel, legend=legend)
    # Three entries fit into a line.
    assert len(explained) - len(plain) == pytest.approx(2 * 0.2 * 110, abs=2)
    places = [np.argwhere((explained == colour).all(axis=-1)) for colour in legend.values()]
    assert all(len(place) > 80 for place in places)
    tops, lefts = zip(*(place.min(axis=0) for place in places), strict=True)
    assert tops[0] == tops[2] < tops[3] == tops[5] and lefts[0] == lefts[3] < lefts[1] < lefts[2]
    assert min(tops) > 1.9 * 110
