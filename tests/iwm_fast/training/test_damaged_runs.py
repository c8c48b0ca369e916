"""Resuming a run of which any file or folder is damaged: it ends like a straight run, or in one message.

What could not be read is never lost: it keeps its name, or is renamed to NAME.refused.
"""

import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fixtures.tiny_finetuning import toy_context, toy_job, weights_of
from fixtures.tiny_pretraining import STEPS, tiny_run
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.config.loading import load_config
from iwm_fast.evals.finetuning.run import train_job
from iwm_fast.monitoring.metrics import METRICS_FILE, read_metrics, read_rows
from iwm_fast.runtime import distributed
from iwm_fast.runtime.error_reporting import user_facing_errors
from iwm_fast.runtime.run_status import read_status, write_status
from iwm_fast.train import _describe_end, run


def flip(content: bytes, place: float) -> bytes:
    changed = bytearray(content or b"\0")
    changed[int(place * (len(changed) - 1))] ^= 1 << int(place * 1000) % 8
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes, float], bytes]] = {
    "cut": lambda content, place: content[: int(place * len(content))],
    "emptied": lambda content, place: b"",
    "flipped": flip,
    # What a power failure leaves on some file systems.
    "zeroed": lambda content, place: bytes(len(content)),
    "continued": lambda content, place: content + b'\xff\xfe{"step": ',
}
REPLACED = ("folder", "dangling link", "pipe", "missing")


def damage_file(path: Path, damage: str, place: float) -> bytes | None:
    """Damage a file and return its new content, None if it has none."""
    if damage in DAMAGES:
        changed = DAMAGES[damage](path.read_bytes(), place)
        path.write_bytes(changed)
        return changed
    path.unlink() if path.is_file() else shutil.rmtree(path)
    if damage == "folder":
        path.mkdir()
        (path / "kept").write_text("kept")
    elif damage == "file":
        path.write_text("kept")
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage == "dangling link":
        path.symlink_to(path.with_name("absent"))
    return None


@pytest.fixture(scope="module")
def pretrained(tiny_shards, tmp_path_factory):
    """Return settings and final weights of a run, whose folder is left as if it had been stopped after step 11."""
    config = tiny_run(tiny_shards, tmp_path_factory.mktemp("pretrained") / "run", loader="torch")
    config = replace(config, resume="auto", output=replace(config.output, action_log=True, log_every=1))
    run(config)
    folder = Path(config.output.folder)
    weights = final_weights(folder)
    shutil.rmtree(checkpoints.find_newest_folder(folder))
    write_status(folder, "running", step=10)
    return config, weights


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    saved = checkpoints.read(checkpoints.find_newest_folder(folder))
    return {**saved.engine_state, **saved.teacher_state}


class StoppedRun:
    """A copy of the stopped run, which a test damages and resumes."""

    def __init__(self, pretrained, folder: Path) -> None:
        config, self.weights = pretrained
        self.folder = folder
        self.config = replace(config, output=replace(config.output, folder=str(folder)))
        shutil.copytree(config.output.folder, folder, symlinks=True)

    def resume(self) -> str:
        """Resume as `iwm train` does; return the message it ends with, empty if it is finished."""
        with pytest.MonkeyPatch.context() as patch:
            printed: list[str] = []
            patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
            try:
                with user_facing_errors():
                    run(self.config)
                    _describe_end(self.config)
            except SystemExit as end:
                assert end.code == 2 and sum(line.startswith("error") for line in printed) == 1, printed
                return "\n".join(printed)
        return ""

    def assert_equals_a_straight_run(self) -> None:
        ending = final_weights(self.folder)
        assert ending.keys() == self.weights.keys()
        assert not [name for name, value in self.weights.items() if not torch.equal(value, ending[name])]
        assert read_status(self.folder)["state"] == "finished"
        # Rows from before the checkpoint may have been damaged; those after it are there.
        assert [row["step"] for row in read_metrics(self.folder)][-2:] == [STEPS - 1, STEPS]


def copies_of(content: bytes, folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if path.read_bytes().startswith(content)]


