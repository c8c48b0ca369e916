"""The CPU renderer compared with the reference renderer, and its reuse of memory."""

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from fixtures.tar_files import photograph
from iwm_fast.pipelines.config import IMAGENET, ViewConfig
from iwm_fast.pipelines.transforms.cpu_renderer import CpuPhotometry, RecycledMemory
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.pipelines.transforms.parameters import draw, identity_draws
from iwm_fast.pipelines.transforms.torch_renderer import render

SIZE = 64
MANY = ViewConfig(size=SIZE, hue=0.3, grayscale_probability=0.3, blur_probability=0.5, solarize_probability=0.3)
# One grey level after normalisation, for the channel with the smallest standard deviation.
LEVEL = 1 / (255 * 0.224)


@pytest.fixture(scope="module")
def crops() -> Tensor:
    pixels = photograph("coffee.png")
    return torch.from_numpy(np.stack([pixels[10 * i : 10 * i + SIZE, 20 * i : 20 * i + SIZE] for i in range(16)]))


@pytest.fixture
def photometry():
    renderer = CpuPhotometry(num_threads=2, normalization=IMAGENET)
    yield renderer
    renderer.close()


def test_views_match_the_reference_except_for_rounding(crops, photometry):
    for step in range(8):
        draws = draw(MANY, 0, step, np.arange(len(crops)))
        views = photometry.views(crops, crops, draws)
        for ours, parameters in zip(views, (draws.source, draws.target), strict=True):
            difference = (ours - normalize_view(render(crops, parameters), IMAGENET)).abs()
            # A difference of one level before solarize may lie on both sides of 128, and be large afterwards.
            is_split = torch.from_numpy(parameters.solarize)[:, None, None, None] & (difference > 250 * LEVEL)
            assert ((difference < 1.1 * LEVEL) | is_split).all()
            assert (difference > 1e-5).float().mean() < 1e-3


def test_neutral_parameters_leave_both_views_bit_equal_to_the_crop(crops, photometry):
    source, target = photometry.views(crops, crops, identity_draws(len(crops)))
    assert torch.equal(source, normalize_view(crops, IMAGENET)) and torch.equal(target, source)
    assert source.data_ptr() != target.data_ptr()


def test_each_view_is_rendered_from_its_crop(crops, photometry):
    draws = draw(MANY, 0, 0, np.arange(len(crops)))
    turned = crops.flip(1).contiguous()
    source, target = photometry.views(turned, crops, draws)
    assert torch.equal(source, photometry.views(turned, turned, draws)[0])
    assert torch.equal(target, photometry.views(crops, crops, draws)[1])


def test_threads_and_batches_do_not_change_a_view(crops, photometry):
    together = photometry.views(crops, crops, draw(MANY, 0, 3, np.arange(len(crops))))
    single = CpuPhotometry(num_threads=1, normalization=IMAGENET)
    alone = single.views(crops[5:6], crops[5:6], draw(MANY, 0, 3, np.array([5])))
    single.close()
    for view, single_view in zip(together, alone, strict=True):
        assert torch.equal(view[5], single_view[0])


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
            renderer = caller.submit(CpuPhotometry, num_workers, IMAGENET).result()
            assert caller.submit(torch.get_num_threads).result() == num_threads
        used = [job.result() for job in [renderer._pool.submit(torch.get_num_threads) for _ in range(2 * num_workers)]]
        assert set(used) == {1}
        renderer.close()
        with ThreadPoolExecutor(1) as another:
            assert another.submit(torch.get_num_threads).result() == num_threads, "threads that start later"
        assert torch.get_num_threads() == before, "threads that exist already"
    finally:
        torch.set_num_threads(before)
