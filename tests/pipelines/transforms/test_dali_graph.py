"""The DALI graph compared with the reference renderer, on PNG files, which all decoders decode to the same pixels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from nvidia import dali
from nvidia.dali import pipeline_def

from fixtures.image_matrix import all_files
from fixtures.tar_files import encode, photograph
from iwm_fast.pipelines.image_header import probe
from iwm_fast.pipelines.transforms import dali_graph
from iwm_fast.pipelines.transforms.composition import Draws, ViewConfig, draw, identity_draws
from iwm_fast.pipelines.transforms.dali_graph import GraphSettings, build_graph, graph_parameters
from iwm_fast.pipelines.transforms.geometry import view_windows
from iwm_fast.pipelines.transforms.image_decoding import dali_input
from iwm_fast.pipelines.transforms.operations.blur import Blur
from iwm_fast.pipelines.transforms.operations.crop import Crop
from iwm_fast.pipelines.transforms.operations.grayscale import Grayscale
from iwm_fast.pipelines.transforms.operations.jitter import Jitter
from iwm_fast.pipelines.transforms.operations.solarize import Solarize
from iwm_fast.pipelines.transforms.torch_renderer import render

SIZE = 64
VIEWS = ViewConfig(size=SIZE)
SHAPES = [(40, 300), (300, 40), (64, 64), (97, 131), (211, 59), (500, 333), (17, 23), (1, 90)]


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    pixels = photograph("astronaut.png")
    return [pixels[:height, 100 : 100 + width] for height, width in SHAPES]


def run(
    images: list[np.ndarray], draws: Draws, device_id: int | None = None, views: ViewConfig = VIEWS, decode="gpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    encoded = [np.frombuffer(encode(image, "PNG"), np.uint8) for image in images]
    settings = GraphSettings(
        views=views, max_batch_size=len(images), num_threads=1, prefetch=1, device_id=device_id, decode=decode
    )
    windows = view_windows(draws, np.array([image.shape[:2] for image in images]))
    graph = build_graph(settings, lambda: (encoded, *graph_parameters(draws, windows, settings)))
    source, target = (np.array(as_cpu(output).as_tensor()) for output in graph.run())
    return torch.from_numpy(source), torch.from_numpy(target)


def as_cpu(output):
    return output.as_cpu() if hasattr(output, "as_cpu") else output


def with_neutral_geometry(draws: Draws) -> Draws:
    return replace(identity_draws(ViewConfig(), len(draws.flip)), source=draws.source, target=draws.target)


def test_decoded_crops_are_the_pixels_of_the_windows(images):
    encoded = [np.frombuffer(encode(image, "PNG"), np.uint8) for image in images]
    settings = GraphSettings(
        views=ViewConfig(size=SIZE), max_batch_size=len(images), num_threads=1, prefetch=1, device_id=None,
        output="crops",
    )  # fmt: skip
    draws = [draw(settings.views, 0, step, np.arange(len(images))) for step in range(8)]
    windows = [view_windows(drawn, np.array([image.shape[:2] for image in images])) for drawn in draws]
    inputs = iter([(encoded, *graph_parameters(*step, settings)) for step in zip(draws, windows, strict=True)])
    graph = build_graph(settings, lambda: next(inputs))
    for step in windows:
        (crops,) = graph.run()
        for crop, image, (top, left, height, width) in zip(crops, images, step.shared.astype(int), strict=True):
            assert (np.array(crop) == image[top : top + height, left : left + width]).all()


@pipeline_def(num_threads=1, device_id=None)
def both_crops(inputs):
    data = dali_graph.input_nodes(dali_graph.CROP_INPUTS, lambda: inputs)
    window = {"start": data["corner"], "shape": data["extent"], "axes": [0, 1]}
    return (
        dali_graph.crop_of_image(data["encoded"], window, device="cpu"),
        dali.fn.decoders.image_slice(data["encoded"], **window, device="cpu"),
    )


@pytest.mark.parametrize("container", ["jpeg", "png", "webp"])
def test_crops_of_complete_images_are_those_of_images_decoded_in_part(container):
    files = {name: np.frombuffer(content, np.uint8) for name, content in all_files(container).items()}
    files = {name: content for name, content in files.items() if "damage" not in name and probe(content).is_common}
    shapes = np.array([dali_input(content).shape for content in files.values()])
    draws = draw(VIEWS, 0, 0, np.arange(len(files)))
    corner, extent = dali_graph.crop_parameters(view_windows(draws, shapes))
    by_slice, by_decoder = both_crops([list(files.values()), corner, extent], batch_size=len(files)).run()
    for name, size, *crops in zip(files, extent, by_slice, by_decoder, strict=True):
        complete, in_part = (np.array(crop) for crop in crops)
        assert complete.shape == in_part.shape == (*size, 3) and (complete == in_part).all(), name
    assert len(files) > 5 and (extent < shapes).any() and (corner > 0).any()


def test_photometry_matches_the_reference_within_one_grey_level(images):
    config = ViewConfig(
        size=SIZE,
        jitter=Jitter(hue=0.3),
        grayscale=Grayscale(probability=0.3),
        blur=Blur(probability=0.5),
        solarize=Solarize(probability=0.3),
    )
    for step in range(4):
        draws = with_neutral_geometry(draw(config, 0, step, np.arange(len(images))))
        source, target = run(images, draws)
        clean, _ = run(images, identity_draws(ViewConfig(), len(images)))
        for ours, parameters in ((source, draws.source), (target, draws.target)):
            theirs = render(clean, parameters, ViewConfig())
            difference = (ours.int() - theirs.int()).abs()
            # A difference of one level before solarize may lie on both sides of 128, and be large afterwards.
            is_split = torch.from_numpy(parameters["solarize"])[:, None, None, None] & (difference > 250)
            allowed = torch.where(torch.from_numpy(parameters["grayscale"] | parameters["blur"]), 2, 1)
            assert ((difference <= allowed[:, None, None, None]) | is_split).all()
            assert (difference > 0).float().mean() < 0.01


def test_identity_parameters_leave_both_views_bit_equal_to_the_crop():
    pixels = photograph("coffee.png")[:SIZE, :SIZE]
    source, target = run([pixels], identity_draws(ViewConfig(), 1))
    assert torch.equal(source[0], torch.from_numpy(pixels)) and torch.equal(target, source)


def test_flip_mirrors_both_views(images):
    clean = identity_draws(ViewConfig(), len(images))
    source, target = run(images, replace(clean, flip=np.ones(len(images), bool)))
    straight, _ = run(images, clean)
    assert torch.equal(source, straight.flip(2)) and torch.equal(target, straight.flip(2))


def test_a_sample_is_rendered_the_same_alone_and_in_a_batch(images):
    draws = draw(ViewConfig(size=SIZE), 0, 3, np.arange(len(images)))
    together = run(images, draws)
    alone_draws = draw(ViewConfig(size=SIZE), 0, 3, np.array([5]))
    alone = run(images[5:6], alone_draws)
    for outputs, single_output in zip(together, alone, strict=True):
        assert (np.asarray(outputs[5]) == np.asarray(single_output[0])).all()


def test_contrast_scales_about_the_mean_of_the_view_itself():
    # The left half is dark and the right half bright; the source view shows only the left quarter.
    pixels = np.full((SIZE, SIZE, 3), 40, np.uint8)
    pixels[:, SIZE // 2 :] = 200
    clean = identity_draws(ViewConfig(), 1)
    halved = clean.source | {"contrast": np.array([0.5], np.float32)}
    draws = replace(clean, source_crop=np.array([[0.25, 1, 0, 0]], np.float32), source=halved, target=halved)
    settings = GraphSettings(
        views=ViewConfig(size=SIZE, crop=Crop(source_scale=(0.2, 0.5))),
        max_batch_size=1,
        num_threads=1,
        prefetch=1,
        device_id=None,
    )
    encoded = [np.frombuffer(encode(pixels, "PNG"), np.uint8)]
    parameters = graph_parameters(draws, view_windows(draws, np.array([[SIZE, SIZE]])), settings)
    source, target = build_graph(settings, lambda: (encoded, *parameters)).run()
    assert set(np.unique(np.array(source.as_tensor()))) == {40}
    assert set(np.unique(np.array(target.as_tensor()))) == {80, 160}


@pytest.mark.gpu
def test_the_graph_renders_the_same_views_on_a_gpu_and_on_the_cpu(images):
    config = ViewConfig(
        size=SIZE, grayscale=Grayscale(probability=0.3), blur=Blur(probability=0.5), solarize=Solarize(probability=0.0)
    )
    for step in range(4):
        draws = draw(config, 0, step, np.arange(len(images)))
        fast, plain = run(images, draws, device_id=0), run(images, draws)
        for ours, theirs in zip(fast, plain, strict=True):
            difference = (ours.int() - theirs.int()).abs().float()
            assert difference.mean() < 0.5 and difference.quantile(0.999) <= 4


def devices_of_nodes(decode: str, **views) -> dict[str, str]:
    """Return the device of each operator's output in a graph for a GPU, by name, without building it."""
    settings = GraphSettings(
        views=ViewConfig(size=SIZE, **views), max_batch_size=2, num_threads=1, prefetch=1, device_id=0, decode=decode,
        output="normalized",
    )  # fmt: skip
    graph = dali_graph._two_views(lambda: (), settings, **settings.pipeline_arguments)
    graph._build_graph()
    outputs = [output for operator in graph._ops for output in operator.outputs]
    return {output.name: output.device for output in outputs if "ExternalSource" not in output.name}


