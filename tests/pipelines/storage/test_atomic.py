"""Atomic writes: on the disk before they are renamed, with errors that name the file and the remedy."""

import errno
import os

import pytest

from iwm_fast.pipelines.storage.atomic import (
    DiskError,
    force_to_disk,
    remove_folder,
    remove_unfinished,
    replace_file,
    set_aside,
    write_folder,
)


def write_text(text):
    return lambda draft: draft.write_text(text)


def fail_on(monkeypatch, number, *, folders=False, files=False):
    """Let fsync fail on folders or files."""
    fsync = os.fsync

    def failing_fsync(descriptor):
        is_folder = os.path.isdir(f"/proc/self/fd/{descriptor}")
        if (folders and is_folder) or (files and not is_folder):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing_fsync)


def test_a_file_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def record(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((name, (tmp_path / "status.json").read_text()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    (tmp_path / "status.json").write_text("old")
    replace_file(tmp_path / "status.json", write_text("new"))
    (draft, before), (folder, after) = synced
    assert draft.endswith(".draft") and before == "old", "the content is forced to disk under the temporary name"
    assert folder == str(tmp_path) and after == "new", "and the new name after it"
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.ENOSYS])
def test_file_systems_that_cannot_force_folders_to_disk_are_accepted(tmp_path, monkeypatch, number):
    fail_on(monkeypatch, number, folders=True)
    replace_file(tmp_path / "file", write_text("content"))
    write_folder(tmp_path / "parent" / "folder", {"file": write_text("content")})
    set_aside(tmp_path / "file")
    assert (tmp_path / "parent" / "folder" / "file").read_text() == "content"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ESTALE])
def test_a_folder_that_is_not_on_the_disk_for_another_reason_is_an_error(tmp_path, monkeypatch, number):
    fail_on(monkeypatch, number, folders=True)
    with pytest.raises(OSError):
        force_to_disk(tmp_path)


REMEDIES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space there, or raise the quota",
    errno.EFBIG: "ulimit -f",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the disk or the network file system",
    errno.EROFS: "read-only",
    errno.EINVAL: "check the disk",
}


@pytest.mark.parametrize("number", REMEDIES)
def test_an_error_names_the_file_the_reason_and_the_remedy_and_keeps_the_old_file(tmp_path, monkeypatch, number):
    (tmp_path / "file").write_text("old")
    fail_on(monkeypatch, number, files=True)
    with pytest.raises(DiskError) as caught:
        replace_file(tmp_path / "file", write_text("new"))
    message = f"{tmp_path / 'file'} cannot be written: {os.strerror(number)}; "
    assert str(caught.value).startswith(message) and REMEDIES[number] in str(caught.value)
    assert ("free space" in str(caught.value)) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert caught.value.errno == number
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"], "no temporary file is left"
    with pytest.raises(DiskError, match=f"{tmp_path / 'folder'} cannot be written"):
        write_folder(tmp_path / "folder", {"file": write_text("content")})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_links_are_removed_and_renamed_without_what_they_point_to(tmp_path):
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "file").write_text("kept")
    for name in ("link", ".unfinished-link"):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "dangling.refused").symlink_to(tmp_path / "absent")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    remove_folder(tmp_path / "link")
    remove_unfinished(tmp_path)
    assert set_aside(tmp_path / "dangling").name == "dangling.refused-2"
    assert (target / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling.refused", "dangling.refused-2", "elsewhere"]
