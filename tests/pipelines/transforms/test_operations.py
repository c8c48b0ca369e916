"""Each pixel operation in all renderers, and what all operations have in common."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from fixtures.tar_files import encode, photograph
from iwm_fast.pipelines.config import IMAGENET
from iwm_fast.pipelines.transforms.action import action_vector, change_from_action, describe_action
from iwm_fast.pipelines.transforms.composition import Draws, ViewConfig, draw, identity_draws, identity_parameters
from iwm_fast.pipelines.transforms.cpu_renderer import CpuRenderer
from iwm_fast.pipelines.transforms.dali_graph import GraphSettings, build_graph, graph_parameters
from iwm_fast.pipelines.transforms.geometry import view_windows
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.pipelines.transforms.operations.gamma import Gamma
from iwm_fast.pipelines.transforms.operations.jitter import Jitter
from iwm_fast.pipelines.transforms.operations.posterize import Posterize
from iwm_fast.pipelines.transforms.operations.rotation import Rotation
from iwm_fast.pipelines.transforms.torch_renderer import render

SIZE, COUNT = 96, 6
ALL_ON = ViewConfig(
    size=SIZE, gamma=Gamma(probability=0.5), posterize=Posterize(probability=0.5), rotation=Rotation(probability=0.5)
)
ENCODINGS = [
    ALL_ON,
    replace(ALL_ON, jitter=Jitter(encoding="log_ratio")),
    replace(ALL_ON, jitter=Jitter(source="on_target")),
    replace(ALL_ON, jitter=Jitter(encoding="log_ratio", source="on_target", brightness=1.0, contrast=0.8)),
]


@pytest.fixture(scope="module")
def crops() -> Tensor:
    pixels = photograph("coffee.png")
    return torch.from_numpy(np.stack([pixels[20 * i : 20 * i + SIZE, 40 * i : 40 * i + SIZE] for i in range(COUNT)]))


def views_with(name: str) -> ViewConfig:
    """Return views in which only one of the optional operations is on."""
    return replace(ViewConfig(size=SIZE), **{name: getattr(ALL_ON, name)})


def rendered(crops: Tensor, views: ViewConfig, changed: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Return the source view as each of the renderers makes it."""
    draws = identity_draws(views, COUNT)
    draws = replace(draws, source=draws.source | changed)
    windows = view_windows(draws, crops_shape())
    renderer = CpuRenderer(views, 1, IMAGENET)
    on_cpu, _ = renderer.views(list(crops), windows, draws)
    renderer.close()
    return {
        "reference": render(crops, draws.source, views),
        "dali": graph_outputs(crops, draws, views)[0],
        "cpu": denormalize_view(on_cpu, IMAGENET),
    }


def graph_outputs(crops: Tensor, draws: Draws, views: ViewConfig, device_id: int | None = None) -> list[Tensor]:
    """Return source and target view as the DALI graph makes them."""
    windows = view_windows(draws, crops_shape())
    settings = GraphSettings(views=views, max_batch_size=COUNT, num_threads=1, prefetch=1, device_id=device_id)
    encoded = [np.frombuffer(encode(crop.numpy(), "PNG"), np.uint8) for crop in crops]
    graph = build_graph(settings, lambda: (encoded, *graph_parameters(draws, windows, settings)))
    outputs = [view if device_id is None else view.as_cpu() for view in graph.run()]
    return [torch.from_numpy(np.array(view.as_tensor())) for view in outputs]


def crops_shape() -> np.ndarray:
    return np.full((COUNT, 2), SIZE)


def difference(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours.int() - theirs.int()).abs().float()


def test_gamma_matches_torchvision_in_all_renderers(crops):
    octaves = np.float32([-1, -0.3, 0, 0.2, 0.7, 1])
    for name, ours in rendered(crops, views_with("gamma"), {"gamma": octaves}).items():
        for image, octave in enumerate(octaves):
            theirs = reference.adjust_gamma(crops[image].permute(2, 0, 1), 2.0 ** float(octave)).permute(1, 2, 0)
            assert difference(ours[image], theirs).max() <= 1, name
            assert octave == 0 or difference(ours[image], crops[image]).mean() > 5


def test_posterize_matches_torchvision_in_all_renderers(crops):
    flags = np.arange(COUNT) % 2 == 0
    for name, ours in rendered(crops, views_with("posterize"), {"posterize": flags}).items():
        assert torch.equal(ours[flags], reference.posterize(crops[flags], 3)), name
        assert torch.equal(ours[~flags], crops[~flags]), name


