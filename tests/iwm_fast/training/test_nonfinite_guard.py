"""A non-finite step changes nothing and is recorded, and several in a row end the run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fixtures.tiny_pretraining import tiny_run
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.runtime import distributed
from iwm_fast.runtime.run_status import read_status
from iwm_fast.training.components import build_components
from iwm_fast.training.objective import Objective
from iwm_fast.training.pretraining import PretrainTask
from iwm_fast.training.trainer import Trainer

ENGINES = [("plain", None), *(("deepspeed", stage) for stage in range(4))]


class NonfiniteObjective(Objective):
    """An objective that returns NaN in some calls, counted from 0."""

    def __init__(self, config, bad_calls):
        super().__init__(config.objective, is_identity=False)
        self.bad_calls = bad_calls
        self.calls = 0

    def __call__(self, *arguments):
        is_bad = self.calls in self.bad_calls
        self.calls += 1
        return super().__call__(*arguments) * (float("nan") if is_bad else 1.0)


@pytest.fixture
def rank_info():
    yield distributed.start("cpu")
    distributed.stop()


def run_with(rank_info, config, bad_calls):
    components = build_components(config, rank_info)
    return Trainer(PretrainTask(replace(components, objective=NonfiniteObjective(config, bad_calls)))).run()


def saved_at(folder: Path, step: int):
    return checkpoints.read(folder / "checkpoints" / f"step-{step:08d}")


@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_a_bad_step_changes_neither_weights_nor_teacher_nor_schedules(rank_info, tiny_shards, tmp_path, engine, stage):
    config = tiny_run(tiny_shards, tmp_path / "run", engine=engine, zero_stage=stage)
    config = replace(config, output=replace(config.output, checkpoint_every=1, log_every=1, keep_last=12))
    run_with(rank_info, config, bad_calls=range(5, 6))
    before, after = saved_at(tmp_path / "run", 5), saved_at(tmp_path / "run", 6)
    assert (after.step, after.applied_steps) == (6, 5)
    assert all(torch.equal(value, after.engine_state[name]) for name, value in before.engine_state.items())
    assert all(torch.equal(value, after.teacher_state[name]) for name, value in before.teacher_state.items())
    rows = read_metrics(tmp_path / "run")
    assert [row["optim/skipped_steps"] for row in rows] == [0.0] * 5 + [1.0] + [0.0] * 6
    # The next step has the learning rate that the skipped step would have had.
    assert rows[6]["optim/lr"] < rows[5]["optim/lr"] == rows[4]["optim/lr"]
    (record,) = [json.loads(line) for line in (tmp_path / "run" / "skipped_steps.jsonl").read_text().splitlines()]
    assert record["step"] == 6 and len(record["suspects"][0]["samples"]) == 16


def test_only_the_nonfinite_micro_batch_is_suspected(rank_info, tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path / "run", micro_batch_size=4)
    # With 4 micro-batches per step, call 6 is the third micro-batch of the second step.
    run_with(rank_info, config, bad_calls=[6])
    (line,) = (tmp_path / "run" / "skipped_steps.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["step"] == 2 and [len(row["samples"]) for row in record["suspects"]] == [4]


def test_too_many_skipped_steps_end_the_run_and_save_the_last_good_state(rank_info, tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path / "run", max_skipped_steps=3)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row .* step 10; .*samples by rank: 0: \S+"):
        run_with(rank_info, config, bad_calls=range(7, 99))
    status = read_status(tmp_path / "run")
    assert status["state"] == "failed" and "FloatingPointError" in status["reason"]
    saved = saved_at(tmp_path / "run", 10)
    assert saved.applied_steps == 7
    assert all(value.isfinite().all() for value in saved.engine_state.values())
    state = run_with(rank_info, replace(config, resume="auto"), bad_calls=[])
    assert (state.step, state.applied_steps) == (12, 9)


def test_single_bad_steps_far_apart_do_not_end_it(rank_info, tiny_shards, tmp_path):
    state = run_with(rank_info, tiny_run(tiny_shards, tmp_path / "run", max_skipped_steps=2), bad_calls=[2, 5, 8])
    assert (state.step, state.applied_steps) == (12, 9)
