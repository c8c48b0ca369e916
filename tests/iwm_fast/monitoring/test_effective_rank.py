"""RankMe and LiDAR count the dimensions that features use."""

import math

import pytest
import torch

from iwm_fast.monitoring.effective_rank import lidar, rank_me


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rank_me_is_the_number_of_equal_singular_values(generator, rank):
    basis, _ = torch.linalg.qr(torch.randn(32, 16, generator=generator))
    rotation, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    features = 5 * basis[:, :rank] @ rotation[:rank]
    assert rank_me(features).item() == pytest.approx(rank, rel=1e-4)


def reference_lidar(features: torch.Tensor, delta: float) -> float:
    """Return LiDAR as the paper writes it, with loops and the inverse square root."""
    images, views, dim = features.shape
    mean = features.mean(1)
    overall = mean.mean(0)
    between = sum(torch.outer(row - overall, row - overall) for row in mean) / images
    deviations = [features[i, v] - mean[i] for i in range(images) for v in range(views)]
    within = sum(torch.outer(row, row) for row in deviations) / (images * (views - 1)) + delta * torch.eye(dim).double()
    values, vectors = torch.linalg.eigh(within)
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    share = torch.linalg.eigvalsh(root @ between @ root).clamp(min=0)
    share = share / share.sum()
    return math.exp(-sum(float(p * p.log()) for p in share if p > 0))


def test_lidar_equals_the_formula_of_the_paper(generator):
    scales = torch.logspace(0, -2, 6, dtype=torch.float64)
    image = torch.randn(20, 1, 6, generator=generator, dtype=torch.float64) * scales
    features = image + 0.1 * torch.randn(20, 5, 6, generator=generator, dtype=torch.float64)
    assert lidar(features).item() == pytest.approx(reference_lidar(features, 1e-4), rel=1e-9)


def test_dimensions_that_only_the_view_decides_do_not_count_for_lidar(generator):
    image = torch.zeros(500, 10, 8)
    image[..., :2] = torch.randn(500, 1, 2, generator=generator)
    views = torch.zeros(500, 10, 8)
    views[..., 2:] = torch.randn(500, 10, 6, generator=generator)
    views[..., :2] = 0.01 * torch.randn(500, 10, 2, generator=generator)
    assert lidar(image + views).item() == pytest.approx(2, abs=0.05)
    assert rank_me((image + views).mean(1)).item() > 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_give_nan(bad):
    features = torch.ones(4, 3, 2)
    features[1, 1, 1] = bad
    assert lidar(features).isnan() and rank_me(features[:, 1]).isnan()