def test_rotation_matches_torchvision_in_all_renderers(crops):
    angles, views = np.float32([-20, -7, 0, 0, 10, 20]), views_with("rotation")
    square = views.rotation.query_source(COUNT) | {"rotation": angles}
    side = round(SIZE * float(square["rotation_side"][0]))
    first = (SIZE - side) // 2
    for name, ours in rendered(crops, views, square).items():
        for image, angle in enumerate(angles):
            errors = []
            for turn in (float(angle), -float(angle)):
                turned = reference.rotate(crops[image].permute(2, 0, 1), turn, reference.InterpolationMode.BILINEAR)
                inner = turned[None, :, first : first + side, first : first + side].float()
                theirs = torch.nn.functional.interpolate(inner, (SIZE, SIZE), mode="bilinear", align_corners=False)
                errors.append(float(difference(ours[image], theirs[0].permute(1, 2, 0).round()).mean()))
            # torchvision's is sampled twice, and its square has a whole number of pixels.
            assert errors[0] < 6, (name, angle, errors)
            assert angle == 0 or errors[1] > 2 * errors[0], (name, angle, errors)
    plain = rendered(crops, views, {})
    assert all(torch.equal(view, crops) for view in plain.values()), "neutral parameters show the complete view"


@pytest.mark.parametrize("name", ["gamma", "rotation"])
def test_renderers_agree_on_operations_of_both_views(crops, name):
    views = views_with(name)
    parameters = getattr(views, name).draw(np.linspace(0, 0.99, 2 * COUNT).reshape(COUNT, 2), is_source=True)
    plain, dali, cpu = rendered(crops, views, parameters).values()
    assert difference(dali, plain).max() <= 1 and difference(cpu, plain).max() <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gamma", "posterize", "rotation"])
def test_the_graph_renders_optional_operations_alike_on_a_gpu_and_on_the_cpu(crops, name):
    views = views_with(name)
    clean, drawn = identity_draws(views, COUNT), draw(views, 0, 0, np.arange(COUNT))
    draws = replace(clean, source=drawn.source, target=drawn.target)
    on_gpu, on_cpu = (graph_outputs(crops, draws, views, device_id) for device_id in (0, None))
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        error = difference(ours, theirs)
        # A level on the other side of a threshold of solarize or posterize is far from it.
        assert error.mean() < 0.5 and error.quantile(0.99) <= 2


def test_the_square_of_rotated_views_is_never_empty(crops):
    white = torch.full_like(crops, 255)
    framed = torch.nn.functional.pad(white[:, 1:-1, 1:-1], (0, 0, 1, 1, 1, 1))
    for degrees in (5.0, 20.0, 45.0):
        views = replace(ViewConfig(size=SIZE), rotation=Rotation(probability=1.0, strength=degrees))
        extreme = views.rotation.query_source(COUNT) | {"rotation": np.full(COUNT, degrees, np.float32)}
        # Corners of the square touch the frame, and sampling between pixels mixes it in.
        assert (render(framed, identity_parameters(views, COUNT) | extreme, views) < 255).float().mean() < 0.01


def test_an_operation_that_is_off_takes_no_part():
    for name in ("gamma", "posterize", "rotation"):
        assert name not in ViewConfig().entries and name not in identity_parameters(ViewConfig(), 1)
        with_it = views_with(name)
        assert with_it.entries == (*ViewConfig().entries, name)
        before, after = (draw(views, 0, 5, np.arange(32)) for views in (ViewConfig(size=SIZE), with_it))
        for view in ("source", "target"):
            assert all(
                np.array_equal(values, getattr(after, view)[key]) for key, values in getattr(before, view).items()
            )
        assert len(np.unique(after.source[name])) > 1
    with pytest.raises(ValueError, match=r"views.action_entries must name entries .*got \['gamma'\]"):
        ViewConfig(action_entries=("brightness", "gamma"))


def test_operations_draw_independently_of_each_other_and_of_the_other_view():
    drawn = draw(ALL_ON, 0, 0, np.arange(4000))
    numbers = [view[name] for view in (drawn.source, drawn.target) for name in ("brightness", "gamma", "rotation")]
    flags = [drawn.source[name] for name in ("grayscale", "blur", "solarize", "posterize")]
    correlation = np.corrcoef([*numbers, *flags])
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.06