def files_and_folders(folder: Path) -> list[str]:
    # A name of TensorBoard's files contains the time.
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return sorted(name for name in names if "tfevents" not in name)


ENTRIES = (
    ".lock", "config.yaml", "metrics.jsonl", "started.jsonl", "status.json", "tensorboard", "actions", "checkpoints",
    *(f"actions/step-000000{first:02}-000000{end:02}-rank-000.parquet" for first, end in ((0, 5), (5, 10), (10, 12))),
    *(f"checkpoints/step-000000{step:02}{name}" for step in (5, 10)
      for name in ("", "/config.yaml", "/manifest.json", "/model.safetensors", "/state.json")),
)  # fmt: skip
FOLDERS = [name for name in ENTRIES if "." not in name]
CASES = [(name, damage) for name in ENTRIES for damage in (
    ("file", "dangling link", "missing") if name in FOLDERS else (*DAMAGES, *REPLACED))]  # fmt: skip
# These make a third of a second each.
FAST = [
    *(("status.json", damage) for damage in ("cut", "zeroed", "folder", "pipe")),
    *(("metrics.jsonl", damage) for damage in ("cut", "flipped", "folder")),
    *(("started.jsonl", damage) for damage in ("cut", "folder")),
    ("checkpoints/step-00000010", "dangling link"), ("checkpoints/step-00000010/manifest.json", "missing"),
    ("checkpoints/step-00000005/state.json", "flipped"), ("checkpoints", "dangling link"), ("config.yaml", "folder"),
]  # fmt: skip


def test_the_cases_are_the_files_of_a_run(pretrained):
    assert set(files_and_folders(Path(pretrained[0].output.folder))) == set(ENTRIES)
    assert set(FAST) <= set(CASES)


@pytest.mark.parametrize(
    ("name", "damage"),
    [pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow], id=" ".join(case)) for case in CASES],
)
def test_a_damaged_run_ends_like_a_straight_one_or_in_one_message(pretrained, tmp_path, name, damage):
    seed = f"{name} {damage}"
    for number in range(4 if damage in ("cut", "flipped") and (name, damage) not in FAST else 1):
        stopped = StoppedRun(pretrained, tmp_path / f"run{number}")
        place = random.Random(seed + str(number)).random()
        content = damage_file(stopped.folder / name, damage, place)
        is_unreadable = (
            bool(read_rows(stopped.folder / METRICS_FILE)[1]) or not read_status(stopped.folder) or "step-" in name
        )
        before = files_and_folders(stopped.folder)
        message = stopped.resume()
        if message:
            assert str(stopped.folder / name) in message, (seed, place, message)
            assert set(before) <= set(files_and_folders(stopped.folder)), "a run that is refused moves nothing"
        else:
            stopped.assert_equals_a_straight_run()
        # The log of steps that are repeated is written again.
        if content is not None and is_unreadable and "00000012" not in name:
            assert copies_of(content, stopped.folder), (seed, place, message)
        if damage in ("folder", "file") and "00000012" not in name:
            assert b"kept" in {path.read_bytes() for path in stopped.folder.rglob("*") if path.is_file()}, seed


@pytest.mark.parametrize("name", ["checkpoints", ".lock", "tensorboard"])
def test_what_cannot_be_used_at_all_is_one_message(pretrained, tmp_path, name):
    stopped = StoppedRun(pretrained, tmp_path / "run")
    damage_file(stopped.folder / name, "file" if name in FOLDERS else "folder", 0.5)
    assert f"{stopped.folder / name} cannot be" in stopped.resume()


def test_damaged_metrics_are_named_once_and_good_rows_stay(pretrained, tmp_path, caplog):
    stopped = StoppedRun(pretrained, tmp_path / "run")
    path = stopped.folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2], lines[6], lines[8] = b'{"step": 3, "lo\n', bytes(300) + b"\n", b'{"loss/prediction": 0.5}\n'
    path.write_bytes(b"".join(lines) + b"\xff\xfe\xfd")
    damaged = path.read_bytes()
    assert not stopped.resume()
    stopped.assert_equals_a_straight_run()
    assert [row["step"] for row in read_metrics(stopped.folder)] == [1, 2, 4, 5, 6, 8, 10, 11, 12]
    (warning,) = [record.getMessage() for record in caplog.records if "metrics.jsonl" in record.getMessage()]
    assert "damaged lines: 3, 7, 13" in warning or "lines without a step" in warning
    assert (stopped.folder / "metrics.jsonl.refused").read_bytes() == damaged
    assert stopped.resume() == "" and not (stopped.folder / "metrics.jsonl.refused-2").exists()


