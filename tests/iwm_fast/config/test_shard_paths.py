"""Shard patterns in run folders."""

import pytest

from iwm_fast.config.shard_paths import absolute_shards


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a.tar", "{here}/a.tar"),
        ("data/train-{000..012}.tar", "{here}/data/train-{000..012}.tar"),
        ("shards/", "{here}/shards"),
        ("../x/*.tar :: b.tar", "{here}/../x/*.tar::{here}/b.tar"),
        ("{a,b}/x.tar", "{here}/{a,b}/x.tar"),
        ("s3://bucket/{0..3}.tar::c.tar", "s3://bucket/{0..3}.tar::{here}/c.tar"),
        ("{/a,/b}/x.tar", "{/a,/b}/x.tar"),
        ("{b,/a}/x.tar", "{b,/a}/x.tar"),
        ("/data/a.tar", "/data/a.tar"),
        ("~/a.tar", "~/a.tar"),
        ("", ""),
    ],
)
def test_only_relative_local_names_become_absolute(tmp_path, monkeypatch, spec, expected):
    monkeypatch.chdir(tmp_path)
    assert absolute_shards(spec) == expected.replace("{here}", str(tmp_path))


def test_a_working_directory_that_would_change_the_pattern_is_not_added(tmp_path, monkeypatch):
    (tmp_path / "a{b,c}").mkdir()
    monkeypatch.chdir(tmp_path / "a{b,c}")
    assert absolute_shards("x.tar") == "x.tar"
