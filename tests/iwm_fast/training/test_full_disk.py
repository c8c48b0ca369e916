"""A disk that is full or fails, whichever file is being written: one message with path and remedy, status failed."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.paths import PYTHONPATH, WORKERS
from fixtures.tiny_pretraining import STEPS, tiny_run
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.pipelines.storage import atomic
from iwm_fast.runtime import distributed
from iwm_fast.runtime.error_reporting import user_facing_errors
from iwm_fast.runtime.run_status import read_status
from iwm_fast.train import run
from iwm_fast.training.components import build_components
from iwm_fast.training.pretraining import PretrainTask
from iwm_fast.training.trainer import Trainer


@pytest.fixture
def config(tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path / "run", loader="torch")
    return replace(config, resume="auto", output=replace(config.output, log_every=1, action_log=True))


def run_to_its_message(train, capsys) -> str:
    with pytest.raises(SystemExit) as end, user_facing_errors():
        train()
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.startswith("error: ") and "Traceback" not in message, message
    return message


def open_files(name: str) -> list[int]:
    """Return the descriptors of the open files whose paths contain a name."""
    links = [link for link in Path("/proc/self/fd").iterdir() if os.path.lexists(link)]
    return [int(link.name) for link in links if name in os.readlink(link)]


@pytest.mark.parametrize(("file", "path"), [("metrics.jsonl", "run/metrics.jsonl"), ("tfevents", "run/tensorboard")])
def test_a_row_that_cannot_be_written_ends_the_run(config, tmp_path, capsys, file, path):
    def train():
        rank_info = distributed.start("cpu")
        try:
            components = build_components(config, rank_info)
            forward, calls = components.engine.forward, iter(range(STEPS))

            def fill_the_disk(batch):
                if next(calls) == 6:
                    for descriptor in open_files(file):
                        os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)
                return forward(batch)

            components.engine.forward = fill_the_disk
            Trainer(PretrainTask(components)).run()
        finally:
            distributed.stop()

    message = run_to_its_message(train, capsys)
    assert f"{tmp_path / path} cannot be written: No space left on device; free space there" in message
    assert "resume=auto continues from the newest checkpoint" in message
    status = read_status(tmp_path / "run")
    assert status["state"] == "failed" and f"{tmp_path / path} cannot be written" in status["reason"]
    assert checkpoints.find_newest_folder(tmp_path / "run").name == "step-00000005"
    assert run(config).step == STEPS


NUMBERS = {errno.ENOSPC: "free space", errno.EDQUOT: "free space", errno.EIO: "check the disk",
           errno.EROFS: "read-only", errno.ESTALE: "network file system"}  # fmt: skip
# A part of the path that is being forced to disk, and what the message names.
FILES = {
    "checkpoint": ("model.safetensors", "run/checkpoints/step-00000005 cannot be written"),
    "manifest": ("manifest.json", "run/checkpoints/step-00000005 cannot be written"),
    "settings": (".config.yaml", "run/config.yaml cannot be written"),
    "metrics at the start": (".metrics.jsonl", "run/metrics.jsonl cannot be written"),
    "metrics before a checkpoint": ("/metrics.jsonl", "run/metrics.jsonl cannot be written"),
    "action log": (".parquet", "while writing the action log in"),
}
CASES = [("checkpoint", number) for number in NUMBERS] + [
    (name, errno.ENOSPC) for name in FILES if name != "checkpoint"
]


def fail_to_sync(monkeypatch, name: str, number: int) -> None:
    fsync = os.fsync

    def failing_fsync(descriptor):
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing_fsync)


@pytest.mark.parametrize(
    ("file", "number"),
    [
        pytest.param(
            *case,
            id=f"{case[0]}, {errno.errorcode[case[1]]}",
            marks=[pytest.mark.slow] * (case[1] not in (errno.ENOSPC, errno.EROFS) or case[0] == "manifest"),
        )
        for case in CASES
    ],
)
def test_a_file_that_cannot_be_forced_to_disk_ends_the_run(config, monkeypatch, capsys, file, number):
    name, named = FILES[file]
    fail_to_sync(monkeypatch, name, number)
    message = run_to_its_message(lambda: run(config), capsys)
    assert named in message and os.strerror(number) in message and NUMBERS[number] in message, message
    assert ("free space" in message) == (number in atomic.DISK_IS_FULL)
    status = read_status(Path(config.output.folder))
    assert status["state"] == "failed" and os.strerror(number) in status["reason"], status
    monkeypatch.undo()
    assert run(config).step == STEPS


def test_a_status_that_cannot_be_written_does_not_hide_the_first_error(config, tmp_path, monkeypatch, capsys):
    fail_to_sync(monkeypatch, "", errno.EIO)
    message = run_to_its_message(lambda: run(config), capsys)
    assert message.startswith(f"error: {tmp_path / 'run/config.yaml'} cannot be written: Input/output error")
    assert message.count("error: ") == 1 and f"{tmp_path / 'run/status.json'} cannot be written" in message


@pytest.mark.slow
@pytest.mark.launcher
def test_a_run_on_a_disk_that_fills_up_anywhere_resumes_with_free_space(tiny_shards, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=4m none {disk}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    worker = f"{sys.executable} {WORKERS / 'full_disk.py'} '{tiny_shards.pattern}' {disk}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{mount} && {worker}"],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": PYTHONPATH},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        assert row["step"] == STEPS, row
        if row["code"]:
            assert row["code"] == 2 and row["printed"].count("error: ") == 1 and "Traceback" not in row["printed"], row
            assert f"{disk}/run" in row["printed"] and "free space" in row["printed"], row
            # Without a status before, and without space, there can be none.
            assert row["status"].get("state") == "failed" or (not row["status"] and not row["saved"]), row
    assert {row["saved"] for row in rows if row["code"]} >= {0, 5, 10}