def copy_as(source: str, target: str):
    return lambda folder: shutil.copytree(folder / source, folder / target)


def from_another_run(folder: Path) -> None:
    """Copy a complete, newer checkpoint of a run with other settings, under its right name."""
    step, other = folder / "step-00000010", folder / "step-00000099"
    saved = replace(checkpoints.read(step), folder=other, run_id="0123456789ab", step=99, fingerprint={"optim.lr": 5.0})
    checkpoints.write(saved, tiny_run_config(step))


def tiny_run_config(step: Path):
    return load_config(step / "config.yaml")


def link_to_older(folder: Path) -> None:
    (folder / "step-00000011").symlink_to(folder / "step-00000005")


def link_to_itself(folder: Path) -> None:
    (folder / "step-00000011").symlink_to(folder / "step-00000011")


def without_manifest(folder: Path) -> None:
    shutil.copytree(folder / "step-00000010", folder / "step-00000011")
    (folder / "step-00000011" / "manifest.json").unlink()


def manifest_of_another(folder: Path) -> None:
    shutil.copytree(folder / "step-00000010", folder / "step-00000011")
    shutil.copy(folder / "step-00000005" / "manifest.json", folder / "step-00000011")


# What stands beside the checkpoints of steps 5 and 10, its name, and what the warning says of it.
STRAY = {
    "an older one under a newer number": (copy_as("step-00000005", "step-00000061"), "step-00000061", "holds step 5"),
    "the newest under a number beyond the end": (copy_as("step-00000010", "step-00099999"), "step-00099999", "holds"),
    "one of another run": (from_another_run, "step-00000099", "was written by run 0123456789ab"),
    "without a manifest": (without_manifest, "step-00000011", "manifest.json"),
    "with the manifest of another": (manifest_of_another, "step-00000011", "its manifest records"),
    "a link to an older one": (link_to_older, "step-00000011", "holds step 5"),
    "a link to itself": (link_to_itself, "step-00000011", "cannot be read"),
    "an empty folder": (lambda folder: (folder / "step-00000011").mkdir(), "step-00000011", "cannot be read"),
    "a file": (lambda folder: (folder / "step-00000011").touch(), "step-00000011", "cannot be read"),
}


@pytest.mark.parametrize(
    "stray", [pytest.param(stray, marks=[pytest.mark.slow] * stray.startswith(("a ", "an empty"))) for stray in STRAY]
)
def test_a_checkpoint_that_is_not_what_its_name_says_is_named_once_and_skipped(pretrained, tmp_path, caplog, stray):
    make, name, reason = STRAY[stray]
    stopped = StoppedRun(pretrained, tmp_path / "run")
    make(stopped.folder / "checkpoints")
    assert stopped.resume() == ""
    stopped.assert_equals_a_straight_run()
    (warning,) = [record.getMessage() for record in caplog.records if name in record.getMessage()]
    assert reason in warning and "resuming from step 10 instead" in warning
    assert os.path.lexists(stopped.folder / "checkpoints" / f"{name}.refused")


@pytest.mark.parametrize("stray", ["one of another run", "an older one under a newer number", "without a manifest"])
def test_if_no_other_checkpoint_is_left_the_run_ends_and_changes_nothing(pretrained, tmp_path, stray):
    make, name, reason = STRAY[stray]
    stopped = StoppedRun(pretrained, tmp_path / "run")
    make(stopped.folder / "checkpoints")
    for good in ("step-00000005", "step-00000010"):
        shutil.rmtree(stopped.folder / "checkpoints" / good)
    before = {path: path.read_bytes() for path in stopped.folder.rglob("*") if path.is_file()}
    message = stopped.resume()
    assert "none of the checkpoints" in message and name in message and reason in message
    assert {path: path.read_bytes() for path in stopped.folder.rglob("*") if path.is_file()} == before


