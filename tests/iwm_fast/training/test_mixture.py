"""Runs whose data.train is a mixture of sources."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fixtures.tar_files import write_tar
from fixtures.tiny_pretraining import tiny_run
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.commands.check_run import inspect_run
from iwm_fast.config.commands import CheckConfig
from iwm_fast.config.fingerprint import fingerprint, flat_settings
from iwm_fast.config.loading import build, load_config, save_config
from iwm_fast.config.run import RunConfig
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.pipelines.action_log.files import read_rows
from iwm_fast.pipelines.annotations.labels import require_same_class_names
from iwm_fast.pipelines.config import DataConfig, SourceConfig
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.train import run
from iwm_fast.training.loaders import open_training_shards

MIXTURE = """
data:
  train:
    - {name: web, shards: ['a-{0..1}.tar', b.tar], weight: 3}
    - {name: labelled, shards: s3://bucket/c, weight: 1e-1}
"""


@pytest.fixture
def mixed_yaml(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MIXTURE)
    return path


def test_a_mixture_is_read_saved_and_written_over(mixed_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = load_config(mixed_yaml).data
    assert data.train == "a-{0..1}.tar::b.tar::s3://bucket/c"
    assert data.mixture == (
        SourceConfig(name="web", shards="a-{0..1}.tar::b.tar", weight=3.0),
        SourceConfig(name="labelled", shards="s3://bucket/c", weight=0.1),
    )
    save_config(load_config(mixed_yaml), tmp_path / "saved.yaml")
    saved = load_config(tmp_path / "saved.yaml").data
    assert saved.mixture[0].shards == f"{tmp_path}/a-{{0..1}}.tar::{tmp_path}/b.tar"
    assert saved.mixture[1:] == data.mixture[1:] and saved.train.endswith("::s3://bucket/c")
    concatenated = load_config(mixed_yaml, ["data.train=x.tar::y.tar"]).data
    assert (concatenated.train, concatenated.mixture) == ("x.tar::y.tar", ())


REFUSED = {
    "[{name: a, shards: x, weight: 0}]": "weight of source 'a' in data.train must be above 0 and finite; .* got 0.0",
    "[{name: a, shards: x, weight: -1}]": "weight of source 'a' .* got -1.0",
    "[{name: a, shards: x, weight: .nan}]": r"data\.train\[0\]\.weight must be a finite number, got",
    "[{name: a, shards: x, weight: .inf}]": r"data\.train\[0\]\.weight must be a finite number, got",
    "[{name: a, shards: x, weight: heavy}]": r"data\.train\[0\]\.weight must be a finite number, got 'heavy'",
    "[{name: a, shards: x, weight: 1}, {name: a, shards: y, weight: 1}]":
        "name of a source in data.train must be a name of .* that no other source has, got 'a'",
    "[{name: a b, shards: x, weight: 1}]": "name of a source in data.train must be a name of letters, .* got 'a b'",
    "[{name: a, shards: '', weight: 1}]": "shards of source 'a' in data.train must name shards, got ''",
    "[{name: a, shards: x}]": r"data\.train\[0\] must have the keys name, shards, weight and no others",
    "[{name: a, shards: x, weight: 1, share: 2}]": r"data\.train\[0\] must have the keys name, shards, weight",
    "[{name: a, shards: x, weight: 1}, y.tar]": r"data\.train\[1\] must have the keys .*, got 'y.tar'",
}  # fmt: skip


@pytest.mark.parametrize("value", REFUSED)
def test_a_mixture_that_cannot_be_drawn_is_refused(tmp_path, value):
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{train: {value}}}")
    with pytest.raises(ValueError, match=REFUSED[value]):
        load_config(path)


def test_a_mixture_has_no_settings_besides_data_train(mixed_yaml):
    with pytest.raises(ValueError, match=r"unknown setting 'data\.mixture'"):
        build(RunConfig, {"data": {"mixture": []}})
    with pytest.raises(ValueError, match=r"unknown setting 'data\.mixture'"):
        build(RunConfig, {}, ["data.mixture=[]"])
    with pytest.raises(ValueError, match=r"data\.max_samples must be unset if data\.train is a mixture"):
        load_config(mixed_yaml, ["data.max_samples=3"])


def test_names_and_weights_count_and_are_compared_between_ranks(mixed_yaml):
    config = load_config(mixed_yaml)
    assert fingerprint(config, "content")["data.mixture"] == [["web", 3.0], ["labelled", 0.1]]
    assert fingerprint(config, "content")["data.train"] == "content"
    assert flat_settings(config)["data.mixture"] == [["web", 3.0], ["labelled", 0.1]]
    assert flat_settings(config)["data.train"] == "set"
    # The runs of earlier versions have no such entry.
    assert "data.mixture" not in fingerprint(RunConfig(), "content")
    json.dumps(fingerprint(config, "content"))


@pytest.fixture
def mixed(tiny_shards, tmp_path):
    """Return the settings of a run on the first shard (20 samples), and the other two (28 samples), three to one."""
    first, *others = sorted(map(str, tiny_shards.folder.glob("*.tar")))
    config = tiny_run(tiny_shards, tmp_path / "run", loader="torch")
    sources = (
        SourceConfig(name="small", shards=first, weight=0.75),
        SourceConfig(name="large", shards="::".join(others), weight=0.25),
    )
    data = DataConfig(mixture=sources, shuffle_window=2)
    return replace(config, data=data, output=replace(config.output, action_log=True))


def samples_of(folder: Path) -> list[int]:
    return (
        read_rows(folder / "actions", 0, 12)
        .sort_by([("step", "ascending"), ("slot", "ascending")])["sample"]
        .to_pylist()
    )


def test_a_run_draws_its_sources_by_weight_resumes_exactly_and_logs_their_epochs(mixed, tmp_path):
    assert run(mixed).step == 12
    drawn = samples_of(tmp_path / "run")
    in_small = np.array(drawn) < 20
    # 12 of 16 in each step, none of them more often than its own epochs.
    assert in_small.reshape(12, 16).sum(axis=1).tolist() == [12] * 12
    counts = np.bincount(drawn, minlength=48)
    assert set(counts[:20]) <= {7, 8} and set(counts[20:]) <= {1, 2}
    row = read_metrics(tmp_path / "run")[-1]
    assert row["data/epochs_small"] == pytest.approx(144 / 20) and row["data/epochs_large"] == pytest.approx(48 / 28)
    halves = replace(mixed, output=replace(mixed.output, folder=str(tmp_path / "halves")), resume="extend")
    assert run(replace(halves, optim=replace(halves.optim, epochs=2.0))).step == 6
    assert run(halves).step == 12
    assert samples_of(tmp_path / "halves") == drawn
    other = tuple(replace(source, weight=1.0) for source in mixed.data.mixture)
    changed = replace(halves, data=replace(halves.data, mixture=other))
    with pytest.raises(CheckpointError, match=r"data\.mixture"):
        run(changed)


def test_the_check_shows_what_each_source_gives(mixed):
    rows = dict(inspect_run(mixed, CheckConfig())[0].rows)
    assert rows["sources"].splitlines() == [
        "small: 75.0 % of each batch from 20 samples, seen 7.2 times",
        "large: 25.0 % of each batch from 28 samples, seen 1.71 times",
    ]
    assert rows["steps"].startswith("3.0 per epoch, 12 in 4 epochs")


def test_a_source_without_samples_is_refused_by_name(mixed, tmp_path):
    write_tar(tmp_path / "empty.tar", [("a.txt", b"x")])
    empty = SourceConfig(name="void", shards=str(tmp_path / "empty.tar"), weight=1.0)
    with pytest.raises(ValueError, match=r"shards of source 'void' in data\.train must hold samples"):
        open_training_shards(DataConfig(mixture=(*mixed.data.mixture, empty)))


def test_which_shards_belong_to_which_source_counts(mixed):
    small, large = mixed.data.mixture
    first, second = large.shards.split("::")
    moved = (replace(small, shards=f"{small.shards}::{first}"), replace(large, shards=second))
    shards, other = open_training_shards(mixed.data), open_training_shards(DataConfig(mixture=moved))
    assert (shards.source_shards, other.source_shards) == ((1, 2), (2, 1))
    assert shards.content_digest == other.content_digest and shards.sources_digest != other.sources_digest


def test_sources_with_different_classes_are_refused_where_labels_are_used(mixed, tmp_path):
    sources = []
    for name, classes in (("one", ["cat", "dog"]), ("two", ["dog", "cat"])):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", [(f"{name}.jpg", b"x"), (f"{name}.cls", b"0")])
        (tmp_path / name / "classes.json").write_text(json.dumps(classes))
        sources.append(SourceConfig(name=name, shards=str(tmp_path / name), weight=1.0))
    shards = open_training_shards(DataConfig(mixture=tuple(sources)))
    with pytest.raises(ShardError, match=r"class 0 is 'cat' in .*one/classes\.json, but 'dog' in .*two/classes\.json"):
        require_same_class_names(shards, shards)
