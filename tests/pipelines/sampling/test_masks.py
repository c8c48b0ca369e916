import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_fast.pipelines.config import MaskConfig
from iwm_fast.pipelines.sampling.masks import draw_masks, ragged_index

CONFIG = MaskConfig()


@given(st.integers(4, 20), st.integers(0, 1000), st.booleans())
@settings(max_examples=40)
def test_context_and_target_are_disjoint_and_never_empty(grid: int, step: int, has_context_block: bool):
    config = MaskConfig(context_scale=(0.85, 1.0) if has_context_block else None)
    masks = draw_masks(config, grid, 0, step, np.arange(16))
    assert not (masks.context & masks.target).any()
    assert masks.context.any(axis=1).all() and masks.target.any(axis=1).all()
    assert has_context_block or (masks.context | masks.target).all()


def test_the_numbers_of_patches_match_the_method():
    masks = draw_masks(CONFIG, 14, 0, 0, np.arange(20_000))
    lengths = masks.target.sum(axis=1)
    assert abs(lengths.mean() - 93) < 2 and abs(masks.context.sum(axis=1).mean() - 103) < 2
    assert lengths.min() >= 28 and lengths.max() <= 160


def _cell_cover(grid: int) -> np.ndarray:
    """Return the probability that a block covers a cell, for all cells, summed over areas, aspects and positions."""
    uniform = (np.arange(400) + 0.5) / 400
    area = (CONFIG.block_scale[0] + np.diff(CONFIG.block_scale) * uniform)[:, None] * grid * grid
    low, high = CONFIG.block_aspect
    ratio = (low + (high - low) * uniform)[None, :]
    heights = np.rint(np.sqrt(area * ratio)).astype(int).ravel()
    widths = np.rint(np.sqrt(area / ratio)).astype(int).ravel()
    cover = np.zeros((grid, grid))
    sides, counts = np.unique(np.stack([heights, widths], 1), axis=0, return_counts=True)
    for (height, width), count in zip(sides, counts, strict=True):
        cover += count * np.outer(_axis_cover(grid, height), _axis_cover(grid, width))
    return cover / len(heights)


def _axis_cover(grid: int, side: int) -> np.ndarray:
    num_positions = grid - side + 1
    return np.array(
        [sum(top <= cell < top + side for top in range(num_positions)) / num_positions for cell in range(grid)]
    )


def test_every_cell_is_covered_as_often_as_the_closed_form_predicts():
    masks = draw_masks(CONFIG, 14, 0, 0, np.arange(60_000))
    measured = masks.target.mean(axis=0).reshape(14, 14)
    expected = 1 - (1 - _cell_cover(14)) ** CONFIG.num_target_blocks
    assert expected.min() > 0.01  # corners included
    np.testing.assert_allclose(measured, expected, atol=5 * np.sqrt(0.25 / 60_000))


def test_masks_are_mirror_symmetric():
    measured = draw_masks(CONFIG, 14, 1, 0, np.arange(60_000)).target.mean(axis=0).reshape(14, 14)
    np.testing.assert_allclose(measured, measured[::-1], atol=0.014)
    np.testing.assert_allclose(measured, measured[:, ::-1], atol=0.014)


def test_area_and_aspect_of_a_block_are_drawn_independently():
    masks = draw_masks(MaskConfig(num_target_blocks=1, block_scale=(0.1, 0.4)), 40, 0, 0, np.arange(5000))
    blocks = masks.target.reshape(-1, 40, 40)
    heights, widths = blocks.any(axis=2).sum(axis=1), blocks.any(axis=1).sum(axis=1)
    assert abs(np.corrcoef(heights * widths, heights / widths)[0, 1]) < 0.05


def test_the_mask_of_a_slot_does_not_depend_on_other_slots():
    together = draw_masks(CONFIG, 14, 0, 5, np.arange(64))
    alone = draw_masks(CONFIG, 14, 0, 5, np.array([17]))
    assert (together.target[17] == alone.target[0]).all()


def test_the_ragged_index_keeps_every_patch_of_every_image():
    masks = draw_masks(CONFIG, 8, 0, 0, np.arange(16))
    index = ragged_index(masks.target, total=999)
    lengths = np.diff(index.offsets.numpy())
    assert (lengths == masks.target.sum(axis=1)).all() and len(set(lengths)) > 1
    assert index.lengths == tuple(lengths.tolist()) and index.total == 999
    rebuilt = np.zeros(16 * 64, bool)
    rebuilt[index.row.numpy()] = True
    assert (rebuilt.reshape(16, 64) == masks.target).all()
    assert (index.row.numpy() % 64 == index.patch.numpy()).all()


def test_an_image_without_patches_is_kept_as_an_empty_list():
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = True
    index = ragged_index(mask, total=1)
    assert index.offsets.tolist() == [0, 0, 1, 1] and index.row.tolist() == [6]


def test_settings_that_leave_no_context_are_refused():
    with pytest.raises(
        ValueError, match=r"mask.num_target_blocks = 60 blocks .* leave no context patch on a 4 x 4 grid"
    ):
        draw_masks(MaskConfig(num_target_blocks=60, block_scale=(0.5, 0.9)), 4, 0, 0, np.arange(4))


def test_a_block_as_large_as_the_grid_is_refused():
    with pytest.raises(ValueError, match=r"mask.block_scale must satisfy 0 < low <= high < 1, got \(0.9, 0.2\)"):
        MaskConfig(block_scale=(0.9, 0.2))
