"""All operators on natural images: the DALI graph, the reference renderer and torchvision compared with each other.

The images are PNG files, which all decoders decode to the same pixels; JPEG decoders are compared by another test. The
differences are in grey levels: mean, 99th percentile and maximum over all pixels of eight 224 x 224 crops.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as reference

from fixtures.tar_files import encode, photograph
from iwm_fast.pipelines.transforms.base import Parameters
from iwm_fast.pipelines.transforms.color_map import LUMA
from iwm_fast.pipelines.transforms.composition import Draws, ViewConfig, identity_draws, identity_parameters
from iwm_fast.pipelines.transforms.dali_graph import GraphSettings, build_graph, graph_parameters
from iwm_fast.pipelines.transforms.geometry import view_windows
from iwm_fast.pipelines.transforms.image_decoding import dali_input, decode_image
from iwm_fast.pipelines.transforms.torch_renderer import render, resized_crop

SIZE = 224
# Name of the photograph, and top and left of a crop that shows objects and not only background.
PHOTOGRAPHS = (
    ("astronaut.png", 0, 100), ("chelsea.png", 40, 120), ("coffee.png", 120, 180), ("hubble_deep_field.jpg", 300, 300),
    ("ihc.png", 100, 100), ("motorcycle_left.png", 150, 250), ("retina.jpg", 500, 500), ("rocket.jpg", 100, 250),
)  # fmt: skip
SIGMAS = np.linspace(0.1, 2.0, len(PHOTOGRAPHS), dtype=np.float32)


class Limit(NamedTuple):
    """Largest allowed differences, or the measured ones, in grey levels."""

    mean: float
    p99: float
    max: float


@dataclass(frozen=True)
class Operator:
    """Parameters that differ from neutral, the function of torchvision, and the largest allowed difference from it."""

    change: dict[str, float | bool | np.ndarray]
    reference: Callable[[Tensor], Tensor]
    limit: Limit


def by_image(function: Callable[..., Tensor], *arguments: float) -> Callable[[Tensor], Tensor]:
    """Return a function that acts on each image separately, as contrast must; arguments may differ by image."""

    def act(planes: Tensor) -> Tensor:
        values_of = [np.broadcast_to(argument, len(planes)).tolist() for argument in arguments]
        return torch.stack([function(image, *values) for image, *values in zip(planes, *values_of, strict=True)])

    return act


def blurred(image: Tensor, sigma: float) -> Tensor:
    # 23 pixels are the usual kernel size for 224 pixels; our kernels end at three standard deviations.
    return reference.gaussian_blur(image, [23, 23], [sigma, sigma])


EQUAL = Limit(0, 0, 0)
# The same arithmetic in float32, in another order.
RENDERER = Limit(0.002, 0, 1)
OPERATORS = {
    "brightness 0.6": Operator({"brightness": 0.6}, by_image(reference.adjust_brightness, 0.6), Limit(0.45, 1, 1)),
    "brightness 1.4": Operator({"brightness": 1.4}, by_image(reference.adjust_brightness, 1.4), Limit(0.45, 1, 1)),
    "contrast 0.6": Operator({"contrast": 0.6}, by_image(reference.adjust_contrast, 0.6), Limit(0.8, 1, 1)),
    "contrast 1.4": Operator({"contrast": 1.4}, by_image(reference.adjust_contrast, 1.4), Limit(0.3, 1, 1)),
    "saturation 0.6": Operator({"saturation": 0.6}, by_image(reference.adjust_saturation, 0.6), Limit(0.7, 1, 1)),
    "saturation 1.4": Operator({"saturation": 1.4}, by_image(reference.adjust_saturation, 1.4), Limit(0.3, 1, 1)),
    "grayscale": Operator({"grayscale": True}, lambda planes: reference.rgb_to_grayscale(planes, 3), Limit(0.6, 1, 2)),
    "blur 0.1": Operator({"blur": True, "blur_sigma": 0.1}, by_image(blurred, 0.1), EQUAL),
    "blur 0.5": Operator({"blur": True, "blur_sigma": 0.5}, by_image(blurred, 0.5), Limit(0.002, 0, 1)),
    "blur 1.0": Operator({"blur": True, "blur_sigma": 1.0}, by_image(blurred, 1.0), Limit(0.01, 0, 1)),
    "blur 2.0": Operator({"blur": True, "blur_sigma": 2.0}, by_image(blurred, 2.0), Limit(0.025, 1, 1)),
    "blur 0.1 .. 2.0": Operator({"blur": True, "blur_sigma": SIGMAS}, by_image(blurred, SIGMAS), Limit(0.02, 1, 1)),
    "solarize": Operator({"solarize": True}, lambda planes: reference.solarize(planes, 128), EQUAL),
}
# DALI's resize rounds its weights: where few pixels have sharp edges, this changes several levels.
CROP_DALI, CROP_REFERENCE = Limit(0.15, 1, 16), Limit(0.005, 0, 1)


@pytest.fixture(scope="module")
def crops() -> Tensor:
    """Eight natural images, (8, 224, 224, 3)."""
    pixels = [photograph(name)[top : top + SIZE, left : left + SIZE] for name, top, left in PHOTOGRAPHS]
    return torch.from_numpy(np.stack(pixels))


def change(**values: float | bool | np.ndarray) -> Parameters:
    neutral = identity_parameters(ViewConfig(), len(PHOTOGRAPHS))
    return {name: np.broadcast_to(values.get(name, old), old.shape).astype(old.dtype) for name, old in neutral.items()}


class Views(NamedTuple):
    """Outputs of the graph for a batch."""

    source: Tensor
    target: Tensor
    window: np.ndarray


def render_in_graph(encoded: list[np.ndarray], draws: Draws, size: int = SIZE) -> Views:
    """Return the views that the DALI graph renders from encoded images on the CPU."""
    settings = GraphSettings(
        views=ViewConfig(size=size), max_batch_size=len(encoded), num_threads=1, prefetch=1, device_id=None
    )
    windows = view_windows(draws, np.array([dali_input(content).shape for content in encoded]))
    graph = build_graph(settings, lambda: (encoded, *graph_parameters(draws, windows, settings)))
    source, target = (np.array(output.as_tensor()) for output in graph.run())
    return Views(torch.from_numpy(source), torch.from_numpy(target), windows.shared)


def as_png(crops: Tensor) -> list[np.ndarray]:
    return [np.frombuffer(encode(crop.numpy(), "PNG"), np.uint8) for crop in crops]


def photometric(crops: Tensor, photometry: Parameters) -> tuple[Tensor, Tensor]:
    """Return the crops as rendered by the graph and by the reference renderer."""
    draws = replace(identity_draws(ViewConfig(), len(crops)), source=photometry)
    return render_in_graph(as_png(crops), draws).source, render(crops, photometry, ViewConfig())


def by_reference(crops: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return function(crops.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def difference(ours: Tensor, theirs: Tensor) -> Limit:
    levels = (ours.int() - theirs.int()).abs().flatten().numpy()
    return Limit(float(levels.mean()), float(np.quantile(levels, 0.99)), float(levels.max()))


def is_within(actual: Limit, limit: Limit) -> bool:
    return all(value <= max_value for value, max_value in zip(actual, limit, strict=True))


def assert_within(ours: Tensor, theirs: Tensor, limit: Limit) -> None:
    actual = difference(ours, theirs)
    assert is_within(actual, limit), f"{actual} instead of at most {limit}"


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_match_the_reference_renderer_and_torchvision(crops, name):
    operator = OPERATORS[name]
    graph, plain = photometric(crops, change(**operator.change))
    theirs = by_reference(crops, operator.reference)
    assert_within(graph, plain, RENDERER)
    assert_within(graph, theirs, operator.limit)
    assert_within(plain, theirs, operator.limit)
    # With a sigma of 0.1 the neighbours have no weight.
    assert name == "blur 0.1" or difference(crops, theirs).mean > 1, "leaving the crops unchanged would pass, too"


@pytest.mark.parametrize(
    "name",
    [name for name, operator in OPERATORS.items() if set(operator.change) <= {"brightness", "contrast", "saturation"}],
)
def test_both_views_are_recoloured_alike(crops, name):
    photometry = change(**OPERATORS[name].change)
    views = render_in_graph(
        as_png(crops), replace(identity_draws(ViewConfig(), len(crops)), source=photometry, target=photometry)
    )
    assert torch.equal(views.source, views.target)


def test_flips_match_torchvision(crops):
    draws = replace(identity_draws(ViewConfig(), len(crops)), flip=np.arange(len(crops)) % 2 == 0)
    views = render_in_graph(as_png(crops), draws)
    theirs = by_reference(crops, reference.hflip)
    theirs[1::2] = crops[1::2]
    assert torch.equal(views.source, theirs) and torch.equal(views.target, theirs)


@pytest.mark.parametrize("size", [224, 96, 64])
@pytest.mark.parametrize("crop", [(0.8, 0.6, 0.3, 0.7), (0.4, 0.5, 0.9, 0.1), (1.0, 1.0, 0.5, 0.5)])
def test_resized_crops_match_the_reference_renderer_and_torchvision(crops, crop, size):
    draws = replace(identity_draws(ViewConfig(), len(crops)), crop=np.tile(np.float32(crop), (len(crops), 1)))
    graph = render_in_graph(as_png(crops), draws, size)
    plain = torch.stack([resized_crop(image, window, size) for image, window in zip(crops, graph.window, strict=True)])
    windows = graph.window.astype(int).tolist()
    theirs = torch.stack([
        reference.resized_crop(image.permute(2, 0, 1), *window, [size, size], antialias=True).permute(1, 2, 0)
        for image, window in zip(crops, windows, strict=True)
    ])  # fmt: skip
    assert_within(plain, theirs, CROP_REFERENCE)
    assert_within(graph.target, plain, CROP_DALI)
    assert_within(graph.target, theirs, CROP_DALI)
    assert torch.equal(graph.source, graph.target)


@pytest.mark.parametrize("turn", [0.02, 0.1, -0.1, 0.25])
def test_hue_keeps_luma_where_torchvision_does_not(crops, turn):
    muted = (crops.float() * 0.3 + 90).to(torch.uint8)  # far from the clamp
    weights = torch.tensor(LUMA)
    luma = muted.float() @ weights
    for turned in photometric(muted, change(hue=turn)):
        assert (turned.float() @ weights - luma).abs().max() < 1.5
    theirs = by_reference(muted, lambda planes: reference.adjust_hue(planes, turn))
    assert (theirs.float() @ weights - luma).abs().max() > 5


@pytest.mark.parametrize("turn", [0.02, 0.05, 0.1, -0.1, 0.25, 0.5])
def test_hue_of_the_graph_matches_the_reference(crops, turn):
    assert_within(*photometric(crops, change(hue=turn)), RENDERER)


@pytest.mark.parametrize("turn", [0.1, -0.1])
def test_hue_at_36_degrees_differs_from_torchvision_by_over_ten_levels(crops, turn):
    theirs = by_reference(crops, lambda planes: reference.adjust_hue(planes, turn))
    for ours in photometric(crops, change(hue=turn)):
        actual = difference(ours, theirs)
        assert actual.mean > 10 and actual.p99 > 50
        # The result is hardly closer than the unchanged image.
        assert actual.mean > 0.95 * difference(crops, theirs).mean


def test_hue_turns_the_way_torchvision_does_from_red_to_yellow(crops):
    forward, backward = (
        by_reference(crops, lambda planes, turn=turn: reference.adjust_hue(planes, turn)) for turn in (0.25, -0.25)
    )
    for ours in photometric(crops, change(hue=0.25)):
        assert 2 * difference(ours, forward).mean < difference(ours, backward).mean


JPEGS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"subsampling": 2, "progressive": True},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
}
# Both use libjpeg-turbo on a CPU, but possibly different versions of it.
JPEG = Limit(0.01, 0, 1)


def as_jpeg(crops: Tensor, mode: str = "RGB", **options) -> list[np.ndarray]:
    files = []
    for crop in crops:
        file = io.BytesIO()
        Image.fromarray(crop.numpy()).convert(mode).save(file, "JPEG", quality=90, **options)
        files.append(np.frombuffer(file.getvalue(), np.uint8))
    return files


@pytest.mark.parametrize("kind", JPEGS)
def test_jpegs_are_decoded_like_by_pillow_completely_and_in_part(crops, kind):
    encoded = as_jpeg(crops, **JPEGS[kind])
    decoded = torch.stack([decode_image(content) for content in encoded])
    clean = identity_draws(ViewConfig(), len(crops))
    assert_within(render_in_graph(encoded, clean).source, decoded, JPEG)
    # The corner of this crop lies inside one of the blocks of pixels that share a chroma value.
    half = render_in_graph(
        encoded, replace(clean, crop=np.tile(np.float32([0.5, 0.5, 0.3, 0.6]), (len(crops), 1))), SIZE // 2
    )
    top, left, height, width = (int(value) for value in half.window[0])
    assert (height, width, top % 2, left % 2) == (SIZE // 2, SIZE // 2, 1, 1)
    assert_within(half.source, decoded[:, top : top + height, left : left + width], JPEG)
