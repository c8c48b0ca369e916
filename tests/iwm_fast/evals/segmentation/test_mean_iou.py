import numpy as np
import pytest
import torch

from iwm_fast.evals.segmentation.mean_iou import (
    class_iou,
    guessed,
    interval,
    mean_iou,
    pixel_accuracy,
    pixel_counts,
    resampled_mean_iou,
)

IGNORE = 255
# two images of 2 x 3 pixels, three classes and a fourth that never occurs
MASK = torch.tensor([[[0, 0, 1], [1, 1, IGNORE]], [[2, 2, 2], [IGNORE, IGNORE, 0]]], dtype=torch.uint8)
PREDICTED = torch.tensor([[[0, 1, 1], [1, 3, 0]], [[2, 2, 0], [2, 3, 0]]])


def counts() -> np.ndarray:
    return pixel_counts(PREDICTED, MASK, 4, IGNORE).numpy()


def test_pixels_are_counted_by_image_and_class__by_hand():
    first = [[1, 2, 0, 0], [1, 3, 0, 1], [2, 3, 0, 0]]  # right, found, true
    second = [[1, 0, 2, 0], [2, 0, 2, 0], [1, 0, 3, 0]]
    assert counts().tolist() == [first, second]


def test_mean_iou_is_over_the_classes_that_occur__by_hand():
    # class 0: 2 of 3 + 3 - 2; class 1: 2 of 3 + 3 - 2; class 2: 2 of 2 + 3 - 2; class 3 does not occur
    assert mean_iou(counts()) == pytest.approx((2 / 4 + 2 / 4 + 2 / 3) / 3)
    assert class_iou(counts()) == [2 / 4, 2 / 4, 2 / 3, None]
    assert pixel_accuracy(counts()) == pytest.approx(6 / 9)


def test_it_is_that_of_the_confusion_matrix_over_pixels():
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 5, (7, 6, 6), generator=generator)
    predicted = torch.randint(0, 5, (7, 6, 6), generator=generator)
    matrix = np.zeros((5, 5))
    np.add.at(matrix, (mask.flatten().numpy(), predicted.flatten().numpy()), 1)
    diagonal = np.diag(matrix)
    wanted = (diagonal / (matrix.sum(0) + matrix.sum(1) - diagonal)).mean()
    found = pixel_counts(predicted, mask, 5, IGNORE).numpy()
    assert mean_iou(found) == pytest.approx(wanted) and pixel_accuracy(found) == diagonal.sum() / matrix.sum()


def test_a_class_whose_number_is_ignored_is_not_counted():
    assert pixel_counts(PREDICTED, MASK, 4, 0)[:, 2].tolist() == [[0, 3, 0, 0], [0, 0, 3, 0]]


def test_a_perfect_answer_is_one_and_the_most_common_class_is_the_guess():
    # classes 0, 1 and 2 have 3 pixels each: the first of them is guessed
    assert mean_iou(guessed(counts())) == pytest.approx(3 / 9 / 3)
    assert pixel_accuracy(guessed(counts())) == pytest.approx(3 / 9)
    perfect = pixel_counts(MASK, MASK, 256, IGNORE).numpy()
    assert mean_iou(perfect) == pixel_accuracy(perfect) == 1.0
    assert interval(resampled_mean_iou(perfect)) == (1.0, 1.0)


def test_guessing_is_what_counting_a_constant_gives():
    true = torch.where(MASK == 1, 2, MASK)
    guess = pixel_counts(torch.full_like(true, 2), true, 4, IGNORE).numpy()
    assert np.array_equal(guessed(pixel_counts(PREDICTED, true, 4, IGNORE).numpy()), guess)


def test_the_interval_holds_the_value_and_shrinks_with_more_images():
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 3, (400, 8, 8), generator=generator)
    is_wrong = torch.rand(400, 1, 1, generator=generator) * torch.rand(mask.shape, generator=generator) > 0.3
    found = pixel_counts(torch.where(is_wrong, (mask + 1) % 3, mask), mask, 3, IGNORE).numpy()
    wide, narrow = (interval(resampled_mean_iou(part, seed=1)) for part in (found[:25], found))
    assert narrow[0] < mean_iou(found) < narrow[1] and wide[0] < mean_iou(found[:25]) < wide[1]
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])
    assert interval(resampled_mean_iou(found, seed=1)) == narrow != interval(resampled_mean_iou(found, seed=2))


def test_two_answers_are_compared_on_the_same_drawn_images():
    once, twice = resampled_mean_iou(counts(), seed=1), resampled_mean_iou(2 * counts(), seed=1)
    np.testing.assert_allclose(once, twice)
    assert once.std() > 0.01


def test_masks_of_nothing_but_ignored_pixels_are_refused():
    nothing = pixel_counts(PREDICTED, torch.full_like(MASK, IGNORE), 4, IGNORE).numpy()
    for measure in (mean_iou, pixel_accuracy):
        with pytest.raises(ValueError, match="masks must show some class"):
            measure(nothing)
