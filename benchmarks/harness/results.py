"""The committed results: which file holds what, and how to read them."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import records
from benchmarks.harness.records import Record

RESULTS = Path(__file__).parents[1] / "results"
OFFLINE = RESULTS / "offline.jsonl"
PIPELINES, STEPS, FEATURES = "-pipelines", "-train-step", "-features"
"""Suffixes of the file names: results of the data pipeline, the training step and frozen features."""


def read_committed(suffix: str) -> list[Record]:
    """Return the records of all files whose names end in the suffix."""
    return [record for path in sorted(RESULTS.glob(f"*{suffix}.jsonl")) for record in records.read(path)]


def read_committed_kernels() -> list[Record]:
    """Return the committed records of fused operations, except those of sweeps."""
    suffixes = ("-sweep", PIPELINES, STEPS, FEATURES)
    paths = [path for path in sorted(RESULTS.glob("*.jsonl")) if not path.stem.endswith(suffixes)]
    return [record for path in paths for record in records.read(path)]


def newest_gpu(committed: Sequence[Record]) -> list[Record]:
    """Return the records of the most recently measured GPU."""
    measured = [record for record in committed if record.machine.get("gpu")]
    newest = max(measured, key=lambda record: str(record.machine.get("run")), default=None)
    return [record for record in measured if newest and record.machine["gpu"] == newest.machine["gpu"]]
