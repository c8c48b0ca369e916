"""PSNR and SSIM agree with scikit-image."""

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fixtures.tar_files import photograph
from iwm_fast.evals.decoding.image_quality import psnr, ssim

# Window and constants of the paper; scikit-image's defaults are others.
OPTIONS = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 0}


def crops(size, count=3):
    pixels = torch.from_numpy(photograph("astronaut.png")[: size * count, :size].copy()).float() / 255
    return pixels.permute(2, 0, 1).unflatten(1, (count, size)).transpose(0, 1)


@pytest.mark.parametrize("size", [11, 16, 33])
@pytest.mark.parametrize("noise", [0.001, 0.1, 1.0])
def test_both_agree_with_scikit_image(size, noise):
    truth = crops(size)
    image = (truth + noise * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    pairs = list(zip(truth.numpy(), image.numpy(), strict=True))
    expected = [structural_similarity(*pair, data_range=1.0, **OPTIONS) for pair in pairs]
    assert ssim(image, truth).tolist() == pytest.approx(expected, abs=1e-5)
    expected = [peak_signal_noise_ratio(*pair, data_range=1.0) for pair in pairs]
    assert psnr(image, truth).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [8, 32])
def test_equal_images_have_the_largest_values(size):
    truth = crops(size)
    assert psnr(truth, truth).tolist() == [100.0] * 3
    assert ssim(truth, truth).tolist() == pytest.approx([1.0] * 3)
    assert ssim(1 - truth, truth).max() < 0.5