@pytest.mark.parametrize("views", [{}, {"crop": Crop(source_scale=(0.2, 0.8))}])
def test_a_graph_for_a_gpu_decodes_where_it_is_told_and_renders_on_the_gpu(views):
    by_gpu, by_cpu = (devices_of_nodes(decode, **views) for decode in ("gpu", "cpu"))
    operators_of_gpu = {name.split("_")[2] for name in by_gpu}
    # A GPU decodes complete images.
    assert {"Image", "Slice"} <= operators_of_gpu and "ImageSlice" not in operators_of_gpu
    for name, device in [*by_gpu.items(), *by_cpu.items()]:
        operator = name.split("_")[2]
        assert device == ("cpu" if operator == "ImageSlice" else "gpu") or operator in ("Split", "Merge"), name
    assert "CropMirrorNormalize" in {name.split("_")[2] for name in by_cpu}


@pytest.mark.gpu
@pytest.mark.parametrize("views", [{}, {"crop": Crop(source_scale=(0.2, 0.8))}])
def test_pixels_decoded_on_the_cpu_are_rendered_on_the_gpu_like_those_decoded_there(images, views):
    config = ViewConfig(size=SIZE, solarize=Solarize(probability=0), **views)
    for step in range(2):
        draws = draw(config, 0, step, np.arange(len(images)))
        decoded_there, decoded_here = (run(images, draws, 0, views=config, decode=decode) for decode in ("gpu", "cpu"))
        for ours, theirs in zip(decoded_there, decoded_here, strict=True):
            # The files are PNGs, which both decode alike.
            assert torch.equal(ours, theirs)
