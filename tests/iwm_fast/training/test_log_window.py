"""Log rows of a run that was stopped or killed inside a log window equal those of an uninterrupted run."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.metric_rows import repeatable_rows
from fixtures.tar_files import TinyShards, encode, photograph, write_tar
from fixtures.tiny_finetuning import train_toy
from fixtures.tiny_pretraining import tiny_run
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.config.run import RunConfig
from iwm_fast.runtime import distributed
from iwm_fast.runtime.preemption import PreemptedError, Preemption
from iwm_fast.training.components import build_components
from iwm_fast.training.pretraining import PretrainTask
from iwm_fast.training.trainer import Trainer

# Rows are written after steps 4, 8 and 12, checkpoints after steps 5, 10 and 12.
BAD_STEPS = (3, 5, 6, 10)


def slow_case(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


class KilledError(Exception):
    """Stands for the death of the process."""


@pytest.fixture(scope="module")
def damaged_shards(tmp_path_factory) -> TinyShards:
    """Write 48 images, of which every twelfth is cut off, so that each log window has replaced samples."""
    folder = tmp_path_factory.mktemp("damaged")
    image = photograph("coffee.png")
    members = []
    for number in range(48):
        content = encode(image[number : number + 40, number : number + 40])
        members.append((f"{number:02}.jpg", content[: len(content) // 3] if number % 12 == 5 else content))
    write_tar(folder / "damaged.tar", members)
    return TinyShards(pattern=str(folder / "damaged.tar"), folder=folder)


def settings(shards: TinyShards, folder: Path, **output) -> RunConfig:
    config = tiny_run(shards, folder, loader="torch", max_bad_samples=40.0)
    return replace(config, resume="auto", output=replace(config.output, **output))


def train(config: RunConfig, *, stop_at: int | None = None, kill_at: int | None = None) -> None:
    """Train with steps that are not finite; stop or kill the run after a number of steps."""
    rank_info = distributed.start("cpu")
    try:
        task, preemption = PretrainTask(build_components(config, rank_info)), Preemption()
        step, distance = task.step, task._components.objective.distance

        def run_step(batches, schedules, state):
            if state.step == kill_at:
                raise KilledError
            factor = float("nan") if state.step + 1 in BAD_STEPS else 1.0
            task._components.objective.distance = lambda *tokens, **options: factor * distance(*tokens, **options)
            report = step(batches, schedules, state)
            preemption.reason = "SIGTERM" if state.step + 1 == stop_at else ""
            return report

        task.step = run_step
        Trainer(task, preemption=preemption).run()
    finally:
        distributed.stop()


@pytest.fixture(scope="module")
def straight(damaged_shards, tmp_path_factory) -> list[dict]:
    """Return the rows of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(settings(damaged_shards, folder))
    rows = repeatable_rows(folder)
    assert [row["optim/skipped_steps"] for row in rows] == [1, 2, 1]
    assert all(row["data/replaced_samples"] > 0 for row in rows)
    return rows


@pytest.mark.parametrize("steps", [(6,), (7,), (5, 6, 7), *(slow_case(steps) for steps in [(4,), (1, 11)])])
def test_a_stopped_run_logs_what_an_uninterrupted_one_logs(damaged_shards, tmp_path, straight, steps):
    config = settings(damaged_shards, tmp_path / "run")
    for step in steps:
        with pytest.raises(PreemptedError):
            train(config, stop_at=step)
    train(config)
    assert repeatable_rows(tmp_path / "run") == straight


@pytest.mark.parametrize(
    ("checkpoint_every", "steps"), [(5, (7,)), (3, (8, 11)), slow_case(5, (9, 9)), slow_case(1, (6,))]
)
def test_a_killed_run_logs_what_an_uninterrupted_one_logs(damaged_shards, tmp_path, straight, checkpoint_every, steps):
    config = settings(damaged_shards, tmp_path / "run", checkpoint_every=checkpoint_every)
    for step in steps:
        with pytest.raises(KilledError):
            train(config, kill_at=step)
    train(config)
    assert repeatable_rows(tmp_path / "run") == straight


def test_another_log_interval_keeps_the_steps_since_the_last_row(damaged_shards, tmp_path):
    with pytest.raises(PreemptedError):
        train(settings(damaged_shards, tmp_path / "run"), stop_at=7)
    train(settings(damaged_shards, tmp_path / "run", log_every=5))
    rows = repeatable_rows(tmp_path / "run")
    # The second row covers steps 5 to 10.
    assert [(row["step"], row["optim/skipped_steps"]) for row in rows] == [(4, 1), (10, 3), (12, 0)]


def test_a_checkpoint_without_these_sums_is_resumed(damaged_shards, tmp_path):
    """Earlier versions wrote no sums."""
    config = settings(damaged_shards, tmp_path / "run")
    train(config)
    saved = checkpoints.read(checkpoints.checkpoint_folder(tmp_path / "run", 5))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    counters = {name: saved.counters[name] for name in ("stream", "num_samples")}
    checkpoints.write(replace(saved, counters=counters), config)
    train(config)
    assert [row["optim/skipped_steps"] for row in repeatable_rows(tmp_path / "run")] == [1, 1, 1]


def test_a_stopped_job_logs_what_an_uninterrupted_one_logs(tiny_shards, tmp_path):
    """Rows are written after steps 3, 6 and 9; the checkpoint is that of step 4."""
    rank_info = distributed.start("cpu")
    try:
        train_toy(rank_info, tiny_shards, tmp_path / "straight")
        stopped = tmp_path / "stopped"
        train_toy(rank_info, tiny_shards, stopped)
        for folder in checkpoints.list_checkpoint_folders(stopped / "toy")[1:]:
            shutil.rmtree(folder)
        newest = checkpoints.find_newest_folder(stopped / "toy")
        assert newest is not None and checkpoints.parse_step(newest) % 3
        train_toy(rank_info, tiny_shards, stopped)
        assert repeatable_rows(stopped / "toy") == repeatable_rows(tmp_path / "straight" / "toy")
    finally:
        distributed.stop()
