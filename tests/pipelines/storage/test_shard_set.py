"""Finding shards, grouping members into samples, and the properties of a set of shards."""

from pathlib import Path

import numpy as np
import pytest

from fixtures.tar_files import write_tar
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.shard import index_shard, parse_member_name
from iwm_fast.pipelines.storage.shard_set import find_shards, open_shards
from iwm_fast.pipelines.storage.tar_reader import ShardFile

JPEG = b"\xff\xd8 some bytes that look like an image"


def shard_at(path: Path, members: dict[str, bytes]) -> Path:
    write_tar(path, list(members.items()))
    return path


def images_of(path: Path) -> dict[str, bytes]:
    shard, content = index_shard(str(path)), path.read_bytes()
    spans = zip(shard.keys, shard.image_offset, shard.image_size, strict=True)
    return {key: content[offset : offset + size] for key, offset, size in spans}


def test_labels_and_json_members_are_found(tmp_path):
    first = {"first.cls": b"7", "first.jpg": JPEG, "first.json": b'{"a": 1}'}
    second = {"second.cls": b"12\n", "second.jpg": JPEG, "second.json": b"{}"}
    path = shard_at(tmp_path / "s.tar", first | second | {"third.jpg": b"x"})
    shard = index_shard(str(path))
    assert shard.label.tolist() == [7, 12, -1]
    assert shard.json_size.tolist() == [8, 2, 0]
    with ShardFile(str(path)) as file:
        assert file.read_at(int(shard.json_offset[0]), 8) == b'{"a": 1}'
    assert shard.size_bytes == path.stat().st_size


def test_masks_are_found_and_a_png_is_the_image_if_there_is_no_other(tmp_path):
    members = {
        "a.jpg": JPEG, "a.seg.png": b"map of a", "b.png": b"map of b", "b.webp": JPEG, "c.png": JPEG, "d.tif": JPEG,
        "e.seg.png": b"map of e", "e.png": JPEG, "f.PNG": b"other", "f.Seg.Png": b"map of f", "f.jpeg": JPEG,
    }  # fmt: skip
    path = shard_at(tmp_path / "s.tar", members)
    assert images_of(path) == dict.fromkeys("abcdef", JPEG)
    shard, content = index_shard(str(path)), path.read_bytes()
    spans = zip(shard.keys, shard.mask_offset.tolist(), shard.mask_size.tolist(), strict=True)
    maps = {key: content[offset : offset + size].decode() for key, offset, size in spans if offset}
    assert maps == {key: f"map of {key}" for key in "abef"}
    assert [shard.mask_size[position] for position in (2, 3)] == [0, 0]


def test_extensions_begin_at_the_first_dot_of_the_name_in_any_case(tmp_path):
    assert parse_member_name("v1.0/a.seg.PNG") == ("v1.0/a", "seg.png")
    members = {"a.seg.png": b"mask", "a.JPG": JPEG, "b.jpg.bak": b"no", "b.Png": b"png"}
    assert images_of(shard_at(tmp_path / "s.tar", members)) == {"a": JPEG, "b": b"png"}


def test_of_several_images_the_first_accepted_extension_is_used(tmp_path):
    path = shard_at(tmp_path / "s.tar", {"a.tif": b"tif", "a.jpeg": b"jpeg", "b.bmp": b"bmp", "b.webp": b"webp"})
    assert images_of(path) == {"a": b"jpeg", "b": b"webp"}


def test_samples_without_an_image_are_not_counted(tmp_path):
    path = shard_at(tmp_path / "s.tar", {"info.json": b"{}", "a.jpg": JPEG, "b.cls": b"3"})
    assert index_shard(str(path)).keys == ("a",)


