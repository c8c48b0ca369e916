from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.tar_files import photograph
from iwm_fast.pipelines.transforms.action import action_vector, change_from_action, describe_action
from iwm_fast.pipelines.transforms.base import Parameters
from iwm_fast.pipelines.transforms.color_map import LUMA, ColorMap
from iwm_fast.pipelines.transforms.composition import ViewConfig, draw, fused_color_map, identity_parameters
from iwm_fast.pipelines.transforms.geometry import crop_window, source_geometry, source_window
from iwm_fast.pipelines.transforms.operations.blur import Blur
from iwm_fast.pipelines.transforms.operations.crop import Crop
from iwm_fast.pipelines.transforms.operations.flip import Flip
from iwm_fast.pipelines.transforms.operations.grayscale import Grayscale
from iwm_fast.pipelines.transforms.operations.jitter import Jitter
from iwm_fast.pipelines.transforms.operations.solarize import Solarize
from iwm_fast.pipelines.transforms.torch_renderer import resized_crop

CONFIG = ViewConfig()
JITTER = tuple(entry.name for entry in CONFIG.jitter.entries)


def color_map(parameters: Parameters) -> ColorMap:
    """Return the map of jitter and grayscale."""
    return fused_color_map((CONFIG.jitter, CONFIG.grayscale), parameters)


def test_neutral_parameters_give_the_exact_identity_matrix():
    neutral = color_map(identity_parameters(CONFIG, 3))
    assert (neutral.matrix == np.eye(3, dtype=np.float32)).all()
    assert (neutral.gray_gain == 0).all() and not neutral.is_applied.any()


@pytest.mark.parametrize("encoding", ["log_ratio", "difference"])
@given(step=st.integers(0, 10_000))
@settings(max_examples=25)
def test_the_action_contains_the_drawn_changes_and_flags(encoding: str, step: int):
    config = replace(CONFIG, jitter=replace(CONFIG.jitter, encoding=encoding))
    drawn = draw(config, 0, step, np.arange(16))
    change = change_from_action(action_vector(drawn.source, drawn.target, config), config)
    for name in JITTER:
        if encoding == "log_ratio" and name != "hue":
            expected = np.log(drawn.target[name] / drawn.source[name])
        else:
            expected = drawn.target[name] - drawn.source[name]
        np.testing.assert_allclose(change[name], expected, atol=1e-6)
    for name in ("blur", "grayscale", "solarize"):
        assert (change[name].astype(bool) == drawn.source[name]).all()


def test_the_action_of_no_change_is_zero():
    neutral = identity_parameters(CONFIG, 2)
    assert (action_vector(neutral, neutral, CONFIG) == 0).all()
    assert describe_action(np.zeros(7, np.float32), CONFIG) == "no change"


def test_entries_are_of_order_one_for_any_strength():
    for strength in (0.05, 0.8):
        config = ViewConfig(
            jitter=Jitter(brightness=strength, contrast=strength, saturation=strength, hue=strength / 2)
        )
        drawn = draw(config, 0, 0, np.arange(4000))
        spread = action_vector(drawn.source, drawn.target, config)[:, :4].std(axis=0)
        assert (spread > 0.5).all() and (spread < 1).all()


def test_the_action_has_the_configured_entries_in_order():
    config = ViewConfig(action_entries=("hue", "brightness"))
    drawn = draw(config, 0, 0, np.arange(32))
    all_entries = action_vector(drawn.source, drawn.target, CONFIG)
    selected = action_vector(drawn.source, drawn.target, config)
    columns = [CONFIG.entries.index(name) for name in ("hue", "brightness")]
    assert (selected == all_entries[:, columns]).all()


def test_only_the_source_loses_information():
    drawn = draw(
        ViewConfig(
            grayscale=Grayscale(probability=1.0), blur=Blur(probability=1.0), solarize=Solarize(probability=1.0)
        ),
        0,
        0,
        np.arange(64),
    )
    for name in ("grayscale", "blur", "solarize"):
        assert drawn.source[name].all() and not drawn.target[name].any()


