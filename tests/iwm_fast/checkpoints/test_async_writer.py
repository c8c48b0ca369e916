"""Asynchronous checkpoints: their order, which are kept, and the disk after a kill or when it is full."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fixtures.paths import TESTS, WORKERS
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.async_writer import CheckpointWriter, checkpoints_to_delete
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.config.run import OutputConfig, RunConfig
from iwm_fast.runtime.distributed import RankInfo

RANK_INFO = RankInfo(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


def build_writer(folder, **output):
    config = RunConfig(output=OutputConfig(folder=str(folder), checkpoint_every=1, **output))
    return CheckpointWriter(config, RANK_INFO, fingerprint={"seed": 0}, run_id="0f0f")


def begin(writer, step, num_values=4, **changes):
    """Start a checkpoint whose values are its step."""
    values = {
        "engine_state": {"weight/a": torch.full((num_values,), float(step))},
        "teacher_state": {"b": torch.full((2,), float(step))},
    }
    return writer.write(step=step, applied_steps=step - 1, **values | changes)


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_training_continues_before_the_checkpoint_is_on_the_disk(tmp_path):
    writer = build_writer(tmp_path)
    folder = begin(writer, 7, num_values=5_000_000)
    assert not folder.exists() and writer.last_step == 7
    writer.wait()
    saved = checkpoints.read(folder)
    assert (saved.step, saved.applied_steps, saved.run_id, saved.fingerprint) == (7, 6, "0f0f", {"seed": 0})
    assert saved.world_size == 1 and saved.versions["torch"]


def test_later_changes_of_the_teacher_are_not_in_the_checkpoint(tmp_path):
    writer = build_writer(tmp_path)
    teacher = torch.zeros(5_000_000)
    folder = begin(writer, 1, teacher_state={"b": teacher})
    teacher.fill_(1.0)
    writer.wait()
    assert checkpoints.read(folder).teacher_state["b"].sum() == 0


def test_checkpoints_are_written_one_at_a_time_and_in_order(tmp_path):
    writer = build_writer(tmp_path)
    first = begin(writer, 1, num_values=5_000_000)
    second = begin(writer, 2)
    assert checkpoints.read(first).step == 1
    writer.close()
    assert checkpoints.read(second).step == 2


def test_the_newest_and_multiples_of_keep_every_are_kept(tmp_path):
    writer = build_writer(tmp_path, keep_last=2, keep_every=3)
    for step in range(1, 9):
        begin(writer, step)
    writer.wait()
    assert [checkpoints.parse_step(folder) for folder in checkpoints.list_checkpoint_folders(tmp_path)] == [3, 6, 7, 8]
    assert len(names(tmp_path)) == 4


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "deleted"), [(1, None, [1, 2, 3]), (3, None, [1]), (9, None, []), (1, 2, [1, 3])]
)
def test_checkpoints_that_are_neither_new_nor_multiples_are_deleted(tmp_path, keep_last, keep_every, deleted):
    folders = [checkpoints.checkpoint_folder(tmp_path, step) for step in (1, 2, 3, 4)]
    config = OutputConfig(checkpoint_every=1, keep_last=keep_last, keep_every=keep_every)
    assert [checkpoints.parse_step(folder) for folder in checkpoints_to_delete(folders, config)] == deleted
    kept = [checkpoints.parse_step(folder) for folder in checkpoints_to_delete(folders, config, best_step=1)]
    assert kept == [step for step in deleted if step != 1]


def test_a_failure_is_logged_at_once_and_raised_by_every_later_call(tmp_path, caplog):
    writer = build_writer(tmp_path)
    begin(writer, 1)
    writer.wait()
    assert not writer.has_failed
    begin(writer, 1, num_values=9)
    writer.close()
    assert writer.has_failed
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "step-00000001 could not be written" in message and "exists already" in message
    for call in (writer.wait, lambda: begin(writer, 2), writer.wait):
        with pytest.raises(
            CheckpointError, match=r"(?s)could not write .*step-00000001: .*exists already.*resume=auto"
        ):
            call()
    writer.close()
    # Nothing was overwritten, and nothing was written after the failure.
    assert names(tmp_path) == ["step-00000001"]
    assert len(checkpoints.read(checkpoints.find_newest_folder(tmp_path)).engine_state["weight/a"]) == 4


def test_a_checkpoint_that_cannot_be_removed_is_a_warning_and_removed_later(tmp_path, caplog, monkeypatch):
    writer = build_writer(tmp_path, keep_last=1)

    def refuse(path, **_):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    with monkeypatch.context() as context:
        context.setattr(shutil, "rmtree", refuse)
        for step in (1, 2, 3):
            begin(writer, step)
            writer.wait()
    # In step 2 and 3 an old checkpoint stays, in step 3 also the leftover of step 2.
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 3 and all("Directory not empty: " in text and "tries again" in text for text in warnings)
    assert "step-00000001" in warnings[0]
    begin(writer, 4)
    writer.wait()
    assert names(tmp_path) == ["step-00000004"]


# Writing beyond the first 100,000 bytes of a file fails, as on a full disk.
FULL_DISK_SCRIPT = f"""
import resource, signal, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(TESTS)!r}]
from pathlib import Path
from iwm_fast.runtime.error_reporting import user_facing_errors
from test_async_writer import begin, build_writer

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with user_facing_errors():
    writer = build_writer(Path(sys.argv[1]))
    begin(writer, 1)
    begin(writer, 2, num_values=100_000)
    writer.wait()
"""


def test_a_full_disk_is_one_message_and_earlier_checkpoints_remain(tmp_path):
    command = [sys.executable, "-c", FULL_DISK_SCRIPT, str(tmp_path)]
    completed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert completed.returncode == 2 and "Traceback" not in completed.stderr, completed.stderr
    assert "error: rank 0 could not write" in completed.stderr and "File too large" in completed.stderr
    assert "raise the limit" in completed.stderr and "resume=auto" in completed.stderr
    # The unfinished checkpoint is removed at once, which frees its space.
    assert names(tmp_path) == ["step-00000001"]
    assert checkpoints.read(checkpoints.find_newest_folder(tmp_path)).step == 1


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Kill a process at 20 moments while it writes; return its folder and the state of the disk after each kill."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, str(WORKERS / "killed_writer.py"), str(folder), "20", "0"]
    completed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert completed.returncode == 0, completed.stderr
    return folder, [json.loads(line) for line in completed.stdout.splitlines()]


def test_a_process_killed_at_any_moment_leaves_a_complete_checkpoint(killed):
    _, kills = killed
    assert len(kills) == 20
    assert sum(kill["num_unfinished"] for kill in kills) >= 5, "at least 5 kills must hit an unfinished checkpoint"
    for kill in kills:
        assert kill["is_equal"] and not kill["refused"], kill
        assert kill["newest"] >= kill["published"], "a checkpoint reported as published must exist"
    assert kills[-1]["newest"] > kills[0]["newest"] > 0


def test_leftovers_of_killed_processes_do_not_accumulate(killed):
    folder, kills = killed
    for kill in kills:
        # At most one being written, or one published while the oldest is not yet removed.
        assert kill["num_unfinished"] <= 1 and kill["num_checkpoints"] <= 3, kill
    newest = kills[-1]["newest"]
    writer = build_writer(folder, keep_last=2)
    begin(writer, newest + 1)
    writer.wait()
    assert names(folder) == [checkpoints.checkpoint_folder(folder, step).name for step in (newest, newest + 1)]
