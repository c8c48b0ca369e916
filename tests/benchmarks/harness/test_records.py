"""Records: lines that come back as they were written, and which of them may be compared."""

import json

import numpy as np

from benchmarks.harness import machine, records
from benchmarks.harness.records import Record


def record(provider="fused", run="2026-01-01", **values):
    fields = {"what": "attention", "shape": {"N": 196, "d": 64}, "pass_": "forward", "median_ms": 1.0}
    return Record(provider=provider, machine={"gpu": "X", "run": run}, **(fields | values))


def test_a_line_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    written = [
        record(dtype="bfloat16", p20_ms=0.9, p80_ms=1.1, repeats=50, bytes=4, flops=8, share_of_floor=0.5),
        record("peer", median_ms=None, failure="RuntimeError: no"),
        record(pass_="", median_ms=None, figures={"registers": 0, "name": "x"}),
    ]
    for one in written:
        records.append(path, one)
        assert records.read(path)[-1] == one, "on disk at once"
    assert records.read(path) == written


def test_a_line_says_pass_and_leaves_out_what_is_not_known():
    fields = json.loads(records.to_line(record()))
    assert fields["pass"] == "forward" and "pass_" not in fields
    assert "failure" not in fields and "bytes" not in fields


def test_numbers_of_different_runs_are_not_compared():
    old = [record("fused"), record("cuDNN"), record("fused", pass_="backward")]
    new = [record("fused", run="2026-02-01", median_ms=2.0)]
    kept = records.latest(old + new)
    assert [(one.provider, one.pass_, one.median_ms) for one in kept] == [
        ("fused", "forward", 2.0),
        ("fused", "backward", 1.0),
    ]


def test_a_machine_is_described_with_versions_commit_and_command():
    about = machine.describe("0123abcd")
    assert about["commit"] == "0123abcd" and about["torch"] and about["triton"] and about["run"]
    assert about["command"].startswith("python ")
    assert about["cpu"] and about["cores"] == machine.num_cores() >= 1
    assert machine.describe("0", ["numpy"])["numpy"] == np.__version__
    json.dumps(about)
    assert machine.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
