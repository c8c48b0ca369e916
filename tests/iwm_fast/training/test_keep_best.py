"""`output.keep_best` saves the best step by an evaluation, keeps it, and finds it again after a stop."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

import iwm_fast
from fixtures.tiny_pretraining import tiny_run
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.config.run import OutputConfig, RunConfig
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.runtime import distributed
from iwm_fast.runtime.preemption import PreemptedError, Preemption
from iwm_fast.training.components import build_components
from iwm_fast.training.pretraining import PretrainTask
from iwm_fast.training.trainer import Trainer

ACCURACY = {2: 0.1, 4: 0.5, 6: math.nan, 8: 0.4, 10: 0.5, 12: 0.3}


class ScriptedEvaluation:
    """Returns the accuracies of the table in the order of its steps, and asks for a stop after one of them."""

    def __init__(self, steps: list[int], stop_after: int, preemption: Preemption, metric: str) -> None:
        self._steps, self._stop_after, self._preemption, self._metric = iter(steps), stop_after, preemption, metric

    def prepare(self) -> None:
        pass

    def __call__(self, _teacher, parameters) -> dict[str, float]:
        list(parameters)
        step = next(self._steps)
        if step == self._stop_after:
            self._preemption.reason = "the test"
        name, cost = f"eval/{self._metric}", {"eval/time_s": 0.0, "eval/time_share": 0.0}
        return {name: ACCURACY[step], f"{name}_untrained": 0.1, **cost}


@pytest.fixture
def config(tiny_shards, tmp_path) -> RunConfig:
    run = tiny_run(tiny_shards, tmp_path / "run", loader="torch")
    output = OutputConfig(folder=run.output.folder, log_every=2, evaluate_every=2, keep_last=1, keep_best="knn")
    return replace(run, resume="auto", output=output)


def train(config: RunConfig, steps: list[int], *, stop_after: int = 0) -> list[int]:
    """Train with scripted accuracies from these steps on, and return the steps of the checkpoints that are left."""
    rank_info, preemption = distributed.start("cpu"), Preemption()
    evaluation = ScriptedEvaluation(steps, stop_after, preemption, config.output.keep_best or "knn")
    try:
        task = PretrainTask(build_components(config, rank_info))
        trainer = Trainer(task, preemption=preemption, evaluators=[evaluation])
        if stop_after:
            with pytest.raises(PreemptedError):
                trainer.run()
        else:
            trainer.run()
    finally:
        distributed.stop()
    folders = checkpoints.list_checkpoint_folders(Path(config.output.folder))
    return [checkpoints.parse_step(folder) for folder in folders]


@pytest.mark.parametrize("stops", [False, True])
def test_the_best_step_is_kept_beside_the_newest_also_after_a_stop(config, stops):
    steps = list(ACCURACY)
    if stops:
        assert train(config, steps[:3], stop_after=6) == [4, 6]
        steps = steps[3:]
    assert train(config, steps) == [4, 12]
    assert iwm_fast.load(config.output.folder, checkpoint="best").step == 4
    assert [row["eval/best_step"] for row in read_metrics(Path(config.output.folder))] == [2, 4, 4, 4, 4, 4]


def test_another_metric_begins_anew_and_without_one_the_best_is_still_kept(config):
    assert train(config, list(ACCURACY)[:3], stop_after=6) == [4, 6]
    without = replace(config, output=replace(config.output, keep_best=None))
    assert train(without, list(ACCURACY)[3:4], stop_after=8) == [4, 8]
    other = replace(config, output=replace(config.output, keep_best="linear"))
    assert train(other, list(ACCURACY)[4:]) == [10, 12]


def test_without_a_best_checkpoint_a_request_for_it_is_refused(config):
    train(replace(config, output=replace(config.output, keep_best=None)), list(ACCURACY))
    with pytest.raises(FileNotFoundError, match=r"has no best checkpoint; train with output\.keep_best"):
        iwm_fast.load(config.output.folder, checkpoint="best")


def test_the_metric_needs_evaluations():
    with pytest.raises(ValueError, match=r"output\.keep_best must be unset without output\.evaluate_every.*got 'knn'"):
        OutputConfig(keep_best="knn")
    with pytest.raises(ValueError, match=r"output\.loggers must name each logger once"):
        OutputConfig(loggers=("wandb", "wandb"))