UNUSABLE = {
    "key occurs twice": ({"a.jpg": JPEG, "b.jpg": JPEG, "a.cls": b"1"}, "a", "occurs twice.*--sort=name"),
    "member occurs twice": ({"a.jpg": JPEG, "a.JPG": JPEG}, "a", "two members with extension 'jpg'"),
    "no image": ({"a.txt": b"x", "a.jp2": b"x"}, "", r"the extensions of its members are \['jp2', 'txt'\]"),
}


@pytest.mark.parametrize("defect", UNUSABLE)
def test_an_unusable_sample_is_refused_with_shard_and_key(tmp_path, defect):
    members, key, message = UNUSABLE[defect]
    path = shard_at(tmp_path / "s.tar", members)
    with pytest.raises(ShardError, match=message) as caught:
        index_shard(str(path))
    assert (caught.value.shard, caught.value.key) == (str(path), key)


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(3):
        prefix = f"{number}/"
        shard_at(tmp_path / f"s-{number:03d}.tar", {f"{prefix}a.jpg": b"x" * (number + 1), f"{prefix}a.cls": b"0"})
    (tmp_path / "notes.txt").write_text("no shard")
    (tmp_path / "._s-000.tar").write_text("written by macOS")
    return tmp_path


def test_files_folders_braces_globs_and_lists_name_the_same_shards(folder):
    paths = [str(folder / f"s-{number:03d}.tar") for number in range(3)]
    specs = ["::".join(paths), f"{folder}", f"{folder}/s-{{000..002}}.tar", f"{folder}/s-*.tar", f"{folder}/s-00?.tar"]
    assert [find_shards(spec) for spec in specs] == [paths] * 5
    assert find_shards(f"{paths[2]}::{folder}/s-{{000..001}}.tar") == [paths[2], *paths[:2]]


def test_an_existing_path_is_taken_literally(tmp_path):
    special = tmp_path / "set {1,2} [a]"
    special.mkdir()
    path = shard_at(special / "s*.tar", {"a.jpg": JPEG})
    assert find_shards(str(path)) == [str(path)] == find_shards(str(special))
    brackets = tmp_path / "set [a]"
    brackets.mkdir()
    path = shard_at(brackets / "s.tar", {"a.jpg": JPEG})
    assert find_shards(f"{brackets}/?.tar") == [str(path)]


BAD_SPECS = {
    "": (ValueError, "must name files"),
    "{folder}/s-000.tar::": (ValueError, "must name files"),
    "{folder}/s-{{000..004}}.tar": (FileNotFoundError, r"2 of 5 names do not exist, the first is .*s-003\.tar"),
    "{folder}/x-*.tar": (FileNotFoundError, r"no shards match '.*x-"),
    "{folder}/s-{{000.tar": (ValueError, "Unbalanced braces"),
    "{folder}/s-000.tar::{folder}": (ValueError, r"1 shards twice, the first is .*s-000\.tar"),
    "{folder}/empty": (FileNotFoundError, r"empty holds no \.tar file"),
    "file://{folder}/empty": (FileNotFoundError, r"empty holds no \.tar file"),
    "file://{folder}/none.tar": (FileNotFoundError, "no shards match 'file:"),
}


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_a_pattern_that_names_nothing_or_a_shard_twice_is_refused(folder, spec):
    (folder / "empty").mkdir()
    error, message = BAD_SPECS[spec]
    with pytest.raises(error, match=message):
        find_shards(spec.format(folder=folder))


def test_remote_addresses_give_the_same_samples_as_local_paths(folder):
    local = open_shards(str(folder))
    for spec in (f"file://{folder}", f"file://{folder}/s-{{000..002}}.tar"):
        remote = open_shards(spec)
        assert [shard.path for shard in remote.shards] == [f"file://{shard.path}" for shard in local.shards]
        assert remote.content_digest == local.content_digest
        with ShardFile(remote.shards[2].path) as file:
            assert file.read_at(int(remote.shards[2].image_offset[0]), 3) == b"xxx"
            assert file.size_bytes == local.shards[2].size_bytes


