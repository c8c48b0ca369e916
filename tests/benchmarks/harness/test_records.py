"""Records: the round trip through JSON lines, and which records are comparable."""

import json

import numpy as np

from benchmarks.harness import machine, records
from benchmarks.harness.records import Record


def record(provider="fused", run="2026-01-01", **values):
    fields = {"what": "attention", "shape": {"N": 196, "d": 64}, "pass_": "forward", "median_ms": 1.0}
    return Record(provider=provider, machine={"gpu": "X", "run": run}, **(fields | values))


def test_a_record_survives_the_round_trip(tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    written = [
        record(dtype="bfloat16", p20_ms=0.9, p80_ms=1.1, repeats=50, bytes=4, flops=8, share_of_floor=0.5),
        record("peer", median_ms=None, failure="RuntimeError: no"),
        record(pass_="", median_ms=None, figures={"registers": 0, "name": "x"}),
    ]
    for written_record in written:
        records.append(path, written_record)
        assert records.read(path)[-1] == written_record, "each record is on disk immediately"
    assert records.read(path) == written


def test_a_line_has_the_key_pass_and_no_empty_fields():
    fields = json.loads(records.to_line(record()))
    assert fields["pass"] == "forward" and "pass_" not in fields
    assert "failure" not in fields and "bytes" not in fields


def test_only_the_latest_run_of_each_group_is_selected():
    old = [record("fused"), record("cuDNN"), record("fused", pass_="backward")]
    new = [record("fused", run="2026-02-01", median_ms=2.0)]
    selected = records.latest(old + new)
    assert [(entry.provider, entry.pass_, entry.median_ms) for entry in selected] == [
        ("fused", "forward", 2.0),
        ("fused", "backward", 1.0),
    ]


def test_a_machine_description_has_versions_commit_and_command():
    description = machine.describe("0123abcd")
    assert description["commit"] == "0123abcd" and description["torch"] and description["triton"] and description["run"]
    assert description["command"].startswith("python ")
    assert description["cpu"] and description["cores"] == machine.num_cores() >= 1
    assert description["numpy"] == np.__version__
    json.dumps(description)
    assert machine.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
