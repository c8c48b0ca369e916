"""Evaluation between two steps: the numbers of the commands, and nothing of training is touched."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures.launchers import CHILD
from fixtures.paths import WORKERS
from fixtures.tar_files import TinyShards, encode, photograph, write_tar
from fixtures.tiny_pretraining import tiny_run
from iwm_fast.config.evaluation import EvalData, KnnConfig, MrrConfig
from iwm_fast.config.run import RunConfig
from iwm_fast.evals.online import OnlineEvaluation
from iwm_fast.evals.probing.knn import evaluate_knn
from iwm_fast.evals.retrieval.mrr import evaluate_mrr
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.runtime import distributed
from iwm_fast.train import run
from iwm_fast.training.components import TrainingComponents, build_components
from iwm_fast.training.loaders import training_loader
from iwm_fast.training.schedules import build_schedules
from iwm_fast.training.step import train_step

WORKER = WORKERS / "ranks_online.py"


@pytest.fixture
def rank_info():
    yield distributed.start("cpu")
    distributed.stop()


def measured(shards: TinyShards, folder: Path, val: str, **runtime) -> RunConfig:
    config = tiny_run(shards, folder, **runtime)
    config = replace(config, output=replace(config.output, evaluate_every=4))
    return replace(config, data=replace(config.data, val=val))


def with_labels(path: Path, labels: list[int | None], *, bad: bool = False) -> str:
    members = []
    for number, label in enumerate(labels):
        image = encode(photograph("coffee.png")[number : number + 40, number : number + 40])
        members.append((f"{number}.jpg", image[: len(image) // 2] if bad and number == 1 else image))
        members += [] if label is None else [(f"{number}.cls", str(label).encode())]
    write_tar(path, members)
    return str(path)


def test_a_run_writes_the_numbers_that_the_commands_give(tiny_shards, tmp_path):
    val = with_labels(tmp_path / "val.tar", [0, 1, 2, 0, 1, 2])
    run(measured(tiny_shards, tmp_path / "run", val))
    first, second, last = read_metrics(tmp_path / "run")
    data = EvalData(val=val)
    mrr = evaluate_mrr(
        MrrConfig(run=str(tmp_path / "run"), num_images=64, bank_size=64, bank="run", families=("jitter",), data=data)
    ).row("jitter", "mrr")
    knn = evaluate_knn(KnnConfig(run=str(tmp_path / "run"), max_train_samples=2000, data=data))
    assert last["eval/mrr"] == mrr.value and last["eval/mrr_chance"] == mrr.chance
    named = knn.row("encoder", "accuracy")
    assert last["eval/knn"] == named.value and last["eval/knn_chance"] == named.chance
    assert last["eval/knn_untrained"] == named.control
    # of the weights of the moment
    assert len({row["eval/mrr"] for row in (first, second, last)} | {last["eval/mrr_untrained"]}) == 4


def steps(trainer: TrainingComponents, evaluation: OnlineEvaluation | None) -> list[float]:
    schedules = build_schedules(trainer.config.optim, trainer.shards.num_samples)
    loader = training_loader(trainer.config, trainer.shards, trainer.rank_info)
    losses = []
    for step in range(4):
        report = train_step(
            trainer.engine, trainer.teacher, trainer.objective, loader, schedules, applied_steps=step, accumulation=1
        )
        losses.append(float(report.loss))
        if evaluation:
            evaluation(trainer.teacher.state_dict(), trainer.engine.named_parameters("predictor."))
    loader.close()
    return losses


def random_states() -> list[bytes]:
    # Python's own generator moves under these tests, which check argument types of some elements drawn with it
    return [torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes()]


def test_training_goes_on_bit_for_bit_as_if_nothing_had_been_measured(rank_info, tiny_shards, tmp_path):
    config = measured(tiny_shards, tmp_path / "run", with_labels(tmp_path / "val.tar", [0, 1]))
    plain, watched = build_components(config, rank_info), build_components(config, rank_info)
    states = random_states()
    evaluation = OnlineEvaluation(config, watched.shards, rank_info)
    evaluation.prepare()
    losses = steps(watched, evaluation)
    assert random_states() == states
    assert losses == steps(plain, None)
    for one, other in (
        (watched.engine.state(), plain.engine.state()),
        (watched.teacher.state_dict(), plain.teacher.state_dict()),
    ):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert all(parameter.grad is None for parameter in watched.teacher.encoder.parameters())


def test_what_is_wrong_is_found_before_the_first_step(rank_info, tiny_shards, tmp_path):
    trainer = build_components(tiny_run(tiny_shards, tmp_path / "run"), rank_info)

    def prepare(val: str) -> None:
        OnlineEvaluation(measured(tiny_shards, tmp_path / "run", val), trainer.shards, rank_info).prepare()

    with pytest.raises(ValueError, match=r"data\.val must name validation shards where output\.evaluate_every is set"):
        prepare("")
    with pytest.raises(FileNotFoundError, match="absent"):
        prepare(str(tmp_path / "absent.tar"))
    with pytest.raises(ShardError, match="sample '1': cannot decode the image"):
        prepare(with_labels(tmp_path / "bad.tar", [0, 1, 2], bad=True))
    with pytest.raises(ShardError, match="cls is integer 7, which is not one of the classes"):
        prepare(with_labels(tmp_path / "strange.tar", [0, 7]))


def test_without_labels_the_world_model_alone_is_measured_and_one_line_says_so(
    rank_info, tiny_shards, tmp_path, caplog
):
    val = with_labels(tmp_path / "val.tar", [0, None, None])
    config = measured(tiny_shards, tmp_path / "run", val)
    trainer = build_components(config, rank_info)
    with caplog.at_level("INFO"):
        evaluation = OnlineEvaluation(config, trainer.shards, rank_info)
        evaluation.prepare()
        row = evaluation(trainer.teacher.state_dict(), trainer.engine.named_parameters("predictor."))
    assert set(row) == {"eval/mrr", "eval/mrr_untrained", "eval/mrr_chance", "eval/time_s"}
    assert caplog.text.count("without k-NN: 2 of 3 samples of data.val have no .cls") == 1


def test_without_a_world_model_the_encoder_alone_is_measured(rank_info, tiny_shards, tmp_path):
    config = measured(tiny_shards, tmp_path / "run", with_labels(tmp_path / "val.tar", [0, 1]), depth=0)
    trainer = build_components(config, rank_info)
    evaluation = OnlineEvaluation(config, trainer.shards, rank_info)
    evaluation.prepare()
    row = evaluation(trainer.teacher.state_dict(), trainer.engine.named_parameters("predictor."))
    assert set(row) == {"eval/knn", "eval/knn_untrained", "eval/knn_chance", "eval/time_s"}


@pytest.mark.multi_rank
def test_two_ranks_measure_the_same_and_end_together_when_an_image_cannot_be_read(tiny_shards, tmp_path):
    val = with_labels(tmp_path / "val.tar", [0, 1, 2, 0])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    pipes: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = []
    for rank in "01":
        rank_info = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        command = [sys.executable, str(WORKER), str(tmp_path), tiny_shards.pattern, val]
        ranks.append(subprocess.Popen(command, env=os.environ | CHILD | rank_info, **pipes))
    printed = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], printed
    (first, error), (second, silence) = printed
    assert "eval/mrr" in first and first == second
    assert error.count("error (rank 0)") == 1 and "val.tar" in error and "Traceback" not in error + silence
    assert "error" not in silence
