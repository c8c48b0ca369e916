"""The page about extensions: its transformation is added to a copy of the project, trained and retrieved."""

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
    """Return a copy of the project with the page's files and its lines in the composition."""
    for name in ("iwm_fast", "kernels", "pipelines"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / name, folder / name, symlinks=True, ignore=ignored)
    for text in blocks("python"):
        path = folder / text.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.partition("\n")[2], encoding="utf-8")
    composition = folder / "pipelines" / "transforms" / "composition.py"
    (diff,) = blocks("diff")
    for context, added in re.findall(r"^ (.*)\n\+(.*)\n", diff, re.MULTILINE):
        before, line, after = composition.read_text(encoding="utf-8").partition(f"{context}\n")
        assert line, f"composition.py has no line {context!r}"
        composition.write_text(f"{before}{line}{added}\n{after}", encoding="utf-8")
    return folder


def run(command: list[str], project: Path, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(project), "PATH": path}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.launcher
def test_the_transformation_of_the_page_is_trained_and_retrieved(tmp_path):
    project = extended_copy(tmp_path / "project")
    run([sys.executable, "-m", "pytest", "-q", "tests/pipelines/transforms/test_invert.py"], project, project)
    work = tmp_path / "work"
    work.mkdir()
    train, val = (
        write_painted_shard(work / f"{name}.tar", 32, seed=seed) for seed, name in enumerate(("train", "val"))
    )
    (work / "my.yaml").write_text(SETTINGS.replace("TRAIN", train).replace("VAL", val), encoding="utf-8")
    (commands,) = blocks("bash")
    output = run(["bash", "-euo", "pipefail", "-c", commands], project, work)
    assert re.search(r"invert\W+mrr", output), output
    assert "Inversion undone" in (work / "runs/invert/imagine.html").read_text(encoding="utf-8")
    assert (work / "runs/invert/imagine_sweeps.png").is_file() and "views.invert.probability" in run(
        ["iwm", "train", "--help"], project, work
    )