def test_checkpoints_copied_into_a_new_folder_are_used(pretrained, tmp_path):
    stopped = StoppedRun(pretrained, tmp_path / "run")
    for path in stopped.folder.iterdir():
        if path.name != "checkpoints":
            path.unlink() if path.is_file() else shutil.rmtree(path)
    assert stopped.resume() == ""
    stopped.assert_equals_a_straight_run()


def test_a_linked_checkpoint_is_used_and_its_target_never_removed(pretrained, tmp_path):
    stopped = StoppedRun(pretrained, tmp_path / "run")
    stopped.config = replace(stopped.config, output=replace(stopped.config.output, keep_last=1))
    moved, link = tmp_path / "other disk", stopped.folder / "checkpoints" / "step-00000010"
    link.rename(moved)
    link.symlink_to(moved)
    assert stopped.resume() == ""
    stopped.assert_equals_a_straight_run()
    assert not link.is_symlink() and checkpoints.read(moved).step == 10


def test_a_run_beyond_its_last_step_is_refused(pretrained, tmp_path):
    stopped = StoppedRun(pretrained, tmp_path / "run")
    shorter = replace(stopped.config.optim, epochs=2.0)
    stopped.config = replace(stopped.config, resume="extend", optim=shorter)
    assert "optim.epochs = 2 means 6 steps, but" in stopped.resume()
    assert read_status(stopped.folder)["state"] == "running"


def test_a_folder_of_checkpoints_that_cannot_be_listed_starts_no_new_run(pretrained, tmp_path, monkeypatch):
    stopped = StoppedRun(pretrained, tmp_path / "run")
    iterdir = Path.iterdir

    def deny(path):
        if path.name == "checkpoints":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", deny)
    before = (stopped.folder / "metrics.jsonl").read_bytes()
    assert "checkpoints cannot be read (Permission denied)" in stopped.resume()
    assert (stopped.folder / "metrics.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def finetuned(tiny_shards, tmp_path_factory):
    """Return the folder and final weights of a finetuning job that was stopped after step 8 of 9."""
    folder = tmp_path_factory.mktemp("finetuned")
    weights = finetune(tiny_shards, folder)
    shutil.rmtree(checkpoints.find_newest_folder(folder / "toy"))
    write_status(folder / "toy", "running", step=8)
    return folder, weights


def finetune(tiny_shards, folder: Path) -> dict[str, torch.Tensor]:
    rank_info = distributed.start("cpu")
    try:
        context = toy_context(rank_info, tiny_shards, folder)
        job = toy_job(context.settings, context.model_config)
        train_job(job, context)
        return weights_of(job.module)
    finally:
        distributed.stop()


FINETUNED_FILES = (
    "config.yaml", "metrics.jsonl", "started.jsonl", "status.json", "tensorboard",
    *(f"checkpoints/step-00000008{name}"
      for name in ("", "/config.yaml", "/manifest.json", "/model.safetensors", "/state.json")),
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "status.json" else [pytest.mark.slow]) for name in FINETUNED_FILES],
)
def test_a_damaged_finetuning_job_ends_like_a_straight_one_or_in_one_message(
    finetuned, tiny_shards, tmp_path, name, caplog
):
    folder, weights = finetuned
    for damage in ("file",) if "." not in name else (*DAMAGES, *REPLACED):
        caplog.set_level(logging.WARNING)
        copy = tmp_path / damage.replace(" ", "-")
        shutil.copytree(folder, copy)
        damage_file(copy / "toy" / name, damage, random.Random(name + damage).random())
        try:
            ending = finetune(tiny_shards, copy)
        except (CheckpointError, OSError) as error:
            assert str(copy / "toy" / name) in str(error)
        else:
            assert not [key for key, value in weights.items() if not torch.equal(value, ending[key])], damage
            assert read_status(copy / "toy")["state"] == "finished"
            starts = (copy / "toy" / "started.jsonl").read_bytes().splitlines()
            assert json.loads(starts[-1])["step"] == 8
