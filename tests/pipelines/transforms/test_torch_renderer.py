"""The reference renderer; tests/pipelines/test_parity.py compares it with the DALI graph and torchvision."""

import numpy as np
import pytest
import torch

from fixtures.tar_files import photograph
from iwm_fast.pipelines.errors import UndecodableImageError
from iwm_fast.pipelines.transforms.base import Parameters
from iwm_fast.pipelines.transforms.composition import ViewConfig, fused_color_map, identity_parameters
from iwm_fast.pipelines.transforms.image_decoding import decode_image
from iwm_fast.pipelines.transforms.operations.jitter import Jitter
from iwm_fast.pipelines.transforms.torch_renderer import recolor, render, resized_crop


def change(count: int = 1, **values: float) -> Parameters:
    neutral = identity_parameters(ViewConfig(), count)
    return {name: np.full_like(old, values.get(name, old[0])) for name, old in neutral.items()}


@pytest.fixture(scope="module")
def crop() -> torch.Tensor:
    return torch.from_numpy(photograph("coffee.png")[100:196, 200:296].copy())[None]


def test_identity_leaves_pixels_bit_equal(crop):
    assert torch.equal(render(crop, change(), ViewConfig()), crop)


def test_jitter_clamps_once_so_that_bright_and_dark_cancel(crop):
    actual = recolor(crop, fused_color_map((Jitter(),), change(contrast=0.5, brightness=2.0))).float()
    expected = (crop.float() + (crop.float() @ torch.tensor([0.299, 0.587, 0.114])).mean()).clamp(0, 255)
    assert (actual - expected).abs().max() <= 0.51


def test_solarize_inverts_values_of_128_and_more():
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3).contiguous()
    solarized = render(ramp, change(solarize=True), ViewConfig())
    assert torch.equal(solarized, torch.where(ramp >= 128, 255 - ramp, ramp))


def test_flags_act_on_their_own_image_only(crop):
    mixed = change(3)
    mixed["blur"][1], mixed["solarize"][2] = True, True
    rendered = render(crop.expand(3, -1, -1, -1).contiguous(), mixed, ViewConfig())
    assert torch.equal(rendered[0], crop[0])
    assert not torch.equal(rendered[1], crop[0]) and not torch.equal(rendered[2], crop[0])


def test_a_crop_of_the_full_square_at_its_size_changes_nothing(crop):
    assert torch.equal(resized_crop(crop[0], np.array([0, 0, 96, 96], np.float32), 96), crop[0])


def test_bytes_that_are_not_an_image_are_refused():
    with pytest.raises(UndecodableImageError, match="is not an image, it begins with b'<html>not found<'"):
        decode_image(np.frombuffer(b"<html>not found</html>", np.uint8))
