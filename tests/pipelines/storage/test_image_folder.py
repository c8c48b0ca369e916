"""Packing folders with links, hidden and special files and odd names: each real file once, no offender silently."""

import gc
import json
import os
import resource
import shutil
import socket
import warnings
from pathlib import Path

import pytest

from fixtures.tar_files import samples_of
from iwm_fast.cli import main
from iwm_fast.pipelines.config import PackConfig
from iwm_fast.pipelines.storage import shard_writer
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.storage.shard_writer import pack_folder

# A PPM of one pixel; what follows the pixels is ignored.
PIXEL = b"P6 1 1 255\n\0\0\0"


def write(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PIXEL + (content or str(path).encode(errors="surrogateescape")))
    return path


@pytest.fixture
def source(tmp_path) -> Path:
    """Write three images in two class folders."""
    folder = tmp_path / "images"
    for name in ("cat/1.jpg", "cat/2.png", "dog/1.jpg"):
        write(folder / name)
    return folder


def packed_files(source: Path, **settings) -> list[str]:
    """Pack a folder and return the files in its shards, sorted."""
    destination = source.parent / "out"
    pack_folder(source, destination, PackConfig(**settings))
    return sorted(json.loads(sample["json"])["file"] for sample in samples_of(str(destination)))


OWN = ["cat/1.jpg", "cat/2.png", "dog/1.jpg"]


def link(path: Path, target: str | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


REPEATED = {
    "cycle to the class": lambda images: link(images / "cat" / "loop", "."),
    "cycle to the source": lambda images: link(images / "cat" / "deep" / "loop", "../.."),
    "cycle above the source": lambda images: link(images / "cat" / "loop", "/"),
    "cycle beside the classes": lambda images: link(images / "loop", "."),
    "two cycles": lambda images: [link(images / "cat" / name / "loop", "..") for name in ("a", "b")],
    "link to a file of the class": lambda images: link(images / "cat" / "0.jpg", "1.jpg"),
    "link to a link": lambda images: [link(images / "cat" / "0.jpg", "3.jpg"), link(images / "cat" / "3.jpg", "1.jpg")],
    "hard link": lambda images: os.link(images / "cat" / "1.jpg", images / "cat" / "9.jpg"),
    "folder of the class under a second name": lambda images: [
        (images / "cat" / "deep").mkdir(), link(images / "cat" / "deep" / "all", images / "cat")],
}  # fmt: skip


@pytest.mark.parametrize("name", REPEATED)
def test_each_real_file_is_packed_once_under_its_own_name(name, source):
    REPEATED[name](source)
    assert packed_files(source) == OWN
    assert json.loads((source.parent / "out" / "classes.json").read_text()) == ["cat", "dog"]


def test_links_to_other_places_are_followed(source, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere / "3.jpg"), write(elsewhere / "emu" / "4.jpg")
    link(source / "cat" / "3.jpg", elsewhere / "3.jpg")
    link(source / "emu", elsewhere / "emu")
    assert packed_files(source) == ["cat/1.jpg", "cat/2.png", "cat/3.jpg", "dog/1.jpg", "emu/4.jpg"]


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints/1-checkpoint.jpg", "@eaDir/1.jpg", "__MACOSX/1.jpg", "._1.jpg",
                                    "$RECYCLE.BIN/1.jpg", ".thumbnails/large/1.png"])  # fmt: skip
@pytest.mark.parametrize("parent", ["", "cat", "cat/deep"])
def test_hidden_files_and_folders_are_left_out_at_any_depth(hidden, parent, source):
    write(source / parent / hidden)
    assert packed_files(source) == OWN


def unreadable(path: Path) -> None:
    # Root may read everything, but not a file whose name is longer than the file system allows.
    link(path, "x" * 300)


def open_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        # The path of a socket is limited to about 100 bytes.
        before = os.getcwd()
        os.chdir(path.parent)
        server.bind(path.name)
        os.chdir(before)


