import math

import pytest
import torch

from iwm_fast.config.run import ObjectiveConfig
from iwm_fast.models.student import Prediction
from iwm_fast.monitoring.collapse import collapse_monitors, collapse_warnings
from iwm_fast.training.objective import Objective, vicreg_terms

LENGTHS = [3, 1, 4, 2, 5, 3, 2, 4]


def draw(rows, dim=16, seed=0):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def index_of(ragged, lengths=LENGTHS, total=None):
    return ragged([range(length) for length in lengths], total)


def evaluate(objective, tokens, target, index):
    """Return the loss if encoder and predictor give the same tokens, as with the identity predictor."""
    return objective(Prediction(tokens, tokens, index), target, index)


@pytest.mark.parametrize(("distance", "expected"), [("mse", (1 + 4 + 9 + 0.25) / 6), ("smooth_l1", 4.625 / 6)])
def test_distance_equals_a_hand_computation(ragged, distance, expected):
    # The errors are 1, 2, 3 and 0.5 in two rows of two. Means over D are summed over rows and divided by 3 patches.
    # Smooth L1: 0.5 + 1.5 + 2.5 + 0.125.
    predicted = torch.tensor([[1.0, 2.0], [3.0, 0.5]])
    objective = Objective(ObjectiveConfig(distance=distance), is_identity=False)
    actual = evaluate(objective, predicted, torch.zeros(2, 2), index_of(ragged, [1, 1], total=3))
    assert actual.item() == pytest.approx(expected)


@pytest.mark.parametrize("distance", ["mse", "smooth_l1"])
def test_summed_micro_batches_equal_the_full_batch(ragged, distance):
    objective = Objective(ObjectiveConfig(distance=distance), is_identity=False)
    predicted, target, rows = draw(24), draw(24, seed=1), sum(LENGTHS)
    full_loss = evaluate(objective, predicted, target, index_of(ragged))
    losses = []
    for lengths, micro in ((LENGTHS[:3], slice(0, 8)), (LENGTHS[3:], slice(8, 24))):
        losses.append(evaluate(objective, predicted[micro], target[micro], index_of(ragged, lengths, total=rows)))
    torch.testing.assert_close(sum(losses), full_loss)


def test_vicreg_terms_equal_a_hand_computation():
    # Two equal dimensions with sample variance and covariance 4/3, and a constant one.
    tokens = torch.tensor([[1.0, 1.0, 5.0], [-1.0, -1.0, 5.0], [1.0, 1.0, 5.0], [-1.0, -1.0, 5.0]])
    variance, covariance = vicreg_terms(tokens)
    assert variance.item() == pytest.approx((1 - math.sqrt(1e-4)) / 3)
    assert covariance.item() == pytest.approx(2 * (4 / 3) ** 2 / 3)


def test_vicreg_terms_are_on_for_the_identity_predictor_and_off_elsewhere(ragged):
    tokens, index = torch.zeros(24, 16), index_of(ragged)

    def loss(config, is_identity):
        return evaluate(Objective(config, is_identity), tokens, tokens, index).item()

    assert loss(ObjectiveConfig(), is_identity=False) == 0
    assert loss(ObjectiveConfig(), is_identity=True) == pytest.approx(0.99)
    assert loss(ObjectiveConfig(variance_weight=0.5), is_identity=False) == pytest.approx(0.495)
    assert loss(ObjectiveConfig(variance_weight=0.0, covariance_weight=0.0), is_identity=True) == 0


def test_equal_micro_batches_do_not_multiply_the_vicreg_terms(ragged):
    tokens = draw(24)
    objective = Objective(ObjectiveConfig(), is_identity=True)
    once = evaluate(objective, tokens, tokens, index_of(ragged))
    thrice = [evaluate(objective, tokens, tokens, index_of(ragged, total=72)) for _ in range(3)]
    torch.testing.assert_close(sum(thrice), once)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_micro_batch_of_0_or_1_patches_has_a_finite_loss_and_gradient(ragged, rows):
    tokens = draw(rows).requires_grad_()
    objective = Objective(ObjectiveConfig(), is_identity=True)
    loss = evaluate(objective, tokens, torch.zeros(rows, 16), index_of(ragged, [rows], total=9))
    loss.backward()
    assert loss.isfinite() and tokens.grad.isfinite().all()


def warned_monitors(predicted, target, index):
    values = {name: value.item() for name, value in collapse_monitors(predicted, target, index).items()}
    return {sentence.split()[0] for sentence in collapse_warnings(values)}


def test_constant_tokens_raise_every_warning(ragged):
    target = draw(1).expand(24, 16) + 1e-3 * draw(24, seed=1)
    names = {f"monitor/{name}" for name in ("target_std", "cosine", "rank_me", "loss_over_mean")}
    assert warned_monitors(draw(24, seed=2), target, index_of(ragged)) == names


def test_exactly_constant_tokens_warn_and_stay_finite(ragged):
    target = draw(1).expand(24, 16)
    monitors = collapse_monitors(target, target, index_of(ragged))
    assert all(value.isfinite() for value in monitors.values())
    assert {"monitor/target_std", "monitor/cosine", "monitor/rank_me"} <= warned_monitors(
        target, target, index_of(ragged)
    )


def test_tokens_that_depend_only_on_position_warn_of_similar_images(ragged):
    position = draw(4)
    assert warned_monitors(draw(32, seed=1) * 0, position.repeat(8, 1), index_of(ragged, [4] * 8)) >= {"monitor/cosine"}


def test_random_tokens_raise_no_warning(ragged):
    target = draw(24)
    assert warned_monitors(target + 0.1 * draw(24, seed=1), target, index_of(ragged)) == set()


def test_monitors_equal_a_hand_computation(ragged):
    # Eight images of one token, four along each of two axes.
    target = torch.eye(2).repeat_interleave(4, dim=0)
    predicted = target.mean(0).expand(8, 2)
    actual = collapse_monitors(predicted, target, index_of(ragged, [1] * 8))
    expected = {"target_std": 0.5, "loss_over_mean": 1.0, "cosine": 3 / 7, "rank_me": 2.0}
    assert {name: value.item() for name, value in actual.items()} == pytest.approx(
        {f"monitor/{name}": value for name, value in expected.items()}
    )


def test_pooling_is_by_image(ragged):
    # All images have the same mean, although their tokens differ.
    target = torch.tensor([[2.0, 0.0], [0.0, 2.0]]).repeat(8, 1)
    actual = collapse_monitors(target, target, index_of(ragged, [2] * 8))
    assert actual["monitor/cosine"].item() == pytest.approx(1.0)
    assert actual["monitor/rank_me"].item() == pytest.approx(1.0, abs=1e-3)


def test_statistics_between_images_are_left_out_for_few_images(ragged):
    index = index_of(ragged, [12, 12])
    assert collapse_monitors(draw(24), draw(24), index).keys() == {"monitor/target_std", "monitor/loss_over_mean"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [slice(None), slice(5, 6)])
@pytest.mark.parametrize("place", ["predicted", "target", "both"])
def test_monitors_of_tokens_that_are_not_finite_are_nan_and_warn_of_nothing(ragged, value, rows, place):
    predicted, target = draw(24), draw(24, seed=1)
    if place != "target":
        predicted[rows] = value
    if place != "predicted":
        target[rows] = value
    monitors = collapse_monitors(predicted, target, index_of(ragged))
    assert not monitors["monitor/loss_over_mean"].isfinite()
    if place != "predicted":
        assert all(monitor.isnan() for monitor in monitors.values())
        assert collapse_warnings({name: monitor.item() for name, monitor in monitors.items()}) == []
