"""The benchmark of frozen features with tiny networks on a CPU."""

import dataclasses

import pytest
import torch

from benchmarks import report
from benchmarks.features import __main__ as benchmark
from benchmarks.features import report as feature_tables
from benchmarks.features.report import FORWARD, POOLED, TOKENS
from benchmarks.harness import records
from benchmarks.harness.records import Record
from benchmarks.harness.session import WrongResultError


def test_the_forward_pass_and_extractions_are_timed_and_recorded(tmp_path, capsys):
    arguments = ["--quick", "--out", str(tmp_path), "--data", str(tmp_path), "--commit", "x"]
    assert benchmark.main(arguments) == 0
    (path,) = tmp_path.glob("*.jsonl")
    *recorded, section = records.read(path)
    assert section.what == "section"
    assert [record.provider for record in recorded] == [FORWARD, POOLED, TOKENS]
    assert all(record.figures["images_per_s"] > 0 and record.shape["images"] == 80 for record in recorded)
    assert ["over_percent" in record.figures for record in recorded] == [False, True, True]
    assert "overhead of an extraction over the encoder's forward, %" in capsys.readouterr().out


def test_features_of_different_images_are_an_error(tmp_path):
    workload = benchmark.build_workload(tmp_path, "cpu", quick=True)
    views = [torch.zeros(64, 3, 32, 32), torch.zeros(16, 3, 32, 32)]
    with pytest.raises(WrongResultError, match="extraction, pooled: the features differ from the encoder's outputs"):
        benchmark.check(workload, views, POOLED, "pooled")


def test_the_goal_counts_the_slower_extraction():
    def extraction(provider: str, over_percent: float) -> Record:
        figures = {"images_per_s": 9.0, "over_percent": over_percent}
        return Record(
            what=feature_tables.FEATURES, provider=provider, shape={"images": 8}, median_ms=1e3, figures=figures
        )

    pooled, tokens = extraction(POOLED, 4.0), extraction(TOKENS, 12.0)
    text = feature_tables.sections([pooled, tokens])
    assert "12.00" in text and "| no" in text and "images=8." in text
    assert "| yes" in feature_tables.sections([pooled, dataclasses.replace(tokens, figures=pooled.figures)])
    assert "extraction, tokens" in report.render([], features=[pooled, tokens])
