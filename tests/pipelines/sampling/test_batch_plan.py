"""Requests of an evaluation cost as much as their own images, whatever the size of the data set."""

import tracemalloc

import numpy as np
import pytest

from iwm_fast.pipelines.sampling.batch_plan import EndOfPlanError, EvaluationPlan
from iwm_fast.pipelines.transforms.composition import ViewConfig


def plan_of(samples: np.ndarray) -> EvaluationPlan:
    views = ViewConfig(size=32)
    return EvaluationPlan(views=views, grid=4, samples=samples, micro_batch_size=8, leaves_out_bad_samples=True)


def test_a_request_takes_no_memory_for_the_rest_of_the_data_set():
    plan = plan_of(np.broadcast_to(np.int64(7), 10**7))
    plan.request(0)
    tracemalloc.start()
    try:
        assert plan.request(3).slots.tolist() == list(range(24, 32))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 10**6


def test_the_last_request_has_what_is_left():
    plan = plan_of(np.arange(100, 119))
    assert [plan.request(index).samples.tolist() for index in (1, 2)] == [list(range(108, 116)), [116, 117, 118]]
    with pytest.raises(EndOfPlanError):
        plan.request(3)


def test_bad_samples_are_replaced_by_those_that_follow_without_a_copy_of_the_data_set_for_each():
    plan = plan_of(np.arange(100, 119))
    request = plan.request(1)
    first, second = (plan.fallback_samples(request, image) for image in (0, 1))
    assert first.tolist() == [*range(109, 119), *range(100, 108)]
    assert second.tolist() == [*range(110, 119), *range(100, 109)]
    assert np.shares_memory(first, second)
