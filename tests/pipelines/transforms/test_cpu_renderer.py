"""The CPU renderer compared with the reference renderer, and its reuse of memory."""

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fixtures.tar_files import photograph
from iwm_fast.pipelines.config import IMAGENET
from iwm_fast.pipelines.transforms.composition import Draws, ViewConfig, draw, identity_draws
from iwm_fast.pipelines.transforms.cpu_renderer import CpuRenderer, RecycledMemory
from iwm_fast.pipelines.transforms.geometry import Windows
from iwm_fast.pipelines.transforms.normalization import denormalize_view, normalize_view
from iwm_fast.pipelines.transforms.operations.blur import Blur
from iwm_fast.pipelines.transforms.operations.grayscale import Grayscale
from iwm_fast.pipelines.transforms.operations.jitter import Jitter
from iwm_fast.pipelines.transforms.operations.solarize import Solarize
from iwm_fast.pipelines.transforms.torch_renderer import render, resized_crop

SIZE = 64
MANY = ViewConfig(
    size=SIZE,
    jitter=Jitter(hue=0.3),
    grayscale=Grayscale(probability=0.3),
    blur=Blur(probability=0.5),
    solarize=Solarize(probability=0.3),
)
ZOOM = replace(MANY, crop=replace(MANY.crop, source_scale=(0.2, 0.8)), flip=replace(MANY.flip, source_probability=0.5))
# One grey level after normalisation, for the channel with the smallest standard deviation.
LEVEL = 1 / (255 * 0.224)
COUNT = 16


@pytest.fixture(scope="module")
def crops() -> list[Tensor]:
    """Crops of the size of the views, which resizing does not change."""
    pixels = torch.from_numpy(photograph("coffee.png"))
    return [pixels[10 * i : 10 * i + SIZE, 20 * i : 20 * i + SIZE].contiguous() for i in range(COUNT)]


@pytest.fixture(scope="module")
def large_crops() -> list[Tensor]:
    """Crops of other sizes than the views: narrow, large, small, and single pixels."""
    pixels = torch.from_numpy(photograph("coffee.png"))
    shapes = [(1, 1), (1, 90), (17, 23), (64, 300), (300, 40), *((50 + 20 * i, 400 - 25 * i) for i in range(11))]
    return [pixels[:height, :width].contiguous() for height, width in shapes]


@pytest.fixture
def renderer():
    renderer = CpuRenderer(MANY, num_threads=2, normalization=IMAGENET)
    yield renderer
    renderer.close()


def whole(crops: list[Tensor]) -> Windows:
    """Return windows of views that show complete crops."""
    window = np.array([[0, 0, *crop.shape[:2]] for crop in crops], np.float32)
    return Windows(shared=window, source=window)


def drawn(step: int = 0, config: ViewConfig = MANY) -> Draws:
    return draw(config, 0, step, np.arange(COUNT))


def mirrored(crops: Tensor, is_flipped: np.ndarray) -> Tensor:
    return torch.where(torch.from_numpy(is_flipped)[:, None, None, None], crops.flip(2), crops)


def test_photometry_is_within_a_grey_level_of_the_reference(crops, renderer):
    for step in range(8):
        draws = drawn(step)
        views = renderer.views(crops, whole(crops), draws)
        flipped = mirrored(torch.stack(crops), draws.flip)
        for ours, parameters in zip(views, (draws.source, draws.target), strict=True):
            difference = (ours - normalize_view(render(flipped, parameters, MANY), IMAGENET)).abs()
            # The reference rounds to whole levels after recolouring and after blurring.
            limit = torch.from_numpy(np.where(parameters["blur"], 1.01, 0.51).astype(np.float32))
            assert (difference <= limit[:, None, None, None] * LEVEL).all()


def test_resized_crops_are_within_a_grey_level_of_the_reference(large_crops, renderer):
    reference = torch.stack([
        resized_crop(crop, window, SIZE) for crop, window in zip(large_crops, whole(large_crops).shared, strict=True)
    ])  # fmt: skip
    for flip in (False, True):
        draws = replace(identity_draws(ViewConfig(), COUNT), flip=np.full(COUNT, flip))
        for view in renderer.views(large_crops, whole(large_crops), draws):
            expected = mirrored(reference, draws.flip)
            difference = (denormalize_view(view, IMAGENET).int() - expected.int()).abs().float()
            assert difference.max() <= 1 and difference.mean() < 0.2
            assert (denormalize_view(view, IMAGENET).int() - expected.flip(2).int()).abs().float().mean() > 5


