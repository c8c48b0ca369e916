"""The page about extensions: its transformation and its logger are added to a copy of the project and used."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.painted_shards import write_painted_shard
from fixtures.paths import PROJECT

PAGE = (PROJECT / "docs" / "extending.md").read_text(encoding="utf-8")
SETTINGS = """
base: vit_s16
data: {train: TRAIN, val: VAL}
views: {size: 16, blur: {sigma: [0.1, 1.0]}}
model:
  encoder: {dim: 32, depth: 1, num_heads: 2, patch_size: 4}
  predictor: {dim: 16, depth: 1, num_heads: 1}
optim: {global_batch_size: 16, epochs: 2, precision: fp32}
runtime: {loader_threads: 1, reader_threads: 1, device: cpu}
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def extended_copy(folder: Path) -> Path:
    """Return a copy of the project with the page's files and changes."""
    for name in ("iwm_fast", "kernels", "pipelines"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / name, folder / name, symlinks=True, ignore=ignored)
    for text in blocks("python"):
        path = folder / text.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.partition("\n")[2], encoding="utf-8")
    for diff in blocks("diff"):
        header, _, changes = diff.partition("\n")
        path = folder / header.removeprefix("+++ ")
        for sign, old, added in re.findall(r"^([ -])(.*)\n((?:\+.*\n)+)", changes, re.MULTILINE):
            before, line, after = path.read_text(encoding="utf-8").partition(f"{old}\n")
            assert line, f"{path.name} has no line {old!r}"
            new = re.sub(r"^\+", "", added, flags=re.MULTILINE)
            path.write_text(f"{before}{line if sign == ' ' else ''}{new}{after}", encoding="utf-8")
    return folder


def run(command: list[str], project: Path, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(project), "PATH": path}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.launcher
def test_the_transformation_of_the_page_is_trained_and_retrieved_and_its_logger_writes(tmp_path):
    project = extended_copy(tmp_path / "project")
    run([sys.executable, "-m", "pytest", "-q", "tests/pipelines/transforms/test_invert.py"], project, project)
    work = tmp_path / "work"
    work.mkdir()
    train, val = (
        write_painted_shard(work / f"{name}.tar", 32, seed=seed) for seed, name in enumerate(("train", "val"))
    )
    (work / "my.yaml").write_text(SETTINGS.replace("TRAIN", train).replace("VAL", val), encoding="utf-8")
    output = run(["bash", "-euo", "pipefail", "-c", "\n".join(blocks("bash"))], project, work)
    lines = (work / "runs/csv/metrics.csv").read_text().splitlines()
    assert lines[0].startswith("4,loss/prediction,") and output.endswith(f"{lines[-1]}\n")
    assert re.search(r"invert\W+mrr", output), output
    assert "Inversion undone" in (work / "runs/invert/imagine.html").read_text(encoding="utf-8")
    assert (work / "runs/invert/imagine_sweeps.png").is_file() and "views.invert.probability" in run(
        ["iwm", "train", "--help"], project, work
    )
