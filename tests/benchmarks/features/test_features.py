"""The benchmark of frozen features in small, on a CPU."""

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


def test_forward_and_extractions_are_timed_and_written_down(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    arguments = ["--quick", "--out", str(out), "--data", str(tmp_path), "--commit", "x"]
    assert benchmark.main(arguments) == 0
    found = records.read(out)
    assert [record.provider for record in found] == [FORWARD, POOLED, TOKENS]
    assert all(record.figures["images_per_s"] > 0 and record.shape["images"] == 80 for record in found)
    assert ["over_percent" in record.figures for record in found] == [False, True, True]
    assert "extraction over the encoder's own forward, %" in capsys.readouterr().out


def test_an_extraction_of_other_images_is_refused(tmp_path):
    workload = benchmark.build_workload(tmp_path, "cpu", is_quick=True)
    views = [torch.zeros(64, 3, 32, 32), torch.zeros(16, 3, 32, 32)]
    with pytest.raises(WrongResultError, match="extraction, pooled keeps something else than the encoder says"):
        benchmark.check(workload, views, POOLED, "pooled")


def test_the_goal_is_that_of_the_slower_kind():
    def measured(provider: str, over: float) -> Record:
        figures = {"images_per_s": 9.0, "over_percent": over}
        return Record(
            what=feature_tables.FEATURES, provider=provider, shape={"images": 8}, median_ms=1e3, figures=figures
        )

    found = [measured(POOLED, 4.0), measured(TOKENS, 12.0)]
    text = feature_tables.sections(found)
    assert "12.00" in text and "| no" in text and "images=8." in text
    fine = feature_tables.sections([found[0], dataclasses.replace(found[1], figures=found[0].figures)])
    assert "| yes" in fine
    assert "extraction, tokens" in report.render([], features=found)
