"""The durations of the phases of a step."""

import time

import pytest
import torch

from iwm_fast.monitoring.step_timer import PHASES, StepTimer
from iwm_fast.training.log_window import PhaseTimes, time_metrics

CPU = torch.device("cpu")


def time_phases(*phases: tuple[str, float]) -> StepTimer:
    timer = StepTimer(CPU)
    for phase, seconds in phases:
        timer.begin(phase)
        time.sleep(seconds)
    timer.stop()
    return timer


def test_a_phase_lasts_until_the_next_and_may_occur_again():
    seconds = time_phases(("wait", 0.02), ("forward", 0.01), ("wait", 0.03), ("backward", 0.0)).seconds()
    assert list(seconds) == list(PHASES)
    assert 0.05 <= seconds["wait"] < 0.15 and 0.01 <= seconds["forward"] < 0.1 and seconds["teacher"] == 0


def test_a_window_has_the_mean_of_its_own_steps():
    times = PhaseTimes()
    for seconds in (0.0, 0.04):
        times.add(time_phases(("forward", seconds)))
    assert 0.02 <= times.pop_means()["forward"] < 0.06
    times.add(time_phases(("teacher", 0.01)))
    assert times.pop_means()["forward"] == 0.0


class LateTimer(StepTimer):
    """A timer that must not be read before the next step has ended, as on a GPU."""

    is_read = False

    @property
    def needs_sync(self) -> bool:
        return True

    def seconds(self) -> dict[str, float]:
        self.is_read = True
        return dict.fromkeys(PHASES, 1.0)


def test_a_gpus_step_is_read_one_step_late_and_counted_once():
    times, timers = PhaseTimes(), [LateTimer(CPU) for _ in range(4)]
    for timer in timers[:3]:
        times.add(timer)
    assert [timer.is_read for timer in timers] == [True, True, False, False]
    assert times.pop_means()["wait"] == 1.0 and not timers[2].is_read
    times.add(timers[3])
    assert timers[2].is_read and not timers[3].is_read
    assert times.pop_means()["wait"] == 1.0


def test_the_only_step_of_the_first_window_is_read_at_once():
    times = PhaseTimes()
    times.add(LateTimer(CPU))
    assert times.pop_means()["wait"] == 1.0


def test_the_slowest_rank_is_the_one_the_others_wait_for():
    # Rank 1 decodes slowly, and ranks 0 and 2 wait for it in the backward pass.
    ranks = {phase: torch.zeros(3, dtype=torch.float64) for phase in PHASES}
    ranks |= {
        "wait": torch.tensor([0.0, 0.3, 0.0], dtype=torch.float64),
        "forward": torch.tensor([0.2, 0.1, 0.2], dtype=torch.float64),
        "backward": torch.tensor([0.6, 0.4, 0.6], dtype=torch.float64),
    }
    values = time_metrics(ranks, step_s=1.0)
    assert (values["time/slowest_rank"], values["time/slowest_rank_s"]) == (1.0, pytest.approx(0.4))
    assert values["time/wait_s"] == pytest.approx(0.1) and values["time/other_s"] == pytest.approx(0.2)
    assert sum(values[f"time/{phase}_s"] for phase in (*PHASES, "other")) == pytest.approx(1.0)


@pytest.mark.gpu
def test_on_a_gpu_phases_are_timed_by_the_device():
    matrix = torch.randn(4096, 4096, device="cuda")
    for _ in range(2):
        timer = StepTimer(matrix.device)
        began = time.perf_counter()
        timer.begin("wait")
        time.sleep(0.02)
        timer.begin("forward")
        for _ in range(50):
            torch.mm(matrix, matrix)
        timer.begin("backward")
        timer.stop()
        assert timer.needs_sync and time.perf_counter() - began < 0.05, "the host does not wait for the device"
        torch.cuda.synchronize()
        took = time.perf_counter() - began
    seconds = timer.seconds()
    assert seconds["wait"] >= 0.019 and seconds["backward"] < 1e-3
    assert sum(seconds.values()) == pytest.approx(took, rel=0.1)
