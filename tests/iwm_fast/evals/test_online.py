"""Evaluation during training: it gives the metrics of the commands and does not affect training."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures.launchers import CHILD_ENVIRONMENT, free_port
from fixtures.paths import WORKERS
from fixtures.tar_files import TinyShards, encode, photograph, write_tar
from fixtures.tiny_pretraining import tiny_run
from iwm_fast import world_model
from iwm_fast.commands.report_run import write_run_report
from iwm_fast.config.evaluation import EvalDataConfig, KnnConfig, LinearConfig, MrrConfig
from iwm_fast.config.run import Metric, RunConfig
from iwm_fast.evals import online, online_probes
from iwm_fast.evals.datasets import label_sets
from iwm_fast.evals.online import OnlineEvaluation
from iwm_fast.evals.online_probes import encode_changed_views, encode_images
from iwm_fast.evals.probing.knn import evaluate_knn
from iwm_fast.evals.probing.linear import LinearGrid
from iwm_fast.evals.retrieval.mrr import evaluate_mrr, mean_reciprocal_rank, rank_images
from iwm_fast.monitoring.effective_rank import lidar
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.transforms.operations.gamma import Gamma
from iwm_fast.pipelines.transforms.operations.jitter import Jitter
from iwm_fast.runtime import distributed
from iwm_fast.train import run
from iwm_fast.training import loaders
from iwm_fast.training.components import TrainingComponents, build_components
from iwm_fast.training.loaders import training_loader
from iwm_fast.training.schedules import build_schedules
from iwm_fast.training.step import train_step
from iwm_fast.world_model import WorldModel

WORKER = WORKERS / "ranks_online.py"


@pytest.fixture
def rank_info():
    yield distributed.start("cpu")
    distributed.stop()


def online_run(shards: TinyShards, folder: Path, val: str, **runtime) -> RunConfig:
    """Return the settings of a tiny run that is evaluated every 4 steps."""
    config = tiny_run(shards, folder, **runtime)
    config = replace(config, output=replace(config.output, evaluate_every=4))
    return replace(config, data=replace(config.data, val=val))


def names(row: dict[str, float]) -> set[str]:
    """Return the names of measured metrics, which have an untrained control."""
    return {name.removeprefix("eval/") for name in row if f"{name}_untrained" in row}


def write_labelled(path: Path, labels: list[int | None], *, bad: bool = False) -> str:
    """Write a shard of images with these labels, None for no label; with `bad`, the second image is truncated."""
    members = []
    for number, label in enumerate(labels):
        image = encode(photograph("coffee.png")[number : number + 40, number : number + 40])
        members.append((f"{number}.jpg", image[: len(image) // 2] if bad and number == 1 else image))
        members += [] if label is None else [(f"{number}.cls", str(label).encode())]
    write_tar(path, members)
    return str(path)


@pytest.fixture
def small_evaluation(tmp_path, monkeypatch) -> str:
    """Make evaluations small, and return a validation shard of two images."""
    monkeypatch.setattr(online, "_MRR", replace(online._MRR, bank_size=4))
    monkeypatch.setattr(online, "KNN", replace(online.KNN, max_train_samples=12))
    monkeypatch.setattr(online, "_LIDAR_IMAGES", 2)
    return write_labelled(tmp_path / "val.tar", [0, 1])


@pytest.mark.slow
def test_a_run_logs_the_metrics_that_the_commands_measure(tiny_shards, tmp_path):
    val = write_labelled(tmp_path / "val.tar", [0, 1, 2, 0, 1, 2])
    run(online_run(tiny_shards, tmp_path / "run", val))
    first, second, last = read_metrics(tmp_path / "run")
    data = EvalDataConfig(val=val)
    mrr = evaluate_mrr(
        MrrConfig(run=str(tmp_path / "run"), num_images=64, bank_size=64, bank="run", families=("jitter",), data=data)
    ).row("jitter", "mrr")
    knn = evaluate_knn(KnnConfig(run=str(tmp_path / "run"), max_train_samples=2000, data=data))
    assert last["eval/mrr"] == mrr.value and last["eval/mrr_chance"] == mrr.chance
    accuracy = knn.row("encoder", "accuracy")
    assert last["eval/knn"] == accuracy.value and last["eval/knn_chance"] == accuracy.chance
    assert last["eval/knn_untrained"] == accuracy.control
    assert names(last) == {"mrr", "knn", "linear", "attentive", "rank_me", "lidar"}
    assert all(0 <= last[f"eval/{name}"] <= 1 for name in ("linear", "attentive"))
    assert 0 < last["eval/time_share"] < 1 and last["eval/rank_me"] >= 1
    # The weights differ between the evaluations.
    assert len({row["eval/mrr"] for row in (first, second, last)} | {last["eval/mrr_untrained"]}) == 4


def train(trainer: TrainingComponents, evaluation: OnlineEvaluation | None) -> list[float]:
    """Train for 4 steps with an evaluation after each step, and return the losses."""
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
    # Without the state of Python's `random`, which the type checker of the tests uses to choose elements to check.
    return [torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes()]


def test_evaluation_does_not_change_training_by_a_bit(rank_info, tiny_shards, tmp_path, small_evaluation):
    config = online_run(tiny_shards, tmp_path / "run", small_evaluation)
    plain, evaluated = build_components(config, rank_info), build_components(config, rank_info)
    states = random_states()
    evaluation = OnlineEvaluation(config, evaluated.shards, rank_info)
    evaluation.prepare()
    losses = train(evaluated, evaluation)
    assert random_states() == states
    assert losses == train(plain, None)
    for actual, expected in (
        (evaluated.engine.state(), plain.engine.state()),
        (evaluated.teacher.state_dict(), plain.teacher.state_dict()),
    ):
        assert all(torch.equal(value, expected[name]) for name, value in actual.items())
    assert all(parameter.grad is None for parameter in evaluated.teacher.encoder.parameters())


def test_networks_that_are_not_finite_give_nan_beside_finite_controls(
    rank_info, tiny_shards, tmp_path, small_evaluation
):
    config = online_run(tiny_shards, tmp_path / "run", small_evaluation, loader="torch")
    evaluation = OnlineEvaluation(config, open_shards(tiny_shards.pattern), rank_info)
    evaluation.prepare()
    for network, value in (("encoder", math.nan), ("encoder", 1e30), ("predictor", math.inf)):
        model = world_model.build_untrained(config)
        next(getattr(model, network).parameters()).data.fill_(value)
        predictor = [(f"predictor.{name}", weight) for name, weight in model.predictor.named_parameters()]
        metrics = evaluation(model.encoder.state_dict(), predictor)
        assert math.isnan(metrics["eval/mrr"])
        for name in ("knn", "linear", "attentive", "rank_me", "lidar"):
            assert math.isnan(metrics[f"eval/{name}"]) == (network == "encoder"), name
        names = ("eval/mrr_untrained", "eval/mrr_chance", "eval/knn_untrained", "eval/knn_chance")
        assert all(0 <= metrics[name] <= 1 for name in names)


def test_a_run_that_diverges_is_evaluated_until_it_ends(tiny_shards, tmp_path, small_evaluation):
    config = online_run(tiny_shards, tmp_path / "run", small_evaluation, max_skipped_steps=3, loader="torch")
    config = replace(config, optim=replace(config.optim, lr=1e30))
    config = replace(config, output=replace(config.output, log_every=2, evaluate_every=2, checkpoint_every=1000))
    with pytest.raises(FloatingPointError, match=r"3 steps in a row were not finite, the last one step 5"):
        run(config)
    # None stands for a value that is not finite.
    first, last = read_metrics(tmp_path / "run")
    assert first["loss/prediction"] > 0 and last["loss/prediction"] is None and last["optim/skipped_steps"] == 2
    assert first["eval/mrr"] is None and last["eval/knn"] is None and last["eval/knn_untrained"] > 0
    assert "not finite" in write_run_report(tmp_path / "run").read_text()


def test_unusable_validation_data_is_refused_before_the_first_step(rank_info, tiny_shards, tmp_path):
    trainer = build_components(tiny_run(tiny_shards, tmp_path / "run"), rank_info)

    def prepare(val: str, keep_best: Metric | None = None) -> None:
        config = online_run(tiny_shards, tmp_path / "run", val)
        config = replace(config, output=replace(config.output, keep_best=keep_best))
        OnlineEvaluation(config, trainer.shards, rank_info).prepare()

    with pytest.raises(ValueError, match=r"data\.val must name validation shards when output\.evaluate_every is set"):
        prepare("")
    with pytest.raises(ValueError, match=r"keep_best must be one of mrr, rank_me, lidar in this run: .*got 'knn'"):
        prepare(write_labelled(tmp_path / "unlabelled.tar", [None, 1]), keep_best="knn")
    with pytest.raises(FileNotFoundError, match="absent"):
        prepare(str(tmp_path / "absent.tar"))
    with pytest.raises(ShardError, match=r"bad\.tar:1 is truncated"):
        prepare(write_labelled(tmp_path / "bad.tar", [0, 1, 2], bad=True))
    with pytest.raises(ShardError, match="cls is integer 7, which is not one of the classes"):
        prepare(write_labelled(tmp_path / "strange.tar", [0, 7]))


def test_without_labels_mrr_and_ranks_are_measured_with_one_log_line(rank_info, tiny_shards, tmp_path, caplog):
    val = write_labelled(tmp_path / "val.tar", [0, None, None])
    config = online_run(tiny_shards, tmp_path / "run", val)
    trainer = build_components(config, rank_info)
    with caplog.at_level("INFO"):
        evaluation = OnlineEvaluation(config, trainer.shards, rank_info)
        evaluation.prepare()
        row = evaluation(trainer.teacher.state_dict(), trainer.engine.named_parameters("predictor."))
    assert names(row) == {"mrr", "rank_me", "lidar"} and "eval/knn_chance" not in row
    assert caplog.text.count("neither k-NN nor probes, because 2 of 3 samples of data.val have no class number") == 1


def test_with_the_identity_predictor_all_but_mrr_is_measured(rank_info, tiny_shards, tmp_path):
    config = online_run(tiny_shards, tmp_path / "run", write_labelled(tmp_path / "val.tar", [0, 1]), depth=0)
    trainer = build_components(config, rank_info)
    evaluation = OnlineEvaluation(config, trainer.shards, rank_info)
    evaluation.prepare()
    row = evaluation(trainer.teacher.state_dict(), trainer.engine.named_parameters("predictor."))
    assert names(row) == {"knn", "linear", "attentive", "rank_me", "lidar"} and "eval/mrr_chance" not in row


def changed_views(config: RunConfig, **views) -> RunConfig:
    return replace(config, views=replace(config.views, **views))


def evaluate_untrained(config: RunConfig, evaluation: OnlineEvaluation) -> tuple[WorldModel, dict[str, float]]:
    evaluation.prepare()
    model = world_model.build_untrained(config)
    predictor = [(f"predictor.{name}", weight) for name, weight in model.predictor.named_parameters()]
    return model, evaluation(model.encoder.state_dict(), predictor)


@pytest.mark.usefixtures("small_evaluation")
def test_mrr_and_lidar_are_measured_with_a_transformation_that_training_applies(
    rank_info, tiny_shards, tmp_path, monkeypatch
):
    monkeypatch.setattr(online, "_LIDAR_IMAGES", 4)
    val = write_labelled(tmp_path / "four.tar", [0, 1, 2, 0])
    config = online_run(tiny_shards, tmp_path / "run", val, loader="torch")
    config = changed_views(config, jitter=Jitter(probability=0.0), gamma=Gamma(probability=0.5))
    model, row = evaluate_untrained(config, OnlineEvaluation(config, open_shards(tiny_shards.pattern), rank_info))
    shards, samples = open_shards(val), np.arange(4)
    ranks = np.stack(list(rank_images([model], shards, samples, replace(online._MRR, families=("gamma",)))))
    assert row["eval/mrr"] == mean_reciprocal_rank(ranks)
    assert row["eval/lidar"] == lidar(encode_changed_views(model, shards, samples, rank_info, "gamma"))
    assert row["eval/lidar"] != lidar(encode_changed_views(model, shards, samples, rank_info, "jitter"))


@pytest.mark.parametrize(
    "jitter", [Jitter(probability=0.0), Jitter(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)]
)
def test_without_a_transformation_of_both_views_mrr_is_left_out_with_one_log_line_or_refused(
    rank_info, tiny_shards, small_evaluation, jitter, caplog
):
    folder, train = Path(small_evaluation).parent / "run", open_shards(tiny_shards.pattern)
    config = changed_views(online_run(tiny_shards, folder, small_evaluation, loader="torch"), jitter=jitter)
    with caplog.at_level("INFO"):
        _, row = evaluate_untrained(config, OnlineEvaluation(config, train, rank_info))
    assert names(row) == {"knn", "linear", "attentive", "rank_me"} and "eval/mrr_chance" not in row
    assert caplog.text.count("neither MRR nor LiDAR, because training applies no transformation to both views") == 1
    config = replace(config, output=replace(config.output, keep_best="mrr"))
    with pytest.raises(ValueError, match=r"keep_best must be one of knn, linear, attentive, rank_me .* such as jitter"):
        OnlineEvaluation(config, train, rank_info).prepare()


def test_only_divergence_of_a_probe_gives_nan(rank_info, tiny_shards):
    """An error in the program must not look like a bad encoder."""
    train = open_shards(tiny_shards.pattern)
    sets = label_sets(train, train, "cls", max_train=48, max_val=48)
    features, config = [torch.randn(48, 256), torch.randn(48, 256)], LinearConfig(epochs=10, lrs=(3e37,))

    def wrong(*_):
        raise ValueError("a shape is wrong")

    with pytest.raises(ValueError, match="a shape is wrong"):
        online_probes._probe_accuracy(torch.device("cpu"), sets, features, wrong, config)
    assert math.isnan(online_probes._probe_accuracy(torch.device("cpu"), sets, features, LinearGrid, config))


def test_features_do_not_depend_on_the_batches(rank_info, tiny_shards, tmp_path, monkeypatch):
    model, shards = world_model.build_untrained(tiny_run(tiny_shards, tmp_path)), open_shards(tiny_shards.pattern)
    one_batch = encode_images(model, shards, np.arange(10), rank_info, keep_tokens=True)
    monkeypatch.setattr(loaders, "EVALUATION_BATCH_SIZE", 4)
    three_batches = encode_images(model, shards, np.arange(10), rank_info, keep_tokens=True)
    torch.testing.assert_close(three_batches.pooled, one_batch.pooled)
    torch.testing.assert_close(three_batches.tokens, one_batch.tokens)
    assert len(one_batch.pooled.unique(dim=0)) == 10


@pytest.mark.slow
@pytest.mark.multi_rank
def test_two_ranks_with_their_own_copies_measure_what_one_does_and_end_together_when_images_are_gone(
    rank_info, tiny_shards, tmp_path
):
    # An odd number, so that the ranks' shares differ.
    val = write_labelled(tmp_path / "val.tar", [0, 1, 2, 0, 1])
    config = online_run(tiny_shards, tmp_path, val)
    _, row = evaluate_untrained(config, OnlineEvaluation(config, open_shards(tiny_shards.pattern), rank_info))
    # Another machine may have the same shards in another place.
    copies = shutil.copytree(tiny_shards.folder, tmp_path / "copies")
    copy = shutil.copy(val, copies / "val.tar")
    data = {"0": [tiny_shards.pattern, val], "1": [f"{copies}/{Path(tiny_shards.pattern).name}", str(copy)]}
    port = free_port()
    pipes: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = []
    for rank in "01":
        launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(WORKER), str(tmp_path), *data[rank]]
        ranks.append(subprocess.Popen(command, env=os.environ | CHILD_ENVIRONMENT | launch, **pipes))
    printed = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], printed
    (first, error), (second, other_error) = printed
    assert first == second
    assert json.loads(first) == pytest.approx({name: value for name, value in row.items() if "time" not in name})
    assert other_error.count("error (rank 1)") == 1 and str(copy) in other_error, other_error
    assert "error" not in error and "Traceback" not in other_error
