"""Fixtures that build small ragged indexes, batches and settings for tests of the method."""

import pytest
import torch

from iwm_fast.config.run import EncoderConfig, ModelConfig, OptimConfig, PredictorConfig, RunConfig
from iwm_fast.pipelines.batch import Batch, RaggedIndex
from iwm_fast.pipelines.transforms.composition import ViewConfig, identity_draws
from iwm_fast.pipelines.transforms.operations.blur import Blur

GRID, PATCH = 4, 4


def _ragged(patches, total=None, grid=GRID):
    lengths = [len(image_patches) for image_patches in patches]
    rows = [image * grid**2 + patch for image, image_patches in enumerate(patches) for patch in image_patches]
    return RaggedIndex(
        patch=torch.tensor(rows, dtype=torch.int64) % grid**2,
        row=torch.tensor(rows, dtype=torch.int64),
        offsets=torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
        lengths=tuple(lengths),
        total=sum(lengths) if total is None else total,
    )


def _batch(context, target, seed=0):
    generator = torch.Generator().manual_seed(seed)
    num_images = len(context)
    number = torch.arange(num_images)
    return Batch(
        source_view=torch.randn(num_images, 3, GRID * PATCH, GRID * PATCH, generator=generator),
        target_view=torch.randn(num_images, 3, GRID * PATCH, GRID * PATCH, generator=generator),
        action=torch.randn(num_images, 7, generator=generator),
        context=_ragged(context),
        target=_ragged(target),
        crop_window=torch.zeros(num_images, 4),
        source_window=torch.zeros(num_images, 4),
        scheduled_sample=number,
        draws=identity_draws(ViewConfig(), num_images),
        label=number,
        sample=number,
        slot=number,
        key=tuple(f"sample{i}" for i in range(num_images)),
        step=0,
    )


def _config(*, conditioning="feature", predictor_depth=2, precision="fp32", seed=0):
    encoder = EncoderConfig(dim=16, depth=2, num_heads=2, patch_size=PATCH)
    predictor = PredictorConfig(dim=8, depth=predictor_depth, num_heads=2, conditioning=conditioning)
    return RunConfig(
        seed=seed,
        views=ViewConfig(size=GRID * PATCH, blur=Blur(sigma=(0.1, 1.0))),
        model=ModelConfig(encoder=encoder, predictor=predictor),
        optim=OptimConfig(precision=precision),
    )


@pytest.fixture
def ragged():
    """Return a function from lists of patch numbers, one per image, to a RaggedIndex on a 4 x 4 grid."""
    return _ragged


@pytest.fixture
def make_batch():
    """Return a function from context and target patches per image to a Batch of 16 x 16 images in patches of 4."""
    return _batch


@pytest.fixture
def tiny_config():
    """Return a function from a few settings to the RunConfig of a tiny model that fits `make_batch`."""
    return _config
