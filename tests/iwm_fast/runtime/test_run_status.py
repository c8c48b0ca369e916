"""The status of a run: damage to it never stops a run, and a full disk never leaves it at "running"."""

import errno
import os

import pytest

from iwm_fast.pipelines.storage.atomic import DiskError
from iwm_fast.runtime.run_status import STATUS_FILE, read_status, write_status

DAMAGED = {
    "empty": b"",
    "cut": b'{"state": "runn',
    "not UTF-8": b'{"state": "runn\xff\xfe"}',
    "NUL bytes": bytes(40),
    "a list": b'["running"]',
    "a number": b"7",
    "brackets without end": b"[" * 100_000,
    "two objects": b'{"state": "running"}{"state": "failed"}',
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_status_counts_as_none_and_is_replaced(tmp_path, damage):
    (tmp_path / STATUS_FILE).write_bytes(DAMAGED[damage])
    assert read_status(tmp_path) == {}
    write_status(tmp_path, "preempted", reason="SIGTERM")
    assert read_status(tmp_path)["reason"] == "SIGTERM"


def test_a_folder_or_a_dangling_link_in_its_place_counts_as_none(tmp_path):
    (tmp_path / "first" / STATUS_FILE).mkdir(parents=True)
    (tmp_path / STATUS_FILE).symlink_to(tmp_path / "absent")
    assert read_status(tmp_path) == read_status(tmp_path / "first") == read_status(tmp_path / "absent") == {}
    with pytest.raises(DiskError, match=r"status.json cannot be written: Is a directory; .* move one of them away"):
        write_status(tmp_path / "first", "running")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_on_a_full_disk_the_status_is_overwritten_in_place(tmp_path, monkeypatch, number):
    write_status(tmp_path, "running", step=3, reason="a longer entry than the next one, which is padded with spaces")

    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    write_status(tmp_path, "failed", step=4, reason="disk full")
    assert read_status(tmp_path)["state"] == "failed" and read_status(tmp_path)["reason"] == "disk full"
    assert [path.name for path in tmp_path.iterdir()] == [STATUS_FILE]
    # Without a file to overwrite, there is nothing that could be wrong.
    with pytest.raises(DiskError, match="free space"):
        write_status(tmp_path / "new", "failed")


def test_a_disk_that_fails_leaves_the_old_status(tmp_path, monkeypatch):
    write_status(tmp_path, "running", step=3)

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError, match=r"status.json cannot be written: Input/output error; check the disk"):
        write_status(tmp_path, "failed", step=4)
    assert read_status(tmp_path)["state"] == "running"