def test_flips_blurs_and_jitters_have_their_probabilities():
    drawn = draw(CONFIG, 0, 0, np.arange(20_000))
    assert abs(drawn.flip.mean() - 0.5) < 0.015
    assert abs(drawn.source["blur"].mean() - 0.2) < 0.012
    assert abs((drawn.target["brightness"] == 1).mean() - 0.2) < 0.012
    both = (drawn.source["brightness"] == 1) & (drawn.target["brightness"] == 1)
    assert abs(both.mean() - 0.04) < 0.006  # the views are jittered independently


def test_saturation_and_hue_keep_luma():
    config = ViewConfig(jitter=Jitter(brightness=0.0, contrast=0.0, saturation=1.0, hue=0.5, probability=1.0))
    matrix = color_map(draw(config, 0, 0, np.arange(64)).source).matrix
    np.testing.assert_allclose(np.array(LUMA) @ matrix, np.tile(LUMA, (64, 1)), atol=1e-6)


def test_grayscale_is_the_color_map_without_chroma():
    drawn = draw(
        ViewConfig(grayscale=Grayscale(probability=1.0), jitter=Jitter(probability=1.0)), 0, 0, np.arange(64)
    ).source
    factor = (drawn["brightness"] * drawn["contrast"])[:, None, None]
    np.testing.assert_allclose(color_map(drawn).matrix, factor * np.tile(LUMA, (64, 3, 1)), atol=1e-6)


def test_a_full_turn_of_hue_is_two_half_turns():
    config = ViewConfig(
        jitter=Jitter(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.5, probability=1.0),
        grayscale=Grayscale(probability=0.0),
    )
    turned = draw(config, 0, 0, np.arange(8)).source
    half = color_map(turned | {"hue": np.full(8, 0.5, np.float32)}).matrix
    np.testing.assert_allclose(half @ half, np.tile(np.eye(3), (8, 1, 1)), atol=1e-5)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 1000))
def test_the_crop_lies_inside_the_image(height: int, width: int, step: int):
    crop = draw(ViewConfig(crop=Crop(scale=(0.01, 1.0))), 0, step, np.arange(32)).crop
    top, left, crop_height, crop_width = crop_window(crop, np.tile([height, width], (32, 1))).T
    assert (top >= 0).all() and (left >= 0).all() and (crop_height >= 1).all() and (crop_width >= 1).all()
    assert (top + crop_height <= height).all() and (left + crop_width <= width).all()


def test_crops_have_areas_in_range_and_reach_every_border():
    crop = draw(CONFIG, 0, 0, np.arange(20_000)).crop
    top, left, height, width = crop_window(crop, np.tile([400, 400], (20_000, 1))).T
    share = height * width / 400**2
    # Only large crops of an extreme aspect do not fit into the image and are shrunk.
    assert share[share < 0.75].min() > 0.295 and share.max() <= 1
    assert abs(share.mean() - 0.63) < 0.03
    assert (top == 0).any() and (top + height == 400).any() and (left == 0).any() and (left + width == 400).any()


ZOOM = ViewConfig(crop=Crop(source_scale=(0.25, 1.0)), flip=Flip(source_probability=0.5))


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 1000))
def test_the_source_lies_inside_the_target(height: int, width: int, step: int):
    drawn = draw(ZOOM, 0, step, np.arange(32))
    window = crop_window(drawn.crop, np.tile([height, width], (32, 1)))
    inner = source_window(drawn.source_crop, window)
    assert (inner[:, 2:] >= 1).all() and (inner[:, :2] >= window[:, :2]).all()
    assert (inner[:, :2] + inner[:, 2:] <= window[:, :2] + window[:, 2:]).all()


def test_source_crops_have_areas_in_range_and_reach_every_border():
    drawn = draw(ZOOM, 0, 0, np.arange(20_000))
    window = np.tile(np.array([100, 50, 400, 300], np.float32), (20_000, 1))
    inner = source_window(drawn.source_crop, window)
    share = inner[:, 2] * inner[:, 3] / (400 * 300)
    assert share.min() > 0.24 and share.max() <= 1 and abs(share.mean() - 0.6) < 0.03
    for side, first, last in ((0, 100, 500), (1, 50, 350)):
        assert (inner[:, side] == first).any() and (inner[:, side] + inner[:, side + 2] == last).any()
    assert abs(drawn.source_flip.mean() - 0.5) < 0.015


