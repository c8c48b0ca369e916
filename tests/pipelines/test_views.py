import numpy as np
import pytest
import torch
from torchvision.transforms import functional as reference

from pipelines.actions import Photometry, neutral_photometry
from pipelines.views import blur, decode_image, recolor, render, resized_crop
from samples import photograph


def change(count: int = 1, **values: float) -> Photometry:
    neutral = vars(neutral_photometry(count))
    return Photometry(**{name: np.full_like(old, values.get(name, old[0])) for name, old in neutral.items()})


@pytest.fixture(scope="module")
def crop() -> torch.Tensor:
    return torch.from_numpy(photograph("coffee.png")[100:196, 200:296].copy())[None]


def as_planes(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.permute(0, 3, 1, 2)


def test_identity_leaves_pixels_bit_equal(crop):
    assert torch.equal(render(crop, neutral_photometry(1)), crop)


@pytest.mark.parametrize("factor", [0.6, 1.4])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_jitter_is_torchvisions_within_rounding(crop, name: str, factor: float):
    ours = recolor(crop, change(**{name: factor})).int()
    theirs = getattr(reference, f"adjust_{name}")(as_planes(crop), factor).permute(0, 2, 3, 1).int()
    assert (ours - theirs).abs().max() <= 2


def test_hue_keeps_luma_where_torchvision_does_not(crop):
    weights = torch.tensor([0.299, 0.587, 0.114])
    muted = (crop.float() * 0.4 + 80).to(torch.uint8)  # far from the clamp
    turned = recolor(muted, change(hue=0.1)).float() @ weights
    assert (turned - muted.float() @ weights).abs().max() < 1.5
    theirs = reference.adjust_hue(as_planes(muted), 0.1).permute(0, 2, 3, 1).float() @ weights
    assert (theirs - muted.float() @ weights).abs().max() > 5


def test_jitter_clamps_once_so_that_bright_and_dark_cancel(crop):
    back = recolor(crop, change(contrast=0.5, brightness=2.0)).float()
    direct = (crop.float() + (crop.float() @ torch.tensor([0.299, 0.587, 0.114])).mean()).clamp(0, 255)
    assert (back - direct).abs().max() <= 0.51


def test_grayscale_is_torchvisions(crop):
    theirs = reference.rgb_to_grayscale(as_planes(crop), 3).permute(0, 2, 3, 1).int()
    assert (recolor(crop, change(grayscale=True)).int() - theirs).abs().max() <= 1


def test_blur_is_torchvisions_with_its_own_width_per_image(crop):
    sigmas = [0.1, 0.7, 2.0]
    blurred = blur(crop.expand(3, -1, -1, -1), np.array(sigmas, np.float32)).int()
    for image, sigma in zip(blurred, sigmas, strict=True):
        width = 2 * int(np.ceil(3 * sigma)) + 1
        theirs = reference.gaussian_blur(as_planes(crop), [width, width], [sigma, sigma])[0].permute(1, 2, 0).int()
        assert (image - theirs).abs().max() <= 1


def test_solarize_inverts_values_of_128_and_more():
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3).contiguous()
    solarized = render(ramp, change(solarize=True))
    assert torch.equal(solarized, torch.where(ramp >= 128, 255 - ramp, ramp))


def test_flags_act_on_their_own_image_only(crop):
    mixed = change(3)
    mixed.blur[1], mixed.solarize[2] = True, True
    rendered = render(crop.expand(3, -1, -1, -1).contiguous(), mixed)
    assert torch.equal(rendered[0], crop[0])
    assert not torch.equal(rendered[1], crop[0]) and not torch.equal(rendered[2], crop[0])


def test_a_crop_of_the_whole_square_at_its_own_size_changes_nothing(crop):
    assert torch.equal(resized_crop(crop[0], np.array([0, 0, 96, 96], np.float32), 96), crop[0])


def test_resize_is_torchvisions_antialiased(crop):
    ours = resized_crop(crop[0], np.array([10, 20, 60, 70], np.float32), 32)
    theirs = reference.resized_crop(as_planes(crop), 10, 20, 60, 70, [32, 32], antialias=True)
    assert (ours.int() - theirs[0].permute(1, 2, 0).int()).abs().max() <= 1


def test_bytes_that_are_no_image_are_refused():
    with pytest.raises(OSError, match="cannot identify image file"):
        decode_image(np.frombuffer(b"<html>not found</html>", np.uint8))