OFFENDERS = {
    "empty file": (lambda path: path.write_bytes(b""), "is empty"),
    "dangling link": (lambda path: link(path, "/nowhere"), "is a link that cannot be followed, to /nowhere "),
    "link to itself": (lambda path: link(path, path.name), "is a link that cannot be followed"),
    "unreadable": (unreadable, "is a link that cannot be followed"),
    "pipe": (os.mkfifo, "is a pipe, not a file"),
    "socket": (open_socket, "is a socket, not a file"),
    "link to a device": (lambda path: link(path, "/dev/zero"), "is a device, not a file"),
    "link to another class": (lambda path: link(path, "../dog/1.jpg"), "is the same as .*dog/1.jpg, which belongs to"),
    "folder of another class": (lambda path: link(path, "../dog"), "is the same as .*dog, which belongs to another"),
    "pointer of Git LFS": (lambda path: path.write_bytes(b"version https://git-lfs"), "is a Git LFS pointer"),
    "web page": (lambda path: path.write_bytes(b"<!DOCTYPE html><html>404"), "is an HTML page"),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFENDERS)
def test_a_file_that_cannot_be_packed_is_named_before_anything_is_written(name, source, tmp_path, caplog):
    make, problem = OFFENDERS[name]
    make(source / "cat" / "bad.jpg")
    expected = rf"1 files or folders cannot be packed; remove(.|\n)*cat/bad\.jpg {problem}"
    with pytest.raises(ValueError, match=expected):
        packed_files(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
    assert packed_files(source, leave_out_bad=True) == OWN
    assert "1 files or folders are left out" in caplog.text and "bad.jpg" in caplog.text


def test_all_offenders_are_counted_and_the_first_twenty_are_listed(source):
    for number in range(25):
        write(source / "dog" / f"empty{number:02}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="25 files or folders cannot be packed") as caught:
        packed_files(source)
    lines = str(caught.value).splitlines()
    assert len(lines) == 22 and lines[20].endswith("empty19.jpg is empty") and lines[21] == "  ... and 5 more"


def test_an_unreadable_folder_or_file_is_named(source, monkeypatch):
    # Tests may run as root, for whom nothing is unreadable.
    original, read = os.scandir, Path.read_bytes

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))

    write(source / "cat" / "locked" / "1.jpg"), write(source / "dog" / "secret.jpg")
    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) or original(path))
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path if path.name != "secret.jpg" else Path("/nowhere")))
    with pytest.raises(ValueError, match="2 files or folders") as caught:
        packed_files(source)
    assert "cat/locked cannot be read (Permission denied)" in str(caught.value)
    assert "dog/secret.jpg cannot be read" in str(caught.value)


def test_a_validation_image_that_is_a_training_image_is_an_offender(tmp_path):
    write(tmp_path / "images" / "train" / "1.jpg"), write(tmp_path / "images" / "val" / "2.jpg")
    link(tmp_path / "images" / "val" / "1.jpg", "../train/1.jpg")
    with pytest.raises(ValueError, match=r"val/1\.jpg is the same as .*train/1\.jpg"):
        packed_files(tmp_path / "images")


def test_a_class_folder_that_is_a_link_to_nothing_is_an_offender(source):
    link(source / "emu", "/nowhere/emu")
    with pytest.raises(ValueError, match=r"emu is a link that cannot be followed, to /nowhere/emu"):
        packed_files(source)


def test_files_with_the_same_stem_or_another_case_become_samples_of_their_own(tmp_path):
    names = ["a.jpg", "a.png", "A.jpg", "a.JPG", "sub/a.jpg", "a.b.jpg", "a::b.jpg", "a/b.jpg"]
    for name in names:
        write(tmp_path / "images" / "cat" / name)
    assert packed_files(tmp_path / "images") == sorted(f"cat/{name}" for name in names)
    keys = open_shards(str(tmp_path / "out")).shards[0].keys
    assert len(set(keys)) == len(names)


def test_names_of_any_bytes_are_packed_and_printed_as_escapes(tmp_path, capsys):
    names = ["line\nbreak.jpg", "\x1b[31m.jpg", os.fsdecode(b"\xff\xfe.jpg"), "\u202egpj.jpg"]
    for name in names:
        write(tmp_path / "images" / f"c\x1b[2J\n{os.fsdecode(bytes([255]))}" / name)
    write(tmp_path / "images" / "empty" / "\x1b[1m.jpg").write_bytes(b"")
    with pytest.raises(SystemExit):
        main(["shards", "pack", str(tmp_path / "images"), str(tmp_path / "out")])
    assert all(line.isprintable() for line in capsys.readouterr().err.splitlines())
    (tmp_path / "images" / "empty" / "\x1b[1m.jpg").unlink()
    main(["shards", "pack", str(tmp_path / "images"), str(tmp_path / "out\x1b[2J")])
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())
    files = {json.loads(sample["json"])["file"] for sample in samples_of(str(tmp_path / "out\x1b[2J"))}
    # Any JSON parser reads them: what is not UTF-8 is written as an escape.
    assert {file.split("/")[1] for file in files} == {names[0], names[1], r"\xff\xfe.jpg", names[3]}
    json.dumps(sorted(files), ensure_ascii=False).encode()


