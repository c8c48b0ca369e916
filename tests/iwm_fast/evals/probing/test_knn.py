"""k-NN classification: votes and their weights, memory, and the reported rows."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fixtures.tinted_shards import pretrain_on_tinted_shards, write_tinted_shard
from iwm_fast import world_model
from iwm_fast.config.evaluation import EvalDataConfig, KnnConfig
from iwm_fast.evals.datasets import open_comparison
from iwm_fast.evals.probing.extraction import Features, extract_features
from iwm_fast.evals.probing.knn import evaluate_knn, knn_correct, vote
from iwm_fast.evals.results import read_result
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.runtime.distributed import single_process


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return pretrain_on_tinted_shards(tmp_path_factory.mktemp("tinted"), num_val=48)


def clusters(count: int, seed: int = 0, distance: float = 3.0) -> Features:
    """Return points around three centres, far from the origin; a class is a centre."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 16, generator=torch.Generator().manual_seed(9)) * distance
    label = torch.arange(count) % 3
    return Features(features=centres[label] + torch.randn(count, 16, generator=generator) + 100, label=label)


def test_votes_are_weighted_by_similarity__four_images():
    similarity = torch.tensor([[0.9, 0.8, 0.8, -1.0]])
    label = torch.tensor([0, 1, 1, 2])
    # Two images against one.
    assert vote(similarity, label, 3, temperature=1.0).item() == 1
    # At a low temperature the nearest image decides.
    assert vote(similarity, label, 3, temperature=0.01).item() == 0
    assert vote(similarity, label, 1, temperature=1.0).item() == 0
    assert vote(similarity, label, 99, temperature=1.0).item() == 1


def test_knn_finds_clusters_and_ignores_a_common_offset():
    assert knn_correct(clusters(45), clusters(15, seed=1), 5, 0.07).all()


def test_without_clusters_accuracy_is_chance():
    correct = knn_correct(clusters(600, distance=0.0), clusters(600, seed=1, distance=0.0), 5, 0.07)
    assert 0.25 < float(correct.double().mean()) < 0.42


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        tensors = out if isinstance(out, tuple | list) else [out]
        self.numel = max([self.numel, *(value.numel() for value in tensors if isinstance(value, torch.Tensor))])
        return out


def test_memory_does_not_grow_with_the_product_of_queries_and_images():
    bank, queries = clusters(500), clusters(400, seed=1)
    correct = knn_correct(bank, queries, 5, 0.07)
    with LargestTensor() as largest:
        chunked = knn_correct(bank, queries, 5, 0.07, max_similarities=10_000)
    assert torch.equal(chunked, correct) and largest.numel == 10_000
    with LargestTensor() as largest:
        assert torch.equal(knn_correct(bank, queries, 5, 0.07, max_similarities=1), correct)
    assert largest.numel == 500 * 16


def test_knn_compares_the_chosen_label(run_folder):
    rows = {
        label: evaluate_knn(KnnConfig(run=str(run_folder), data=EvalDataConfig(label=label))).row("encoder", "accuracy")
        for label in ("cls", "json.look.tint", "json.look.hue_bin")
    }
    tint, hue_bin, cls = (rows[name] for name in ("json.look.tint", "json.look.hue_bin", "cls"))
    assert tint.value == hue_bin.value == 1.0 and (tint.low, tint.high) == (1.0, 1.0)
    assert (tint.chance, cls.chance) == (pytest.approx(1 / 3), 0.5)
    # The images do not show `.cls`, which alternates every three samples.
    assert cls.value < 0.9 and cls.low < cls.value < cls.high
    # An untrained encoder sees colours, too.
    assert tint.control == 1.0 and tint.control_name == "untrained encoder" and tint.num_samples == 48


def test_the_result_is_saved_in_the_run_folder_with_its_settings(run_folder):
    config = KnnConfig(run=str(run_folder), data=EvalDataConfig(label="json.look.tint"), max_train_samples=24)
    result = evaluate_knn(config)
    saved = read_result(run_folder / "evaluations" / "knn_json.look.tint.json")
    assert saved.rows == result.rows and saved.step == 3 and saved.settings["max_train_samples"] == 24
    # Of equally common training classes the first counts: blue, the class of half of the validation images.
    assert saved.details == {"num_train": 24, "num_classes": 3, "most_common_class": 0.5}
    assert json.loads((run_folder / "evaluations" / "knn_json.look.tint.json").read_text())["task"] == "knn"


def test_a_class_that_training_lacks_is_refused_before_extraction(run_folder, tmp_path):
    config = KnnConfig(run=str(run_folder), data=EvalDataConfig(label="json.name"))
    before = set(run_folder.glob("features/*"))
    with pytest.raises(ShardError, match=r"val\.tar: sample '098': json\.name is integer 98, .* classes 0, 1, 2"):
        evaluate_knn(config)
    with pytest.raises(ShardError, match=r"train\.tar: sample '000': its \.json has no field 'animal'.*existing"):
        evaluate_knn(KnnConfig(run=str(run_folder), data=EvalDataConfig(label="json.animal")))
    assert set(run_folder.glob("features/*")) == before


def test_a_bad_validation_image_is_named(run_folder, tmp_path):
    val = write_tinted_shard(tmp_path / "cut.tar", 6, 0, bad=2)
    with pytest.raises(ShardError, match=r"cut\.tar:002 is truncated"):
        evaluate_knn(KnnConfig(run=str(run_folder), data=EvalDataConfig(val=val)))


def test_value_and_control_are_those_of_the_run_and_untrained_networks(run_folder, tiny_shards):
    names = ("tiny-000000.tar", "tiny-{000001..000002}.tar")
    data = EvalDataConfig(
        **{of: str(tiny_shards.folder / name) for of, name in zip(("train", "val"), names, strict=True)}
    )
    controls = set()
    for seed in (0, 2):
        config = KnnConfig(run=str(run_folder), seed=seed, data=data)
        row = evaluate_knn(config).row("encoder", "accuracy")
        comparison = open_comparison(config, single_process("cpu"))
        model = comparison.models[0]
        models = [model, world_model.build_untrained(replace(model.config, seed=seed))]
        accuracies = []
        for network in models:
            bank, queries = (extract_features(network, labelled) for labelled in comparison.sets)
            correct = knn_correct(bank, queries, config.num_neighbors, config.temperature, device="cpu")
            accuracies.append(float(correct.double().mean()))
        assert [row.value, row.control] == accuracies
        controls.add(row.control)
    assert len(controls) > 1