@pytest.fixture
def numbered(tmp_path) -> Path:
    """Shards of 2, 3 and 1 samples; the last one has no label."""
    for shard, keys in enumerate(["ab", "cde", "a"]):
        members = {}
        for key in keys:
            members |= {f"{key}.jpg": key.encode() * 9} | ({f"{key}.cls": b"%d" % ord(key)} if shard < 2 else {})
        shard_at(tmp_path / f"{shard}.tar", members)
    return tmp_path


def test_samples_are_numbered_across_shards(numbered):
    shards = open_shards(str(numbered), num_threads=2)
    assert shards.num_samples == 6
    assert shards.shard_bounds.tolist() == [0, 2, 5, 6]
    shard, position = shards.locate(np.array([5, 0, 1, 2, 4]))
    assert (shard.tolist(), position.tolist()) == ([2, 0, 0, 1, 1], [0, 0, 1, 0, 2])
    assert [shards.key(sample) for sample in range(6)] == ["a", "b", "c", "d", "e", "a"]
    assert shards.address(4) == f"{numbered}/1.tar:e"
    assert shards.labels(np.array([3, 5, 0])).tolist() == [ord("d"), -1, ord("a")]


@pytest.mark.parametrize("sample", [-1, 6])
def test_a_sample_number_outside_the_set_is_refused(numbered, sample):
    with pytest.raises(IndexError, match=rf"0 \.\. 5, got {sample}"):
        open_shards(str(numbered)).locate(np.array([0, sample]))


def test_a_missing_label_is_reported_with_shard_and_key(numbered):
    with pytest.raises(ShardError, match="which the linear probe needs") as caught:
        open_shards(str(numbered)).require_labels("the linear probe")
    assert (caught.value.shard, caught.value.key) == (f"{numbered}/2.tar", "a")
    open_shards(f"{numbered}/{{0,1}}.tar").require_labels("the linear probe")


@pytest.mark.parametrize("count", range(1, 49))
def test_a_truncated_set_holds_the_first_samples(tiny_shards, count):
    complete = open_shards(tiny_shards.pattern)
    first = complete.truncated(count)
    assert first.num_samples == count
    assert [first.address(sample) for sample in range(count)] == [complete.address(sample) for sample in range(count)]
    assert first.labels(np.arange(count)).tolist() == complete.labels(np.arange(count)).tolist()
    assert all(len(shard.keys) == len(shard.image_offset) == len(shard.json_size) > 0 for shard in first.shards)
    assert (first.content_digest == complete.content_digest) == (count == 48)


@pytest.mark.parametrize("count", [0, -1, 49])
def test_a_set_cannot_be_truncated_to_no_samples_or_to_more_than_it_has(tiny_shards, count):
    with pytest.raises(ValueError, match=rf"num_samples must be in 1 \.\. 48, got {count}"):
        open_shards(tiny_shards.pattern).truncated(count)


def test_the_digest_depends_on_content_and_order_but_not_on_paths(tmp_path):
    def digest(name: str, *shards: dict[str, bytes]) -> str:
        (tmp_path / name).mkdir()
        for number, members in enumerate(shards):
            shard_at(tmp_path / name / f"{number}.tar", members)
        return open_shards(str(tmp_path / name)).content_digest

    a, b = {"a.jpg": b"11", "a.cls": b"0"}, {"b.jpg": b"222"}
    original = digest("original", a, b)
    assert digest("copy", a, b) == original
    changed = {
        "other order": (b, a),
        "one shard": (a | b,),
        "other key": ({"c.jpg": b"11", "c.cls": b"0"}, b),
        "other size": ({"a.jpg": b"111", "a.cls": b"0"}, b),
        "other label": ({"a.jpg": b"11", "a.cls": b"1"}, b),
        "more": (a, b, {"d.jpg": b"4"}),
    }
    digests = {digest(name, *shards) for name, shards in changed.items()}
    assert len(digests | {original}) == 1 + len(changed)