@pytest.mark.parametrize("views", ENCODINGS)
def test_the_change_leads_from_the_source_to_the_target(views):
    drawn = draw(views, 0, 0, np.arange(256))
    change = change_from_action(action_vector(drawn.source, drawn.target, views), views)
    for operation in views.operations:
        target = operation.target(drawn.source, change)
        numbers = [entry.name for entry in operation.entries if not entry.is_flag]
        assert set(target) == set(numbers)
        for name in numbers:
            # Log ratios have a floor.
            low = 0.05 if name in ("brightness", "contrast") else -np.inf
            is_above = (drawn.source[name] > low) & (drawn.target[name] > low)
            np.testing.assert_allclose(target[name][is_above], drawn.target[name][is_above], atol=2e-5)


@pytest.mark.parametrize("views", ENCODINGS)
def test_the_spread_of_entries_is_that_of_drawn_actions(views):
    drawn = draw(views, 3, 0, np.arange(40_000))
    vector = action_vector(drawn.source, drawn.target, views)
    for operation in views.operations:
        for entry in operation.entries:
            mean, std, limit = operation.spread(entry.name)
            values = vector[:, views.entries.index(entry.name)]
            assert values.mean() == pytest.approx(mean, abs=0.02)
            assert entry.is_flag or values.std() == pytest.approx(std, rel=0.03)
            assert 0.75 * limit < np.abs(values).max() <= limit + 1e-5, entry.name


def test_log_ratios_add_up_over_several_actions():
    views = ENCODINGS[1]
    first, second, third = (draw(views, 0, step, np.arange(64)).target for step in range(3))
    steps = action_vector(first, second, views) + action_vector(second, third, views)
    np.testing.assert_allclose(steps[:, :4], action_vector(first, third, views)[:, :4], atol=1e-5)
    assert not action_vector(first, first, views)[:, :4].any()
    half = identity_parameters(views, 1) | {"brightness": np.float32([0.5])}
    action = action_vector(half, identity_parameters(views, 1), views)
    assert describe_action(action[0], views) == "brightness × 2.00"


def test_a_source_on_the_target_is_the_target_jittered_again(crops):
    views = ViewConfig(size=SIZE, jitter=Jitter(source="on_target", probability=1.0, brightness=0.2, contrast=0.2))
    independent = replace(views, jitter=replace(views.jitter, source="independent"))
    drawn, own = (draw(config, 0, 0, np.arange(COUNT)) for config in (views, independent))
    once, matrices = (
        views.jitter.color_map(drawn.source),
        [views.jitter.color_map(parameters).matrix for parameters in (own.source, own.target)],
    )
    np.testing.assert_allclose(once.matrix, matrices[0] @ matrices[1], atol=1e-6)
    names = [entry.name for entry in views.jitter.entries]
    jittered = [{name: parameters[name] for name in names} for parameters in (own.target, own.source, drawn.source)]
    neutral, grey = identity_parameters(views, COUNT), crops // 4 + 96
    twice = render(render(grey, neutral | jittered[0], views), neutral | jittered[1], views)
    assert difference(render(grey, neutral | jittered[2], views), twice).max() <= 2


def test_torchvisions_jitter_replaces_the_colour_map(crops):
    linear = ViewConfig(size=SIZE)
    views = replace(linear, jitter=Jitter(model="torchvision"))
    neutral = identity_parameters(views, COUNT)
    assert torch.equal(render(crops, neutral, views), crops)
    for name, limit in (("brightness", 1), ("contrast", 1), ("saturation", 1)):
        change = neutral | {name: np.full(COUNT, 0.8, np.float32)}
        assert difference(render(crops, change, views), render(crops, change, linear)).max() <= limit
    turned = neutral | {"hue": np.full(COUNT, 0.1, np.float32)}
    theirs = reference.adjust_hue(crops.permute(0, 3, 1, 2), 0.1).permute(0, 2, 3, 1)
    assert difference(render(crops, turned, views), theirs).max() <= 1
    assert difference(render(crops, turned, linear), theirs).mean() > 2
    assert action_vector(neutral, turned, views).tolist() == action_vector(neutral, turned, linear).tolist()


def test_the_graph_refuses_what_it_cannot_apply_but_renders_unchanged_images(crops):
    views = ViewConfig(size=SIZE, jitter=Jitter(model="torchvision", probability=1.0))
    settings = GraphSettings(views=views, max_batch_size=COUNT, num_threads=1, prefetch=1, device_id=None)
    drawn, windows = draw(views, 0, 0, np.arange(COUNT)), view_windows(identity_draws(views, COUNT), crops_shape())
    with pytest.raises(ValueError, match=r"these settings of views\.jitter need runtime\.loader=torch, got dali"):
        graph_parameters(drawn, windows, settings)
    assert torch.equal(rendered(crops, views, {})["dali"], crops)
