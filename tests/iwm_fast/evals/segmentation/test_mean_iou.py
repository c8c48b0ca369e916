"""Mean IoU, pixel accuracy and their intervals, compared with values computed by hand or from a confusion matrix."""

import numpy as np
import pytest
import torch

from iwm_fast.evals.segmentation.mean_iou import (
    class_iou,
    count_pixels,
    majority_baseline,
    mean_iou,
    percentile_interval,
    pixel_accuracy,
    resampled_mean_iou,
)

IGNORE = 255
# Two images of 2 x 3 pixels with three classes, and a fourth class that does not occur.
MASK = torch.tensor([[[0, 0, 1], [1, 1, IGNORE]], [[2, 2, 2], [IGNORE, IGNORE, 0]]], dtype=torch.uint8)
PREDICTED = torch.tensor([[[0, 1, 1], [1, 3, 0]], [[2, 2, 0], [2, 3, 0]]])


def counts() -> np.ndarray:
    return count_pixels(PREDICTED, MASK, 4, IGNORE).numpy()


def interval(counted: np.ndarray, seed: int) -> tuple[float, float]:
    return percentile_interval(resampled_mean_iou(counted, seed), mean_iou(counted))


def test_pixels_are_counted_by_image_and_class():
    first = [[1, 2, 0, 0], [1, 3, 0, 1], [2, 3, 0, 0]]  # correct, predicted, true
    second = [[1, 0, 2, 0], [2, 0, 2, 0], [1, 0, 3, 0]]
    assert counts().tolist() == [first, second]


def test_mean_iou_is_over_the_classes_that_occur():
    # Classes 0 and 1: 2 of 3 + 3 - 2 pixels; class 2: 2 of 2 + 3 - 2; class 3 does not occur.
    assert mean_iou(counts()) == pytest.approx((2 / 4 + 2 / 4 + 2 / 3) / 3)
    assert class_iou(counts()) == [2 / 4, 2 / 4, 2 / 3, None]
    assert pixel_accuracy(counts()) == pytest.approx(6 / 9)


def test_metrics_are_equal_to_those_of_the_confusion_matrix():
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 5, (7, 6, 6), generator=generator)
    predicted = torch.randint(0, 5, (7, 6, 6), generator=generator)
    matrix = np.zeros((5, 5))
    np.add.at(matrix, (mask.flatten().numpy(), predicted.flatten().numpy()), 1)
    diagonal = np.diag(matrix)
    expected = (diagonal / (matrix.sum(0) + matrix.sum(1) - diagonal)).mean()
    counted = count_pixels(predicted, mask, 5, IGNORE).numpy()
    assert mean_iou(counted) == pytest.approx(expected) and pixel_accuracy(counted) == diagonal.sum() / matrix.sum()


def test_pixels_with_ignore_index_are_not_counted():
    assert count_pixels(PREDICTED, MASK, 4, 0)[:, 2].tolist() == [[0, 3, 0, 0], [0, 0, 3, 0]]


def test_perfect_predictions_score_1_and_the_majority_baseline_less():
    # Classes 0, 1 and 2 have 3 pixels each, so the baseline predicts the first of them.
    assert mean_iou(majority_baseline(counts())) == pytest.approx(3 / 9 / 3)
    assert pixel_accuracy(majority_baseline(counts())) == pytest.approx(3 / 9)
    perfect = count_pixels(MASK, MASK, 256, IGNORE).numpy()
    assert mean_iou(perfect) == pixel_accuracy(perfect) == 1.0
    assert percentile_interval(resampled_mean_iou(perfect), 1.0) == (1.0, 1.0)


def test_the_majority_baseline_has_the_counts_of_a_constant_prediction():
    true = torch.where(MASK == 1, 2, MASK)
    constant = count_pixels(torch.full_like(true, 2), true, 4, IGNORE).numpy()
    assert np.array_equal(majority_baseline(count_pixels(PREDICTED, true, 4, IGNORE).numpy()), constant)


def test_the_interval_contains_the_value_and_shrinks_with_more_images():
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 3, (400, 8, 8), generator=generator)
    is_wrong = torch.rand(400, 1, 1, generator=generator) * torch.rand(mask.shape, generator=generator) > 0.3
    counted = count_pixels(torch.where(is_wrong, (mask + 1) % 3, mask), mask, 3, IGNORE).numpy()
    wide, narrow = (interval(part, seed=1) for part in (counted[:25], counted))
    assert narrow[0] < mean_iou(counted) < narrow[1] and wide[0] < mean_iou(counted[:25]) < wide[1]
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])
    assert interval(counted, seed=1) == narrow != interval(counted, seed=2)


def test_the_interval_contains_the_value_if_rare_classes_are_segmented_badly():
    # One image each of 15 classes that are never found, and 200 images of a class that is.
    mask = torch.tensor([*range(1, 16), *[0] * 200], dtype=torch.uint8)[:, None, None].expand(-1, 2, 2)
    counted = count_pixels(torch.zeros_like(mask).long(), mask, 16, IGNORE).numpy()
    low, high = interval(counted, seed=0)
    assert low <= mean_iou(counted) <= high and high - low > 0.01
    draws = resampled_mean_iou(counted)
    assert np.quantile(draws, 0.025) > mean_iou(counted)


def test_bootstrap_draws_with_one_seed_have_the_same_images():
    once, twice = resampled_mean_iou(counts(), seed=1), resampled_mean_iou(2 * counts(), seed=1)
    np.testing.assert_allclose(once, twice)
    assert once.std() > 0.01


def test_masks_with_only_ignored_pixels_are_refused():
    counted = count_pixels(PREDICTED, torch.full_like(MASK, IGNORE), 4, IGNORE).numpy()
    for measure in (mean_iou, pixel_accuracy):
        with pytest.raises(ValueError, match="masks contain only pixels with ignore_index"):
            measure(counted)
