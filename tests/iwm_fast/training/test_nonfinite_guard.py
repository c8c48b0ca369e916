"""A non-finite step changes nothing and is recorded, and several in a row end the run."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fixtures.tiny_pretraining import tiny_run
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.runtime import distributed
from iwm_fast.runtime.preemption import PreemptedError, Preemption
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


NAN = float("nan")


def poison_view(name):
    def poison(task, is_bad):
        open_stream = task.open_stream

        def spoil(batch):
            if is_bad():
                getattr(batch, name)[0, ..., -1] = NAN
            return batch

        task.open_stream = lambda state: map(spoil, open_stream(state))

    return poison


def poison_output(owner, method, change):
    """Return a function that replaces, in bad steps, what a method of a component returns."""

    def poison(task, is_bad):
        component = getattr(task._components, owner)
        original = getattr(component, method)

        def spoil(*arguments, **options):
            value = original(*arguments, **options)
            return change(value) if is_bad() else value

        setattr(component, method, spoil)

    return poison


def with_bad_gradient(prediction):
    """Return the prediction, whose values are finite, with a gradient that is not."""
    prediction.predicted_tokens.register_hook(lambda gradient: gradient * NAN)
    return prediction


PLACES = {
    "pixels of the source": poison_view("source_view"),
    "pixels of the target": poison_view("target_view"),
    "action": poison_view("action"),
    "student tokens": poison_output(
        "engine", "forward", lambda value: value._replace(predicted_tokens=value.predicted_tokens * NAN)
    ),
    "infinite student tokens": poison_output(
        "engine", "forward", lambda value: value._replace(predicted_tokens=value.predicted_tokens + math.inf)
    ),
    "teacher tokens": poison_output("teacher", "encode", lambda tokens: tokens * NAN),
    "one teacher token": poison_output("teacher", "encode", lambda tokens: tokens.index_fill(0, torch.tensor(1), NAN)),
    "loss": poison_output("objective", "distance", lambda loss: loss * NAN),
    "gradient": poison_output("engine", "forward", with_bad_gradient),
}


def read_strictly(path: Path) -> list[dict]:
    """Return the rows of a file that a strict JSON reader accepts."""

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


_SLOW = ("pixels of the source", "action", "infinite student tokens", "one teacher token")


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=[pytest.mark.slow] if place in _SLOW else []) for place in PLACES]
)
def test_what_is_not_finite_skips_the_step_whether_it_is_logged_or_not(rank_info, tiny_shards, tmp_path, place):
    config = tiny_run(tiny_shards, tmp_path / "run", loader="torch")
    config = replace(config, output=replace(config.output, log_every=2))
    task = PretrainTask(build_components(config, rank_info))
    steps, step = [], task.step
    # Two of the steps are bad, the sixth and the ninth, of which the sixth is logged.
    PLACES[place](task, lambda: len(steps) in (6, 9))
    task.step = lambda *arguments: steps.append(1) or step(*arguments)
    state = Trainer(task).run()
    assert (state.step, state.applied_steps) == (12, 10)
    rows = read_strictly(tmp_path / "run" / "metrics.jsonl")
    assert [row["optim/skipped_steps"] for row in rows] == [0, 0, 1, 0, 1, 0]
    # Losses are means over applied steps.
    assert all(row["loss/prediction"] > 0 for row in rows)
    records = read_strictly(tmp_path / "run" / "skipped_steps.jsonl")
    assert [record["step"] for record in records] == [6, 9]
    assert all(len(record["suspects"][0]["samples"]) == 16 for record in records)
    assert all(value.isfinite().all() for value in saved_at(tmp_path / "run", 12).engine_state.values())


def test_a_teacher_that_is_not_finite_ends_the_run_with_the_last_good_state(rank_info, tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path / "run", max_skipped_steps=4)
    task = PretrainTask(build_components(config, rank_info))
    step = task.step

    def poison_teacher(batches, schedules, state):
        if state.step == 6:
            next(iter(task.teacher_state().values())).fill_(NAN)
        return step(batches, schedules, state)

    task.step = poison_teacher
    message = (
        r"4 steps in a row .*the weights of step 10 have diverged and were not saved: .* newest checkpoint is step 5"
    )
    with pytest.raises(FloatingPointError, match=message):
        Trainer(task).run()
    assert [path.name for path in checkpoints.list_checkpoint_folders(tmp_path / "run")] == ["step-00000005"]
    assert "have diverged" in read_status(tmp_path / "run")["reason"]
    state = Trainer(PretrainTask(build_components(replace(config, resume="auto"), rank_info))).run()
    assert (state.step, state.applied_steps) == (12, 12)


@pytest.mark.parametrize("name", ["weight/encoder.norm.bias", "teacher/norm.bias"])
def test_a_checkpoint_whose_weights_have_diverged_is_refused(rank_info, tiny_shards, tmp_path, name):
    config = replace(tiny_run(tiny_shards, tmp_path / "run"), resume="auto")
    run_with(rank_info, config, bad_calls=[])
    saved = saved_at(tmp_path / "run", 12)
    tensors = saved.engine_state | {f"teacher/{key}": value for key, value in saved.teacher_state.items()}
    tensors[name].fill_(NAN)
    for folder in (saved_at(tmp_path / "run", 10).folder, saved.folder):
        shutil.rmtree(folder)
    checkpoints.write(replace(saved, folder=saved.folder.with_name("step-00000011"), step=11), config)
    with pytest.raises(CheckpointError, match=r"step-00000011 holds weights that have diverged: .* move this folder"):
        run_with(rank_info, config, bad_calls=[])
    # As the message says.
    shutil.move(tmp_path / "run/checkpoints/step-00000011", tmp_path / "away")
    assert run_with(rank_info, config, bad_calls=[]).step == 12


def test_a_start_without_a_finite_step_saves_nothing_and_names_its_checkpoint(rank_info, tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path / "run", max_skipped_steps=3)
    with pytest.raises(FloatingPointError, match="the state before them is saved as step 10"):
        run_with(rank_info, replace(config, resume="auto"), bad_calls=range(7, 99))
    longer = replace(config, resume="adjust", optim=replace(config.optim, epochs=8.0))
    message = (
        r"3 steps in a row .*no step has been finite since the checkpoint of step 10, .*move \S+step-00000010 away"
    )
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=message):
            run_with(rank_info, longer, bad_calls=range(99))
    assert [checkpoints.parse_step(path) for path in checkpoints.list_checkpoint_folders(tmp_path / "run")] == [5, 10]
    # The steps were repeated, so they are listed once.
    assert [row["step"] for row in read_strictly(tmp_path / "run/skipped_steps.jsonl")] == [8, 9, 10, 11, 12, 13]


def test_the_number_of_consecutive_skipped_steps_survives_a_stop(rank_info, tiny_shards, tmp_path):
    config = replace(tiny_run(tiny_shards, tmp_path / "run", max_skipped_steps=6), resume="auto")
    preemption = Preemption()
    objective = NonfiniteObjective(config, range(4, 99))
    task = PretrainTask(replace(build_components(config, rank_info), objective=objective))
    step = task.step

    def stop_after_seven(batches, schedules, state):
        preemption.reason = "SIGTERM" if state.step == 6 else ""
        return step(batches, schedules, state)

    task.step = stop_after_seven
    with pytest.raises(PreemptedError):
        Trainer(task, preemption=preemption).run()
    with pytest.raises(FloatingPointError, match=r"6 steps in a row were not finite, the last one step 10"):
        run_with(rank_info, config, bad_calls=range(99))
    rows = read_strictly(tmp_path / "run/skipped_steps.jsonl")
    assert [(row["step"], row["in_a_row"]) for row in rows] == [(step, step - 4) for step in range(5, 11)]
