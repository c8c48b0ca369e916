import pytest

from iwm_fast.config.run import OptimConfig
from iwm_fast.training.schedules import build_schedules, total_steps


def config(**changes):
    defaults = {
        "global_batch_size": 10,
        "epochs": 8.0,
        "warmup_epochs": 2.0,
        "lr_start": 0.1,
        "lr": 1.0,
        "lr_end": 0.01,
    }
    return OptimConfig(**(defaults | changes))


@pytest.mark.parametrize(
    ("epochs", "num_samples", "batch", "expected"),
    [(8.0, 100, 10, 80), (1.0, 101, 10, 11), (0.5, 7, 10, 1), (0.1, 300, 10, 3), (1.1, 100, 11, 10), (1e-5, 1, 1, 1)],
)
def test_steps_are_the_epochs_in_batches_rounded_up(epochs, num_samples, batch, expected):
    settings = config(epochs=epochs, warmup_epochs=0.0, global_batch_size=batch)
    assert total_steps(settings, num_samples) == expected


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        total_steps(config(), 0)


def test_learning_rate_at_its_corner_points():
    schedules = build_schedules(config(schedule_stretch=1.0), 100)
    assert (schedules.total_steps, schedules.warmup_steps) == (80, 20)
    corners = [schedules.lr(step) for step in (0, 10, 20, 50, 80, 1000)]
    assert corners == pytest.approx([0.1, 0.55, 1.0, 0.505, 0.01, 0.01])


def test_weight_decay_and_momentum_at_their_corner_points():
    settings = config(schedule_stretch=1.0, weight_decay=(0.04, 0.4), teacher_momentum=(0.9, 1.0))
    schedules = build_schedules(settings, 100)
    assert [schedules.weight_decay(step) for step in (0, 40, 80)] == pytest.approx([0.04, 0.22, 0.4])
    assert [schedules.teacher_momentum(step) for step in (0, 20, 40, 80, 99)] == pytest.approx([0.9, 0.925, 0.95, 1, 1])


def test_stretched_curves_end_after_the_run():
    schedules = build_schedules(config(schedule_stretch=1.25, teacher_momentum=(0.9, 1.0)), 100)
    assert schedules.teacher_momentum(80) == pytest.approx(0.98)
    assert schedules.lr(20) == pytest.approx(1.0)
    assert schedules.lr(60) == pytest.approx(0.505)
    assert schedules.lr(80) > 0.01 and schedules.lr(100) == pytest.approx(0.01)


def test_without_warm_up_the_first_step_has_the_peak():
    assert build_schedules(config(warmup_epochs=0.0), 100).lr(0) == 1.0
