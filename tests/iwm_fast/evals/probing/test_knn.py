"""k nearest neighbours: who votes, with which weight, and what is reported beside it."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fixtures.tinted_shards import tinted_run, write_tinted
from iwm_fast import world_model
from iwm_fast.config.evaluation import EvalData, KnnConfig
from iwm_fast.evals.datasets import open_comparison
from iwm_fast.evals.probing.extraction import Features
from iwm_fast.evals.probing.knn import evaluate_knn, knn_accuracy, knn_correct, vote
from iwm_fast.evals.results import read_result
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.runtime.distributed import single_process


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return tinted_run(tmp_path_factory.mktemp("tinted"), num_val=48)


def clusters(count: int, seed: int = 0, spread: float = 3.0) -> Features:
    """Points around three centres, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 16, generator=torch.Generator().manual_seed(9)) * spread
    label = torch.arange(count) % 3
    return Features(features=centres[label] + torch.randn(count, 16, generator=generator) + 100, label=label)


def test_votes_are_weighted_by_similarity__four_images():
    similarity = torch.tensor([[0.9, 0.8, 0.8, -1.0]])
    label = torch.tensor([0, 1, 1, 2])
    assert vote(similarity, label, 3, temperature=1.0).item() == 1  # two against one
    assert vote(similarity, label, 3, temperature=0.01).item() == 0  # the nearest alone counts
    assert vote(similarity, label, 1, temperature=1.0).item() == 0
    assert vote(similarity, label, 99, temperature=1.0).item() == 1  # there are but four


def test_knn_finds_clusters_and_ignores_a_common_offset():
    assert knn_correct(clusters(45), clusters(15, seed=1), 5, 0.07).all()


def test_without_clusters_knn_guesses():
    correct = knn_correct(clusters(600, spread=0.0), clusters(600, seed=1, spread=0.0), 5, 0.07)
    assert 0.25 < float(correct.double().mean()) < 0.42


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        tensors = out if isinstance(out, tuple | list) else [out]
        self.numel = max([self.numel, *(one.numel() for one in tensors if isinstance(one, torch.Tensor))])
        return out


def test_memory_does_not_grow_with_queries_times_images():
    bank, queries = clusters(500), clusters(400, seed=1)
    whole = knn_correct(bank, queries, 5, 0.07)
    with LargestTensor() as largest:
        in_parts = knn_correct(bank, queries, 5, 0.07, most_similarities=10_000)
    assert torch.equal(in_parts, whole) and largest.numel == 10_000
    with LargestTensor() as largest:
        assert torch.equal(knn_correct(bank, queries, 5, 0.07, most_similarities=1), whole)
    assert largest.numel == 500 * 16


def test_knn_compares_the_field_it_is_told_to(run_folder):
    found = {
        label: evaluate_knn(KnnConfig(run=str(run_folder), data=EvalData(label=label))).row("encoder", "accuracy")
        for label in ("cls", "json.look.tint", "json.look.hue_bin")
    }
    tint, hue_bin, cls = (found[name] for name in ("json.look.tint", "json.look.hue_bin", "cls"))
    assert tint.value == hue_bin.value == 1.0 and (tint.low, tint.high) == (1.0, 1.0)
    assert (tint.chance, cls.chance) == (pytest.approx(1 / 3), 0.5)
    # beads of two classes, three at a time: the images do not tell
    assert cls.value < 0.9 and cls.low < cls.value < cls.high
    # colours are seen without training, too
    assert tint.control == 1.0 and tint.control_name == "untrained encoder" and tint.num_samples == 48


def test_the_result_is_in_the_runs_folder_with_what_it_takes_to_read_it(run_folder):
    config = KnnConfig(run=str(run_folder), data=EvalData(label="json.look.tint"), max_train_samples=24)
    result = evaluate_knn(config)
    saved = read_result(run_folder / "evaluations" / "knn_json.look.tint.json")
    assert saved.rows == result.rows and saved.step == 3 and saved.settings["max_train_samples"] == 24
    # of equally common classes the first: blue, which half of the validation images are
    assert saved.details == {"num_train": 24, "num_classes": 3, "most_common_class": 0.5}
    assert json.loads((run_folder / "evaluations" / "knn_json.look.tint.json").read_text())["task"] == "knn"


def test_a_class_that_training_lacks_is_refused_before_anything_is_extracted(run_folder, tmp_path):
    config = KnnConfig(run=str(run_folder), data=EvalData(label="json.name"))
    before = set(run_folder.glob("features/*"))
    with pytest.raises(ShardError, match=r"val\.tar: sample '098': json\.name is integer 98, .* classes 0, 1, 2"):
        evaluate_knn(config)
    with pytest.raises(ShardError, match=r"train\.tar: sample '000': its \.json has no field 'animal'.*existing"):
        evaluate_knn(KnnConfig(run=str(run_folder), data=EvalData(label="json.animal")))
    assert set(run_folder.glob("features/*")) == before


def test_a_bad_validation_image_is_named(run_folder, tmp_path):
    val = write_tinted(tmp_path / "cut.tar", 6, 0, bad=2)
    with pytest.raises(ShardError, match=r"cut\.tar: sample '002': cannot decode the image"):
        evaluate_knn(KnnConfig(run=str(run_folder), data=EvalData(val=val)))


def test_value_and_control_are_the_run_and_the_networks_before_training(run_folder, tiny_shards):
    names = ("tiny-000000.tar", "tiny-{000001..000002}.tar")
    data = EvalData(**{of: str(tiny_shards.folder / name) for of, name in zip(("train", "val"), names, strict=True)})
    controls = set()
    for seed in (0, 2):
        config = KnnConfig(run=str(run_folder), seed=seed, data=data)
        row = evaluate_knn(config).row("encoder", "accuracy")
        compared = open_comparison(config, single_process("cpu"))
        model = compared.models[0]
        models = [model, world_model.untrained(replace(model.config, seed=seed))]
        assert [row.value, row.control] == [knn_accuracy(one, compared.sets, config) for one in models]
        controls.add(row.control)
    assert len(controls) > 1