def test_class_folders_that_hold_only_folders_are_warned_of(tmp_path, caplog):
    for name in ("train/cat/1.jpg", "train/dog/1.jpg", "validation/cat/2.jpg"):
        write(tmp_path / "images" / name)
    packed_files(tmp_path / "images")
    assert "2 class folders hold only folders, the first is " in caplog.text
    assert f"{tmp_path}/images/train (cat, dog); if these are the classes, pack " in caplog.text


@pytest.mark.parametrize("destination", ["images", "images/shards", "images/cat/deep/shards"])
def test_a_destination_inside_the_source_is_refused(source, tmp_path, destination):
    with pytest.raises(ValueError, match="must lie outside of the image folder"):
        pack_folder(source, tmp_path / destination)
    assert sorted(path.name for path in source.iterdir()) == ["cat", "dog"]


def test_a_destination_that_no_pattern_can_name_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="must not contain '::'"):
        pack_folder(source, tmp_path / "a::b")


def test_a_full_disk_leaves_nothing_and_the_next_packing_works(source, tmp_path):
    write(source / "cat" / "large.jpg", b"x" * 300_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    with warnings.catch_warnings():
        # The writer of webdataset does not close a file that it cannot finish.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                packed_files(source)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        notes = caught.value.__notes__
        del caught
        gc.collect()
    assert any(f"nothing was written to {tmp_path / 'out'}; free space" in note for note in notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
    assert packed_files(source) == sorted([*OWN, "cat/large.jpg"])


def interrupt_after_two_samples(monkeypatch, action) -> None:
    """Let packing call `action` when it makes the third sample."""
    original = shard_writer.make_sample

    def make_sample(key, *others):
        if key.startswith("00000002"):
            action()
        return original(key, *others)

    monkeypatch.setattr(shard_writer, "make_sample", make_sample)


def test_an_interrupted_packing_leaves_nothing_and_the_next_one_works(source, tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    interrupt_after_two_samples(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        packed_files(source, samples_per_shard=1)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
    assert packed_files(source) == OWN


def test_what_a_killed_packing_leaves_is_not_taken_for_shards_and_the_next_one_removes_it(
    source, tmp_path, monkeypatch
):
    left = tmp_path / ".out.unfinished"
    interrupt_after_two_samples(monkeypatch, lambda: shutil.copytree(left, tmp_path / "copy"))
    packed_files(source, samples_per_shard=1)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "copy").rename(left)
    assert (left / "shards" / "shard-000001.tar").is_file()
    with pytest.raises(FileNotFoundError, match=r"holds no \.tar file"):
        open_shards(str(tmp_path))
    assert packed_files(source) == OWN
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out"]


def test_two_packings_into_one_folder_do_not_disturb_each_other(source, tmp_path, monkeypatch):
    errors = []

    def pack_again():
        with pytest.raises(FileExistsError, match="another process is writing to") as caught:
            pack_folder(source, tmp_path / "out")
        errors.append(caught.value)

    interrupt_after_two_samples(monkeypatch, pack_again)
    assert packed_files(source) == OWN and len(errors) == 1


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b'{"cat": 0}', b"cat\ndog", b"\xff\xfe", b"[" * 100_000])
def test_class_names_that_are_no_list_of_names_are_refused(content, source, tmp_path):
    classes = write(tmp_path / "classes.json")
    classes.write_bytes(content)
    with pytest.raises(ValueError, match=r"classes=.*classes\.json must hold a JSON list of names"):
        packed_files(source, classes=str(classes))


def test_files_that_are_no_images_are_counted_and_the_first_is_named(source, caplog):
    for name in ("cat/a.gif", "cat/b.heic", "dog/notes.txt", "dog/Thumbs.db"):
        write(source / name)
    assert packed_files(source) == OWN
    assert "4 files without the extension of an image are left out, the first is " in caplog.text
