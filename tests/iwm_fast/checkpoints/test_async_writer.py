"""Checkpoints beside training: what is on the disk when, which are kept, what a killed process or full disk leaves."""

import json
import logging
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

PLACE = RankInfo(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


def writer_of(folder, **output):
    config = RunConfig(output=OutputConfig(folder=str(folder), checkpoint_every=1, **output))
    return CheckpointWriter(config, PLACE, fingerprint={"seed": 0}, run_id="0f0f")


def begin(writer, step, num_values=4, **others):
    values = {
        "engine_state": {"weight/a": torch.full((num_values,), float(step))},
        "teacher_state": {"b": torch.full((2,), float(step))},
    }
    return writer.write(step=step, applied_steps=step - 1, **values | others)


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_training_goes_on_before_the_checkpoint_is_on_the_disk_and_can_wait_for_it(tmp_path):
    writer = writer_of(tmp_path)
    folder = begin(writer, 7, num_values=5_000_000)
    assert not folder.exists() and writer.last_step == 7
    writer.wait()
    saved = checkpoints.read(folder)
    assert (saved.step, saved.applied_steps, saved.run_id, saved.fingerprint) == (7, 6, "0f0f", {"seed": 0})
    assert saved.world_size == 1 and saved.versions["torch"]


def test_what_training_does_to_the_teacher_meanwhile_is_not_in_the_checkpoint(tmp_path):
    writer = writer_of(tmp_path)
    teacher = torch.zeros(5_000_000)
    folder = begin(writer, 1, teacher_state={"b": teacher})
    teacher.fill_(1.0)
    writer.wait()
    assert checkpoints.read(folder).teacher_state["b"].sum() == 0


def test_one_checkpoint_is_written_at_a_time_and_in_order(tmp_path):
    writer = writer_of(tmp_path)
    first = begin(writer, 1, num_values=5_000_000)
    second = begin(writer, 2)
    assert checkpoints.read(first).step == 1
    writer.close()
    assert checkpoints.read(second).step == 2


def test_the_newest_and_multiples_of_keep_every_are_kept(tmp_path):
    writer = writer_of(tmp_path, keep_last=2, keep_every=3)
    for step in range(1, 9):
        begin(writer, step)
    writer.wait()
    assert [checkpoints.step_of(folder) for folder in checkpoints.step_folders(tmp_path)] == [3, 6, 7, 8]
    assert len(names(tmp_path)) == 4


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "gone"), [(1, None, [1, 2, 3]), (3, None, [1]), (9, None, []), (1, 2, [1, 3])]
)
def test_what_is_neither_new_nor_a_multiple_is_superfluous(tmp_path, keep_last, keep_every, gone):
    folders = [checkpoints.folder_of(tmp_path, step) for step in (1, 2, 3, 4)]
    kept = OutputConfig(checkpoint_every=1, keep_last=keep_last, keep_every=keep_every)
    assert [checkpoints.step_of(folder) for folder in checkpoints_to_delete(folders, kept)] == gone


def test_a_checkpoint_that_could_not_be_written_is_told_at_once_and_raised_by_every_later_call(tmp_path, caplog):
    writer = writer_of(tmp_path)
    begin(writer, 1)
    writer.wait()
    assert not writer.has_failed
    begin(writer, 1, num_values=9)
    writer.close()
    assert writer.has_failed
    (said,) = [row.getMessage() for row in caplog.records if row.levelno == logging.ERROR]
    assert "step-00000001 could not be written" in said and "exists already" in said
    for call in (writer.wait, lambda: begin(writer, 2), writer.wait):
        with pytest.raises(
            CheckpointError, match=r"(?s)could not write .*step-00000001: .*exists already.*resume=auto"
        ):
            call()
    writer.close()
    # nothing was overwritten, and nothing written after it
    assert names(tmp_path) == ["step-00000001"]
    assert len(checkpoints.read(checkpoints.newest(tmp_path)).engine_state["weight/a"]) == 4


# every write behind the 100 000th byte of a file fails, as on a full disk
FULL_DISK = f"""
import resource, signal, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(TESTS)!r}]
from pathlib import Path
from iwm_fast.runtime.error_reporting import user_facing_errors
from test_async_writer import begin, writer_of

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with user_facing_errors():
    writer = writer_of(Path(sys.argv[1]))
    begin(writer, 1)
    begin(writer, 2, num_values=100_000)
    writer.wait()
"""


def test_a_full_disk_is_one_message_and_the_checkpoint_before_it_stays(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert "error: rank 0 could not write" in ended.stderr and "File too large" in ended.stderr
    assert "free space there" in ended.stderr and "resume=auto" in ended.stderr
    # what was half written gives its room back at once
    assert names(tmp_path) == ["step-00000001"]
    assert checkpoints.read(checkpoints.newest(tmp_path)).step == 1


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Return the folder of a process that was killed at 20 moments of writing, and what each left."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, str(WORKERS / "killed_writer.py"), str(folder), "20", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, [json.loads(line) for line in done.stdout.splitlines()]


def test_a_process_killed_at_any_moment_leaves_a_whole_checkpoint_with_what_was_written(killed):
    _, kills = killed
    assert len(kills) == 20
    assert sum(kill["num_unfinished"] for kill in kills) >= 5, "most were killed while they wrote"
    for kill in kills:
        assert kill["is_equal"] and not kill["refused"], kill
        assert kill["newest"] >= kill["published"], "what was said to be published is there"
    assert kills[-1]["newest"] > kills[0]["newest"] > 0


def test_what_killed_processes_leave_does_not_pile_up(killed):
    folder, kills = killed
    for kill in kills:
        # one under way, or one between its publishing and the removal of the oldest
        assert kill["num_unfinished"] <= 1 and kill["num_checkpoints"] <= 3, kill
    newest = kills[-1]["newest"]
    writer = writer_of(folder, keep_last=2)
    begin(writer, newest + 1)
    writer.wait()
    assert names(folder) == [checkpoints.folder_of(folder, step).name for step in (newest, newest + 1)]
