"""The committed results: which file holds what, and how to read them."""

from pathlib import Path

from benchmarks.harness import records
from benchmarks.harness.records import Record

RESULTS = Path(__file__).parents[1] / "results"
KERNELS, PIPELINES, STEPS, FEATURES = "-kernels", "-pipelines", "-train-step", "-features"
"""Suffixes of the file names: results of fused operations, the data pipeline, the training step, frozen features."""


def offline(triton: str) -> Path:
    """Return the file of the compiler's figures for a version of Triton."""
    return RESULTS / f"offline-triton-{triton}.jsonl"


def read(pattern: str, folder: Path = RESULTS) -> list[Record]:
    """Return the records of all files whose names without ".jsonl" end in a suffix, or match a glob pattern."""
    return [record for path in sorted(folder.glob(f"*{pattern}.jsonl")) for record in records.read(path)]
