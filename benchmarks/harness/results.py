"""The committed results: which file holds what, and how to read them."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import records
from benchmarks.harness.records import Record

RESULTS = Path(__file__).parents[1] / "results"
OFFLINE = RESULTS / "offline.jsonl"
PIPELINES, STEPS, FEATURES = "-pipelines", "-train-step", "-features"
"""Endings of the names of files with measurements of the data pipeline, the training step and frozen features."""


def committed(ending: str) -> list[Record]:
    """Return the records of all files whose names end so."""
    return [record for path in sorted(RESULTS.glob(f"*{ending}.jsonl")) for record in records.read(path)]


def committed_kernels() -> list[Record]:
    """Return all committed records of fused operations but those of sweeps."""
    others = ("-sweep", PIPELINES, STEPS, FEATURES)
    paths = [path for path in sorted(RESULTS.glob("*.jsonl")) if not path.stem.endswith(others)]
    return [record for path in paths for record in records.read(path)]


def newest_gpu(found: Sequence[Record]) -> list[Record]:
    """Return the records of the GPU that was measured last."""
    measured = [record for record in found if record.machine.get("gpu")]
    newest = max(measured, key=lambda record: str(record.machine.get("run")), default=None)
    return [record for record in measured if newest and record.machine["gpu"] == newest.machine["gpu"]]