def test_neutral_parameters_leave_both_views_bit_equal_to_the_crop(crops, renderer):
    source, target = renderer.views(crops, whole(crops), identity_draws(ViewConfig(), COUNT))
    assert torch.equal(source, normalize_view(torch.stack(crops), IMAGENET)) and torch.equal(target, source)
    assert source.data_ptr() != target.data_ptr()


def test_the_source_view_shows_its_window_of_the_shared_crop(large_crops):
    renderer = CpuRenderer(ZOOM, num_threads=2, normalization=IMAGENET)
    draws, windows = drawn(config=ZOOM), whole(large_crops)
    inner = np.array([
        [height // 3, width // 4, max(height // 2, 1), max(width // 2, 1)] for _, _, height, width in windows.shared
    ], np.float32)  # fmt: skip
    # The stored image is larger than the shared crop.
    offset = np.float32([7, 5, 0, 0])
    source, target = renderer.views(large_crops, Windows(shared=windows.shared + offset, source=inner + offset), draws)
    regions = [
        crop[int(top) : int(top + height), int(left) : int(left + width)].contiguous()
        for crop, (top, left, height, width) in zip(large_crops, inner, strict=True)
    ]
    alone = replace(draws, flip=draws.flip ^ draws.source_flip, source_flip=np.zeros(COUNT, bool))
    assert torch.equal(source, renderer.views(regions, whole(regions), alone)[0])
    assert torch.equal(target, renderer.views(large_crops, windows, draws)[1])
    renderer.close()


@pytest.mark.parametrize("size", [SIZE, 50, 33])
def test_threads_batches_and_places_in_a_batch_do_not_change_a_view(large_crops, size):
    renderer, single = (
        CpuRenderer(replace(MANY, size=size), num_threads=count, normalization=IMAGENET) for count in (2, 1)
    )
    together = renderer.views(large_crops, whole(large_crops), drawn(3))
    for image in range(COUNT):
        crop = [large_crops[image]]
        alone = single.views(crop, whole(crop), draw(MANY, 0, 3, np.array([image])))
        for view, single_view in zip(together, alone, strict=True):
            assert torch.equal(view[image], single_view[0])
    renderer.close()
    single.close()


def test_memory_is_reused_only_when_no_tensor_refers_to_it():
    memory = RecycledMemory()
    first = memory.take((2, 3))
    slice_of_first = first.fill_(7.0)[1]
    address = first.data_ptr()
    del first
    gc.collect()
    second = memory.take((2, 3)).fill_(0.0)
    assert second.data_ptr() != address and (slice_of_first == 7).all()
    del slice_of_first
    gc.collect()
    assert memory.take((2, 3)).data_ptr() == address
    assert memory.take((2, 4)).shape == (2, 4)


def test_memory_is_kept_while_a_gradient_needs_it():
    memory = RecycledMemory()
    pixels = memory.take((4,)).fill_(3.0)
    address, weight = pixels.data_ptr(), torch.ones(4, requires_grad=True)
    product = (pixels * weight).sum()
    del pixels
    gc.collect()
    assert memory.take((4,)).data_ptr() != address
    product.backward()
    assert weight.grad is not None and (weight.grad == 3).all()


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_each_worker_uses_one_torch_thread_and_the_callers_setting_remains(num_threads, num_workers):
    before = torch.get_num_threads()
    try:
        # In a thread that has not asked for its number of threads yet, as at the start of a program.
        with ThreadPoolExecutor(1) as caller:
            caller.submit(torch.set_num_threads, num_threads).result()
            renderer = caller.submit(CpuRenderer, MANY, num_workers, IMAGENET).result()
            assert caller.submit(torch.get_num_threads).result() == num_threads
        used = [job.result() for job in [renderer._pool.submit(torch.get_num_threads) for _ in range(2 * num_workers)]]
        assert set(used) == {1}
        renderer.close()
        with ThreadPoolExecutor(1) as another:
            assert another.submit(torch.get_num_threads).result() == num_threads, "threads that start later"
        assert torch.get_num_threads() == before, "threads that exist already"
    finally:
        torch.set_num_threads(before)
