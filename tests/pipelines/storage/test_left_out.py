"""What a shard holds beside its samples: counted and named once, whether it is opened or checked."""

import logging
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fixtures.tar_files import encode, write_tar
from iwm_fast.cli import main
from iwm_fast.pipelines.annotations.labels import read_labels
from iwm_fast.pipelines.errors import EmptyShardError, ShardError
from iwm_fast.pipelines.storage.shard import index_shard
from iwm_fast.pipelines.storage.shard_set import open_shards

LONG_AGO_NS = 1_700_000_000 * 10**9
JPEG = encode(np.zeros((8, 8, 3), np.uint8))
LEFT, RIGHT = (encode(np.full((8, size, 3), 90, np.uint8)) for size in (8, 9))


def shard_at(path: Path, members: list[tuple[str, bytes]], links: dict[str, bytes] = {}) -> str:  # noqa: B006
    """Write members, and then links or special files by name and type, in a shard that is old enough to be cached."""
    write_tar(path, members)
    with tarfile.open(path, "a") as archive:
        for name, kind in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, members[0][0]
            archive.addfile(info)
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))
    return str(path)


def warnings_on_opening(caplog, spec: str, image: str = "") -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        open_shards(spec, image)
    return [record.getMessage() for record in caplog.records]


# Name -> members, links by type, and the line about what is not used.
UNUSED = {
    "second extension": ([("a.jpg", JPEG), ("b.v2.jpg", JPEG), ("c.x.y.PNG", JPEG)], {},
                         "2 members have an extension that is not read, the first is b.v2.jpg"),
    "thumbnail": ([("a.jpg", JPEG), ("a.thumb.webp", JPEG)], {},
                  "1 member has an extension that is not read, the first is a.thumb.webp"),
    "label of another name": ([("a.jpg", JPEG), ("a.label.cls", b"1")], {},
                              "1 member has an extension that is not read, the first is a.label.cls"),
    "failed downloads": ([("a.jpg", JPEG), *((f"{key}.{end}", b"{}") for key in "bcd" for end in ("json", "txt"))], {},
                         "3 keys have no image, the first is b.json"),
    "formats that are not read": ([("a.jpg", JPEG), ("b.heic", b"x"), ("b.cls", b"1"), ("c.mp4", b"x")], {},
                                  "2 keys have no image, the first is b.heic"),
    "hard links": ([("a.jpg", JPEG)], {"b.jpg": tarfile.LNKTYPE, "c.jpg": tarfile.LNKTYPE},
                   "2 links and special files are not followed, the first is b.jpg"),
    "symbolic link": ([("a.jpg", JPEG)], {"b.jpg": tarfile.SYMTYPE},
                      "1 link or special file is not followed, the first is b.jpg"),
    "pipe": ([("a.jpg", JPEG)], {"b.jpg": tarfile.FIFOTYPE},
             "1 link or special file is not followed, the first is b.jpg"),
    "two images": ([("a.tif", JPEG), ("a.jpg", JPEG)], {},
                   "1 image is a further one of its sample, the first is a.tif"),
    "no extension": ([("a.jpg", JPEG), ("train/0001", JPEG)], {},
                     "1 file has no extension, the first is train/0001"),
    "hidden files": ([("x/._a.jpg", b"x"), ("a.jpg", JPEG), (".b.jpg", JPEG)], {},
                     "2 hidden files are not read, the first is x/._a.jpg"),
    "labels": ([("a.jpg", JPEG), ("a.cls", b"tabby cat"), ("b.jpg", JPEG), ("b.cls", b"-1")], {},
               "2 .cls members hold no class number, the first is a.cls (b'tabby cat')"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSED)
def test_what_no_sample_uses_is_counted_and_named_on_opening_and_in_the_check(name, tmp_path, caplog, capsys):
    members, links, line = UNUSED[name]
    path = shard_at(tmp_path / "s.tar", members, links)
    expected = [f"{path}: {line} in {path}"]
    # The second time, the counts come from the stored index.
    assert warnings_on_opening(caplog, path) == expected
    assert Path(f"{path}.index").is_file()
    assert warnings_on_opening(caplog, path) == expected
    main(["shards", "check", path])
    assert f"{line} in {path}\n" in capsys.readouterr().out
    assert warnings_on_opening(caplog, path) == expected


def test_a_complete_sample_is_opened_without_a_word(tmp_path, caplog):
    members = [("__meta__", b"x"), ("a.jpg", JPEG), ("a.seg.png", b"map"), ("a.cls", b"7"), ("a.json", b"{}"),
               ("a.txt", b"a caption"), ("b.png", JPEG), ("c.jpeg", JPEG), ("c.png", b"map")]  # fmt: skip
    path = shard_at(tmp_path / "s.tar", members, {"folder": tarfile.DIRTYPE})
    assert warnings_on_opening(caplog, path) == []


def test_several_shards_and_kinds_are_named_in_one_message(tmp_path, caplog):
    for number in range(3):
        shard_at(tmp_path / f"{number}.tar", [("a.jpg", JPEG), ("b.v2.jpg", JPEG), ("c.json", b"{}")])
    (message,) = warnings_on_opening(caplog, str(tmp_path))
    first = tmp_path / "0.tar"
    assert message.splitlines()[1:] == [
        f"  3 members have an extension that is not read, the first is b.v2.jpg in {first}",
        f"  3 keys have no image, the first is c.json in {first}",
    ]


def test_an_index_of_an_earlier_format_is_rebuilt_with_the_counts(tmp_path, caplog, monkeypatch):
    path = shard_at(tmp_path / "s.tar", [("a.jpg", JPEG), ("b.v2.jpg", JPEG)])
    monkeypatch.setattr("iwm_fast.pipelines.storage.index_cache.FORMAT", 2)
    open_shards(path)
    monkeypatch.undo()
    assert len(warnings_on_opening(caplog, path)) == 1


EMPTY = {
    "failed downloads": lambda path: shard_at(path, [("a.json", b"{}"), ("a.txt", b"x")]),
    "only zeros": lambda path: path.write_bytes(bytes(10240)),
    "0 bytes": lambda path: path.write_bytes(b""),
    "only links": lambda path: shard_at(path, [("a", b"")], {"b.jpg": tarfile.LNKTYPE}),
    "other images": lambda path: shard_at(path, [("a.left.jpg", JPEG)]),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_shard_without_images_is_left_out_with_a_warning_if_others_hold_images(name, tmp_path, caplog, capsys):
    shard_at(tmp_path / "a.tar", [("a.jpg", JPEG), ("b.jpg", JPEG)])
    empty = tmp_path / "b.tar"
    EMPTY[name](empty)
    (message,) = warnings_on_opening(caplog, str(tmp_path))
    assert f"1 of 2 shards are left out because they hold no image: {empty}: " in message
    shards = open_shards(str(tmp_path))
    assert [shard.path for shard in shards.shards] == [str(tmp_path / "a.tar")] and shards.num_samples == 2
    main(["shards", "check", str(tmp_path)])
    assert f"{empty}: " in capsys.readouterr().out
    with pytest.raises(EmptyShardError):
        open_shards(str(empty))
    with pytest.raises(SystemExit):
        main(["shards", "check", str(empty)])
    assert "1 of 1 shards cannot be used" in capsys.readouterr().err


def test_shards_that_are_all_empty_or_missing_are_refused(tmp_path):
    for number in range(2):
        EMPTY["failed downloads"](tmp_path / f"{number}.tar")
    with pytest.raises(EmptyShardError, match=r"0\.tar: holds no image: the extensions of its members are \['json"):
        open_shards(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="1 of 3 names do not exist"):
        open_shards(f"{tmp_path}/{{0..2}}.tar")


def test_a_shard_whose_images_are_all_bad_is_left_out_after_the_check(tmp_path, caplog, capsys):
    shard_at(tmp_path / "a.tar", [("a.jpg", JPEG)])
    bad = shard_at(tmp_path / "b.tar", [("a.jpg", b"no image"), ("b.jpg", JPEG[:50])])
    assert open_shards(str(tmp_path)).num_samples == 3
    with pytest.raises(SystemExit):
        main(["shards", "check", str(tmp_path)])
    assert "none of its 2 samples can be decoded, so that runs leave it out" in capsys.readouterr().err
    (message,) = warnings_on_opening(caplog, str(tmp_path))
    assert f"{bad}: none of its 2 samples could be decoded" in message
    assert open_shards(str(tmp_path)).num_samples == 1


NOT_CLASS_NUMBERS = [
    *(b"tabby cat", b"n01440764", b"-1", b"3.0", b"", b"1e3", b"[1, 2]", b"\xd9\xa3"),
    *(b"9" * 20, b"0" * 40, b"3" + b" " * 40 + b"x"),
]


@pytest.mark.parametrize("label", NOT_CLASS_NUMBERS)
def test_a_label_that_is_no_class_number_is_unknown_until_it_is_needed(label, tmp_path):
    path = shard_at(tmp_path / "s.tar", [("a.jpg", JPEG), ("a.cls", b"5"), ("b.cls", label), ("b.jpg", JPEG)])
    shards = open_shards(path)
    assert shards.labels(np.arange(2)).tolist() == [5, -1]
    with pytest.raises(ShardError, match=r"must hold an integer >= 0 in digits, got") as caught:
        read_labels(shards, "cls")
    assert (caught.value.shard, caught.value.key) == (path, "b")
    assert repr(label[:33]) in str(caught.value) and "set data.label=json.NAME" in str(caught.value)


TWO_IMAGES = [
    (f"{key}.{name}", content) for key in "ab" for name, content in (("left.jpg", LEFT), ("right.JPG", RIGHT))
]


def test_a_setting_chooses_one_of_several_images(tmp_path, caplog, capsys):
    path = shard_at(tmp_path / "s.tar", [*TWO_IMAGES, ("c.jpg", JPEG)])
    complete = Path(path).read_bytes()
    for image, expected in (("left.jpg", LEFT), ("Right.jpg", RIGHT)):
        assert warnings_on_opening(caplog, path, image) == [f"{path}: 1 key has no image, the first is c.jpg in {path}"]
        (shard,) = open_shards(path, image).shards
        assert shard.keys == ("a", "b")
        for offset, size in zip(shard.image_offset, shard.image_size, strict=True):
            assert complete[offset : offset + size] == expected
    assert open_shards(path).shards[0].keys == ("c",) == open_shards(path, "jpg").shards[0].keys


def test_without_the_setting_the_message_names_it(tmp_path):
    path = shard_at(tmp_path / "s.tar", TWO_IMAGES)
    with pytest.raises(EmptyShardError, match=r"\['left.jpg', 'right.jpg'\].*set data\.image=left\.jpg to read"):
        open_shards(path)
    with pytest.raises(EmptyShardError, match=r"data\.image=image\.jpg reads only members of this extension"):
        open_shards(path, "image.jpg")


def test_the_check_of_one_choice_leaves_the_others_alone(tmp_path, capsys):
    bad_left = [("a.left.jpg", LEFT), ("a.right.jpg", RIGHT), ("b.left.jpg", b"bad"), ("b.right.jpg", RIGHT)]
    path = shard_at(tmp_path / "s.tar", bad_left)
    main(["shards", "check", path, "image=left.jpg"])
    assert [open_shards(path, image).num_samples for image in ("left.jpg", "right.jpg")] == [1, 2]


@pytest.mark.parametrize("image", ["left", ".left.jpg", "a/left.jpg", "left.gif", "."])
def test_a_choice_that_is_no_extension_is_refused(image, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["shards", "check", str(tmp_path), f"image={image}"])
    assert "image must be unset or what follows the first dot of a name, such as left.jpg" in capsys.readouterr().err


def test_names_that_control_a_terminal_are_printed_as_escapes(tmp_path, caplog, capsys):
    names = ["\x1b[31mred\x1b]0;title\x07", "line\nbreak", "\u202egnp", "\x9b2J", os.fsdecode(b"\xff\xfe"), "tab\t"]
    path = shard_at(tmp_path / "s\x1b[2J.tar", [("good.jpg", JPEG), *((f"{name}.jpg", b"") for name in names)])
    shards = open_shards(path)
    addresses = [shards.address(sample) for sample in range(shards.num_samples)]
    assert all(address.isprintable() for address in addresses) and len(set(addresses)) == 1 + len(names)
    errors = [str(ShardError("cannot be read", **shards.shard_and_key(sample))) for sample in range(1 + len(names))]
    main(["shards", "check", path])
    output = capsys.readouterr().out
    for text in (*errors, *output.splitlines(), *warnings_on_opening(caplog, path)):
        assert text.isprintable(), text
    assert r"\x1b[31mred\x1b]0;title\x07 has 0 bytes" in output and r"line\nbreak has 0 bytes" in output


FOREIGN = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n": "Git LFS pointer.*run `git lfs pull`",
    b"/annex/objects/SHA256E-s1234--4d7a.tar\n": "git-annex pointer.*git annex get",
    b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>": "HTML page.*download it again",
    b"<HTML><title>502 Bad Gateway</title></HTML>": "HTML page",
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code><Message>x</Message></Error>':
        r"is XML, .* object store \(AccessDenied\); download",
    b"\xef\xbb\xbf<Error><Code>NoSuchKey</Code></Error>": r"\(NoSuchKey\)",
    b'{ "error": {"code": 404}}': "is JSON.*error message of a server",
    b"\x1f\x8b\x08\x00": "compressed with gzip.*decompress it",
    b"BZh91AY&SY": "compressed with bzip2",
    b"\xfd7zXZ\x00": "compressed with xz",
    b"\x28\xb5\x2f\xfd\x04": "compressed with zstd",
    b"PK\x03\x04\x14\x00": "zip archive.*iwm shards pack",
    b"PAR1\x15\x04": "Parquet file",
    b"\xff\xd8\xff\xe0\x00\x10JFIF": "JPEG image",
}  # fmt: skip


@pytest.mark.parametrize("start", FOREIGN)
@pytest.mark.parametrize("size", [0, 4096])
def test_files_that_are_no_archive_are_recognised(start, size, tmp_path):
    path = tmp_path / "s.tar"
    path.write_bytes(start.ljust(size, b"x"))
    with pytest.raises(ShardError, match=FOREIGN[start]) as caught:
        index_shard(str(path))
    assert caught.value.shard == str(path)


@pytest.mark.parametrize("name", ["PAR1.jpg", "BZh.jpg", '{"a.jpg', "<html.jpg", "PK\x03\x04.jpg"])
def test_the_name_of_a_first_member_is_not_taken_for_another_format(name, tmp_path):
    assert index_shard(shard_at(tmp_path / "s.tar", [(name, JPEG)])).keys == (name.removesuffix(".jpg"),)


NO_FILES = {
    "git-annex": (lambda path: path.symlink_to("../.git/annex/objects/1"), "is a link to .*; run `git annex get`"),
    "dangling link": (lambda path: path.symlink_to("nowhere.tar"), r"is a link to nowhere\.tar, where no file is"),
    "folder": (lambda path: path.mkdir(), "is a folder or a special file"),
    "pipe": (os.mkfifo, "is a folder or a special file"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_among_shards_is_named(name, tmp_path):
    shard_at(tmp_path / "a.tar", [("a.jpg", JPEG)])
    make, message = NO_FILES[name]
    make(tmp_path / "b.tar")
    with pytest.raises(FileNotFoundError, match=rf"shard .*b\.tar {message}"):
        open_shards(str(tmp_path))
