"""Augmentation of batches: erasing, mixing and smoothing change images and labels consistently."""

import numpy as np
import pytest
import torch

from fixtures.tiny_finetuning import plain_augment, tiny_task
from iwm_fast.evals.finetuning.mixup import BatchAugmentation
from iwm_fast.runtime.seeding import seeded_rng

LABEL = torch.tensor([0, 1, 2, 3])


def images():
    """Return images whose pixels all equal the image's label."""
    return LABEL[:, None, None, None].float().expand(4, 3, 32, 32).clone()


def augmentation(shards, *, batch_size=4, **augment):
    settings = tiny_task(shards, augment=plain_augment(**augment), tune={"global_batch_size": batch_size})
    return BatchAugmentation(settings, num_classes=4, world_size=1)


def seeded(seed=0):
    return seeded_rng(seed, seed=0, device=torch.device("cpu"))


def test_without_augmentation_nothing_changes(tiny_shards):
    view, label = augmentation(tiny_shards, label_smoothing=0.0)(images(), LABEL)
    assert torch.equal(view, images()) and torch.equal(label, torch.eye(4))


def test_smoothing_spreads_its_weight_over_all_classes(tiny_shards):
    _, label = augmentation(tiny_shards, label_smoothing=0.2)(images(), LABEL)
    torch.testing.assert_close(label, 0.8 * torch.eye(4) + 0.2 / 4)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_mixed_label_weights_classes_by_their_share_of_the_image(tiny_shards, kind):
    mix, weights = augmentation(tiny_shards, **{kind: 1.0}, label_smoothing=0.0), set()
    for seed in range(8):
        with seeded(seed):
            view, label = mix(images(), LABEL)
        # Pixels equal the class number, so the image mean is the mean class number.
        torch.testing.assert_close(view.mean((1, 2, 3)), label @ torch.arange(4.0))
        torch.testing.assert_close(label.sum(1), torch.ones(4))
        if kind == "cutmix":
            assert set(view.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
        weights.add(round(float(label[0, 0]), 3))
    assert len(weights) > 4


def test_mixing_depends_only_on_the_seed_and_does_not_change_the_batch(tiny_shards):
    batch, mix = images(), augmentation(tiny_shards, mixup=0.8, cutmix=1.0)
    outcomes = []
    for seed in (1, 2, 1):
        with seeded(seed):
            outcomes.append(mix(batch, LABEL)[0])
    assert torch.equal(outcomes[0], outcomes[2]) and not torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(batch, images())


def test_erasing_fills_rectangles_of_some_images_with_noise(tiny_shards):
    erase = augmentation(tiny_shards, erasing=0.5, label_smoothing=0.0)
    erased, shares = 0, []
    for seed in range(20):
        with seeded(seed):
            view, label = erase(images(), LABEL)
        changed = (view != images()).all(dim=1)
        assert torch.equal(label, torch.eye(4))
        for mask in changed:
            rows, columns = mask.any(1), mask.any(0)
            assert torch.equal(mask, rows[:, None] & columns[None])
            erased += bool(mask.any())
            shares += [float(mask.float().mean())] if mask.any() else []
    assert 25 < erased < 55, "about half of the 80 images must be erased"
    assert min(shares) > 0.01 and max(shares) < 0.37 and np.std(shares) > 0.05
    noise = view[changed[:, None].expand_as(view)]
    assert len(noise) == 0 or noise.std() > 0.5


def test_an_odd_micro_batch_is_refused_if_images_are_mixed(tiny_shards):
    with pytest.raises(ValueError, match=r"runtime.micro_batch_size .*must be even if augment.mixup .*got 3"):
        augmentation(tiny_shards, batch_size=3, mixup=0.8)
    augmentation(tiny_shards, batch_size=3, erasing=0.5)