def test_geometry_locates_the_source_view_in_the_target_view():
    """Cut the region that the action names out of a rendered target view, and compare it with the source view."""
    image = torch.from_numpy(photograph("astronaut.png")[:400, :400].copy())
    drawn = draw(ZOOM, 3, 0, np.arange(16))
    window = crop_window(drawn.crop, np.tile([400, 400], (16, 1)))
    inner = source_window(drawn.source_crop, window)
    action = action_vector(drawn.target, drawn.target, ZOOM, source_geometry(drawn, window, inner))
    change = change_from_action(action, ZOOM)
    size = 256
    for number in range(16):
        target = resized_crop(image, window[number], size)
        target = target.flip(1) if drawn.flip[number] else target
        source = resized_crop(image, inner[number], size)
        source = source.flip(1) if drawn.flip[number] ^ drawn.source_flip[number] else source
        width, height = (size * np.exp(change[name][number]) for name in ("crop_width", "crop_height"))
        left = size * (0.5 + change["crop_x"][number]) - width / 2
        top = size * (0.5 + change["crop_y"][number]) - height / 2
        actual = resized_crop(target, np.round([top, left, height, width]).astype(np.float32), size)
        actual = actual.flip(1) if change["flip"][number] > 0.5 else actual
        # Resizing twice blurs and rounds the window, but another region would differ by much more.
        assert (actual.float() - source.float()).abs().mean() < 10
        assert (actual.flip(1).float() - source.float()).abs().mean() > 25


def test_crop_entries_are_of_order_one_and_zero_without_a_source_crop():
    for low in (0.1, 0.6):
        config = ViewConfig(crop=Crop(source_scale=(low, 1.0)), flip=Flip(source_probability=0.5))
        drawn = draw(config, 0, 0, np.arange(4000))
        window = np.tile(np.array([0, 0, 900, 900], np.float32), (4000, 1))
        geometry = source_geometry(drawn, window, source_window(drawn.source_crop, window))
        spread = action_vector(drawn.source, drawn.target, config, geometry)[:, 7:11].std(axis=0)
        assert (spread > 0.2).all() and (spread < 1).all()
    drawn = draw(CONFIG, 0, 0, np.arange(8))
    window = crop_window(drawn.crop, np.tile([333, 500], (8, 1)))
    assert (source_window(drawn.source_crop, window) == window).all()
    assert all((values == 0).all() for values in source_geometry(drawn, window, window).values())


def test_an_action_is_described_in_english():
    config = ViewConfig(crop=Crop(source_scale=(0.25, 1.0)), flip=Flip(source_probability=0.5))
    action = np.zeros(12, np.float32)
    action[[0, 7, 9, 10, 11]] = 0.5, 0.4, 0.5, 1.0, 1.0
    rest = ", mirror, from a crop of 1.41 x 2.00 at +0.10, +0.00"
    assert describe_action(action, config) == "brightness × 1.24" + rest
    config = replace(config, jitter=replace(config.jitter, encoding="difference"))
    assert describe_action(action, config) == "brightness +0.20" + rest


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Crop(scale=(0.9, 0.2)), r"views.crop.scale must satisfy 0.001 <= low <= high <= 1, got \(0.9, 0.2\)"),
        (lambda: Blur(probability=1.5), "views.blur.probability must be between 0 and 1, got 1.5"),
        (lambda: Jitter(hue=0.6), "views.jitter.hue must be between 0 and 0.5, got 0.6"),
        (
            lambda: ViewConfig(action_entries=("brightness", "fade")),
            "views.action_entries must name entries of .*got \\['fade'\\]",
        ),
        (
            lambda: ViewConfig(action_entries=("hue", "hue")),
            "views.action_entries must be non-empty and name no entry twice",
        ),
        (
            lambda: ViewConfig(action_entries=("hue", "crop_x")),
            "crop_\\* need views.crop.source_scale, .*got \\['crop_x'\\]",
        ),
        (lambda: Crop(source_scale=(0.5, 1.5)), "views.crop.source_scale must satisfy 0.001 <= low <= high <= 1"),
        (lambda: ViewConfig(size=8, blur=Blur(sigma=(0.1, 4.0))), "views.blur.sigma must satisfy"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_name_value_and_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()
