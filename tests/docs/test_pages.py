"""The README and the documentation are true: limits, generated pages, links, and code that runs as printed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fixtures.imitated_datasets import NUM_TRAIN, NUM_VAL, SCENES, write_archives
from fixtures.painted_shards import pretrain_on_painted_shards
from fixtures.paths import PROJECT, PYTHONPATH
from fixtures.tar_files import samples_of
from iwm_fast.evals.multitask.task_list import read_task_list
from iwm_fast.evals.results import read_result
from iwm_fast.pipelines.annotations.labels import read_labels
from iwm_fast.pipelines.storage.shard_set import open_shards

DOCS = PROJECT / "docs"
BLOCK = re.compile(r"^```(bash|python|yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# (\w+\.yaml)\n")


def test_the_readme_is_short():
    lines = (PROJECT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    too_long = [line for line in lines if len(line) > 160]
    assert not too_long


def test_generated_pages_are_current(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    from generate import PAGES

    for name, page in PAGES.items():
        assert (DOCS / name).read_text(encoding="utf-8") == page(), "run python docs/generate.py"


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in DOCS.glob("*.md"))])
def test_links_lead_to_files(page):
    text = (PROJECT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [link for link in links if "://" not in link]
    assert not [link for link in local if not ((PROJECT / page).parent / link).exists()]


def save_images(folder: Path, count: int = 40) -> None:
    """Write images of two classes, a disc and a square, of random colour on a random background."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:64, :64] - 32
    for name, is_inside in (("disc", rows**2 + columns**2 < 400), ("square", abs(rows) + abs(columns) < 25)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            inside, outside = generator.integers(0, 256, (2, 3))
            pixels = np.where(is_inside[..., None], inside, outside) + generator.normal(0, 8, (64, 64, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{number:03}.png")


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """Yield the language and the text of each code block that is executed: bash, python and yaml."""
    for match in BLOCK.finditer((DOCS / page).read_text(encoding="utf-8")):
        yield match[1], match[2]


def execute(page: str, folder: Path, *, languages: tuple[str, ...] = ("bash", "python", "yaml")) -> None:
    """Run a page's blocks in order in a folder; a yaml block is written to the file that its first line names."""
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for language, text in blocks(page):
        if language not in languages:
            continue
        if language == "yaml":
            name = FILE_NAME.match(text)
            assert name is not None, f"the first line of a yaml block names its file: {text}"
            (folder / name[1]).write_text(text, encoding="utf-8")
            continue
        command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{page}:\n{text}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.launcher
def test_the_code_of_quickstart_data_and_python_api_runs(tmp_path):
    save_images(tmp_path / "images")
    execute("quickstart.md", tmp_path)
    execute("python_api.md", tmp_path)
    (tmp_path / "runs" / "demo").symlink_to("first")
    execute("../README.md", tmp_path, languages=("python",))
    packed = tmp_path / "data"
    packed.mkdir()
    (packed / "images").symlink_to(tmp_path / "images")
    execute("data.md", packed)


@pytest.mark.slow
@pytest.mark.launcher
def test_the_code_of_evaluation_runs(tmp_path):
    save_images(tmp_path / "images", count=2)
    (tmp_path / "runs").mkdir()
    pretrain_on_painted_shards(tmp_path / "painted")
    (tmp_path / "painted" / "run").rename(tmp_path / "runs" / "first")
    execute("evaluation.md", tmp_path)


@pytest.mark.slow
@pytest.mark.launcher
def test_imitations_of_the_papers_data_sets_are_packed_and_evaluated(tmp_path):
    write_archives(tmp_path)
    (tmp_path / "runs").mkdir()
    pretrain_on_painted_shards(tmp_path / "painted")
    (tmp_path / "painted" / "run").rename(tmp_path / "runs" / "first")
    execute("datasets.md", tmp_path)
    scenes = list(SCENES)
    classes = {"inat18": ["0003", "0041", "2761"], "sun397": scenes, "places205": scenes}
    for name, expected in classes.items():
        # One image of SUN397 cannot be decoded.
        num_train = 3 * NUM_TRAIN - (name == "sun397")
        for split, count in (("train", num_train), ("val", 3 * NUM_VAL)):
            shards = open_shards(str(tmp_path / "shards" / name / split))
            assert shards.num_samples == count and set(shards.labels(np.arange(count))) == {0, 1, 2}
            assert json.loads((tmp_path / "shards" / name / split / "classes.json").read_text()) == expected
        tasks = read_task_list(str(PROJECT / "iwm_fast" / "configs" / "tasks" / f"{name}.yaml"))
        kinds = {task.name: read_labels(shards, task.label).classes for task in tasks}
        assert kinds.get("kind", ("none", "outdoor", "shop")) == ("none", "outdoor", "shop")
        assert len(kinds["genus" if name == "inat18" else "scene"]) == (2 if name == "inat18" else 3)
    for sample in samples_of(f"{tmp_path}/shards/inat18/val/shard-000000.tar"):
        fields = json.loads(sample["json"])
        assert fields["file"].split("/")[:2] == [fields["supercategory"], str(int(fields["class"]))]
    maps = open_shards(str(tmp_path / "shards" / "ade20k" / "train"))
    assert maps.num_samples == 8 and (maps.shards[0].mask_size > 0).all()
    result = read_result(tmp_path / "runs" / "first" / "evaluations" / "segment_size32.json")
    assert result.details["num_classes"] == 151


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "No issues found" in result.stdout + result.stderr, result.stdout + result.stderr
