"""Resizing shards: the same samples with smaller images, of which the same views are drawn; nothing is lost."""

import errno
import io
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fixtures.image_matrix import all_files
from fixtures.tar_files import digests, encode, photograph, samples_of
from iwm_fast.cli import main
from iwm_fast.commands.resize_shards import resize
from iwm_fast.pipelines import resize_shards as module
from iwm_fast.pipelines.annotations.segmentation import decode_mask
from iwm_fast.pipelines.config import PackConfig, ResizeConfig
from iwm_fast.pipelines.errors import UndecodableImageError
from iwm_fast.pipelines.image_header import probe
from iwm_fast.pipelines.resize_shards import ResizedShard, resize_shards
from iwm_fast.pipelines.storage import atomic
from iwm_fast.pipelines.storage.shard import index_shard
from iwm_fast.pipelines.storage.shard_set import find_shards
from iwm_fast.pipelines.storage.shard_writer import pack_folder
from iwm_fast.pipelines.transforms import smaller_images
from iwm_fast.pipelines.transforms.image_decoding import decode_image
from iwm_fast.pipelines.transforms.smaller_images import shrink_image, smaller_size
from iwm_fast.pipelines.validate import validate_shard

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

COFFEE = photograph("coffee.png")
LONG_AGO_NS = 1_700_000_000 * 10**9


@pytest.fixture(autouse=True)
def one_process(request, monkeypatch):
    """Work in this process, because another one imports torch first."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})


def picture(size: tuple[int, int], kind: str = "JPEG", **options) -> bytes:
    content = io.BytesIO()
    Image.fromarray(COFFEE).resize(size).save(content, kind, **options)
    return content.getvalue()


def mask_of(size: tuple[int, int], mode: str) -> bytes:
    # Far apart in grey, so that no mean of two of them is rounded to one of them.
    step = 100 if mode == "L" else 1
    indices = (np.add.outer(np.arange(size[1]) // 16, np.arange(size[0]) // 16) % 3 * step).astype(np.uint8)
    mask, content = Image.fromarray(indices), io.BytesIO()
    if mode == "P":
        mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    mask.save(content, "PNG")
    return content.getvalue()


def shard_at(path: Path, members: list[tuple[str, bytes]]) -> str:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))
    return str(path)


def members_of(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}


def resized(paths: list[str], destination: Path, **settings) -> list[ResizedShard]:
    return list(resize_shards(paths, destination, ResizeConfig(**{"shorter": 64} | settings)))


MEMBERS = [
    ("README", b"about"),
    ("__meta__/note.txt", b"meta"),
    ("._a.jpg", b"of macOS"),
    ("deep/a.cls", b"1"),
    ("deep/a.json", b'{"file": "a"}'),
    ("._b.jpg", b"of macOS"),
    ("deep/a.jpg", picture((160, 128))),
    ("small.jpg", picture((64, 80))),
    ("small.txt", b"caption"),
    ("mäp.seg.png", mask_of((160, 128), "P")),
    ("mäp.jpg", picture((160, 128))),
    ("other.jpg", picture((160, 128))),
    ("other.png", picture((160, 128), "PNG")),
    ("x" * 120 + ".jpg", picture((160, 128), "PNG")),
    ("no-image.txt", b"text"),
]


def test_samples_keep_their_names_order_and_other_members(tmp_path):
    source = shard_at(tmp_path / "in" / "t-000.tar", MEMBERS)
    (tmp_path / "in" / "classes.json").write_text('["a", "b"]')
    (report,) = resized([source], tmp_path / "out")
    assert (report.num_resized, report.num_copied, report.left_out) == (4, 1, ())
    before, after = members_of(Path(source)), members_of(tmp_path / "out" / "t-000.tar")
    assert list(after) == list(before)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"deep/a.jpg", "mäp.jpg", "mäp.seg.png", "other.jpg", "x" * 120 + ".jpg"}
    assert {probe(after[name]).upright_size for name in changed} == {(80, 64)}
    indexes = [index_shard(path) for path in (source, str(tmp_path / "out" / "t-000.tar"))]
    assert indexes[0].keys == indexes[1].keys and indexes[0].label.tolist() == indexes[1].label.tolist()
    assert validate_shard(str(tmp_path / "out" / "t-000.tar")).bad == []
    assert (tmp_path / "out" / "classes.json").read_text() == '["a", "b"]'
    assert find_shards(str(tmp_path / "out")) == [str(tmp_path / "out" / "t-000.tar")]


@pytest.mark.parametrize("mode", ["P", "L"])
def test_segmentation_maps_take_the_class_of_the_nearest_pixel(tmp_path, mode):
    source = shard_at(tmp_path / "s.tar", [("a.jpg", picture((150, 100))), ("a.seg.png", mask_of((150, 100), mode))])
    resized([source], tmp_path / "out", shorter=50)
    before, after = (decode_mask(members_of(path)["a.seg.png"]) for path in (Path(source), tmp_path / "out" / "s.tar"))
    assert after.shape == (50, 75)
    assert np.array_equal(after, before[1::2, 1::2])


@pytest.mark.parametrize("container", ["jpeg", "png", "webp", "bmp", "pnm", "tiff"])
def test_what_is_drawn_from_a_smaller_file_is_what_was_drawn_from_the_original(container):
    compared = 0
    for name, content in all_files(container).items():
        try:
            header, original = probe(content), decode_image(content).numpy()
        except UndecodableImageError:
            continue
        size = smaller_size(header.upright_size, min(header.upright_size) // 2)
        if size is None or min(size) < 8:
            continue
        smaller = decode_image(shrink_image(content, header, size, 95)).numpy().astype(int)
        jpeg = io.BytesIO()
        Image.fromarray(original).resize(size, Image.Resampling.BICUBIC).save(jpeg, "JPEG", quality=95)
        # Of 255. A turned picture, or one of another colour model, differs by more than 25.
        assert np.abs(smaller - decode_image(jpeg.getvalue()).numpy()).mean() < 2, name
        compared += 1
    assert compared > 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_decoded_at_a_reduced_size_equals_one_that_is_decoded_completely(orientation):
    # An odd size, so that the reduced image stands for a part of a pixel at its border.
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = picture((1401, 933), quality=90, exif=exif)
    header, size = probe(content), (96, 64) if orientation < 5 else (64, 96)
    assert smaller_size(header.upright_size, 64) == size
    fast = np.asarray(smaller_images._reduced_jpeg(content, header, size)).astype(int)
    plain = np.asarray(Image.fromarray(decode_image(content).numpy()).resize(size, Image.Resampling.BICUBIC))
    assert np.abs(fast - plain).mean() < 0.6 and np.abs(fast - plain).max() <= 12


def test_pictures_without_colours_get_one_channel_and_metadata_are_left_out(tmp_path):
    grey = np.repeat(COFFEE[..., :1], 3, axis=2)
    source = shard_at(tmp_path / "s.tar", [("a.jpg", encode(grey, "PNG")), ("b.jpg", encode(COFFEE))])
    resized([source], tmp_path / "out")
    modes = {name: Image.open(io.BytesIO(content)) for name, content in members_of(tmp_path / "out" / "s.tar").items()}
    assert {name: image.mode for name, image in modes.items()} == {"a.jpg": "L", "b.jpg": "RGB"}
    assert not modes["b.jpg"].getexif() and "icc_profile" not in modes["b.jpg"].info


def test_a_file_with_fewer_bytes_than_its_smaller_version_is_copied(tmp_path):
    source = shard_at(tmp_path / "s.tar", [("a.jpg", picture((70, 70), quality=5))])
    (report,) = resized([source], tmp_path / "out", quality=100)
    assert (report.num_resized, report.num_copied) == (0, 1)
    assert members_of(tmp_path / "out" / "s.tar") == members_of(Path(source))


def test_the_samples_that_the_check_leaves_out_are_left_out(tmp_path, capsys):
    good, mask = picture((160, 128)), mask_of((160, 128), "P")
    members = [("a.cls", b"0"), ("a.jpg", good[:-200]), ("b.jpg", b"<html>"), ("c.jpg", good), ("c.seg.png", mask)]
    members += [("d.jpg", good), ("d.seg.png", mask_of((80, 64), "P")), ("e.seg.png", mask[:99]), ("e.jpg", good)]
    # The header is complete, the pixels are not.
    broken = good[: len(good) // 2] + b"\xff\xd9"
    members += [("f.jpg", broken), ("g.jpg", picture((60, 40))[:500] + b"\xff\xd9")]
    source = shard_at(tmp_path / "in" / "s.tar", members)
    bad = {sample.key: sample.reason for sample in validate_shard(source).bad}
    resize(source, tmp_path / "out", ResizeConfig(shorter=64))
    printed = capsys.readouterr().out
    assert sorted(bad) == ["a", "b", "d", "e", *(key for key in "fg" if key in bad)]
    assert all(f"{source}:{key} {reason}" in printed for key, reason in bad.items())
    left = members_of(tmp_path / "out" / "s.tar")
    assert {name for name, _ in members} - set(left) == {name for name, _ in members if name[0] in bad}


def test_finished_shards_are_not_written_again_unless_their_source_changed(tmp_path, monkeypatch, capsys):
    content = picture((160, 128))
    sources = [shard_at(tmp_path / "in" / f"t-{number}.tar", [("a.jpg", content)]) for number in range(3)]
    shrink, calls = module.shrink_if_larger, []

    def stop_at_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return shrink(*arguments)

    monkeypatch.setattr(module, "shrink_if_larger", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        resized(sources, tmp_path / "out")
    # What a process leaves that is killed.
    (tmp_path / "out" / ".t-2.tar.1-1.draft").write_bytes(b"half")
    assert [report.is_earlier for report in resized(sources, tmp_path / "out")] == [True, True, False]
    assert len(calls) == 4 and sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".resized", "t-0.tar", "t-1.tar", "t-2.tar"
    ]  # fmt: skip
    straight = tmp_path / "straight"
    resized(sources, straight)
    for path in straight.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    # Another time, another content, and a shard that is gone: only these are written.
    os.utime(sources[0])
    shard_at(tmp_path / "in" / "t-1.tar", [("b.jpg", content)])
    os.utime(sources[1], ns=(LONG_AGO_NS + 1, LONG_AGO_NS + 1))
    (tmp_path / "out" / "t-2.tar").unlink()
    assert [report.is_earlier for report in resized(sources, tmp_path / "out")] == [False] * 3
    main(["shards", "resize", str(tmp_path / "in"), str(tmp_path / "out"), "shorter=64"])
    assert "3, 3 of them written before" in capsys.readouterr().out


def test_nothing_is_overwritten(tmp_path, capsys):
    source = shard_at(tmp_path / "in" / "t.tar", [("a.jpg", picture((160, 128)))])
    other = shard_at(tmp_path / "other" / "t.tar", [("a.jpg", picture((160, 128)))])
    named = shard_at(tmp_path / "named" / "u.tar", [("a.jpg", picture((160, 128)))])
    before = digests(tmp_path / "in")
    resized([source], tmp_path / "out")
    (tmp_path / "in" / "classes.json").write_text("[1]")
    (tmp_path / "named" / "classes.json").write_text("[2]")
    refusals = {
        "another one than that of the shards": [source, str(tmp_path / "in")],
        "is not empty, and was not written by `iwm shards resize`; nothing is overwritten": [source, str(tmp_path)],
        r"was written with shorter=64 quality=92 max_pixels=\d+, not shorter=32 quality=92": [
            source, str(tmp_path / "out"), "shorter=32"],
        "must have different names": [f"{source}::{other}", str(tmp_path / "new")],
        "name the classes differently": [f"{source}::{named}", str(tmp_path / "new")],
        "shorter must be between 8 and 65500 pixels, got 4": [source, str(tmp_path / "new"), "shorter=4"],
        "quality must be between 1 and 100, got 0": [source, str(tmp_path / "new"), "quality=0"],
    }  # fmt: skip
    for message, arguments in refusals.items():
        with pytest.raises(SystemExit) as end:
            main(["shards", "resize", *arguments])
        error = capsys.readouterr().err
        assert end.value.code == 2 and re.search(message, " ".join(error.split())), error
    assert {name: digest for name, digest in digests(tmp_path / "in").items() if name != "classes.json"} == before


def test_two_processes_do_not_write_into_one_folder(tmp_path):
    source = shard_at(tmp_path / "in" / "t.tar", [("a.jpg", picture((160, 128)))])
    resized([source], tmp_path / "out")
    with atomic.lock_folder(tmp_path / "out" / ".resized"), pytest.raises(FileExistsError, match="another process"):
        resized([source], tmp_path / "out")


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, capsys):
    sources = [shard_at(tmp_path / "in" / f"t-{n}.tar", [("a.jpg", picture((160, 128)))]) for n in range(2)]
    before, force = digests(tmp_path / "in"), atomic.force_to_disk

    def fail_at_the_second(path):
        if path.name.startswith(".t-1.tar"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        force(path)

    monkeypatch.setattr(atomic, "force_to_disk", fail_at_the_second)
    with pytest.raises(SystemExit) as end:
        main(["shards", "resize", sources[0] + "::" + sources[1], str(tmp_path / "out"), "shorter=64"])
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("error: ") == 1 and "Traceback" not in message
    assert f"{tmp_path}/out/t-1.tar cannot be written: No space left on device; free space there" in message
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".resized", "t-0.tar"]
    assert digests(tmp_path / "in") == before
    monkeypatch.setattr(atomic, "force_to_disk", force)
    assert [report.is_earlier for report in resized(sources, tmp_path / "out")] == [True, False]


def test_shards_that_cannot_be_used_are_named_after_the_others_are_written(tmp_path, capsys):
    good = shard_at(tmp_path / "in" / "a.tar", [("a.jpg", picture((160, 128)))])
    shard_at(tmp_path / "in" / "b.tar", [("notes.txt", b"x")])
    bad = shard_at(tmp_path / "in" / "c.tar", [("a.jpg", b"x"), ("a.cls", b"1")])
    Path(tmp_path / "in" / "d.tar").write_bytes(Path(good).read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"1 of 4 shards cannot be used:\n.*d\.tar: is cut off"):
        resize(str(tmp_path / "in"), tmp_path / "out", ResizeConfig(shorter=64))
    printed = " ".join(capsys.readouterr().out.split())
    assert "b.tar: holds no image" in printed and f"{bad}: none of its 1 samples can be decoded" in printed
    assert sorted(path.name for path in (tmp_path / "out").glob("*")) == [".resized", "a.tar"]


def test_a_shard_that_has_become_unusable_is_removed_from_the_destination(tmp_path):
    source, output = tmp_path / "in" / "0.tar", tmp_path / "out" / "0.tar"
    shard_at(source, [("a.jpg", picture((80, 80)))])
    (report,) = resized([str(source)], output.parent)
    assert not report.refusal and output.exists()
    shard_at(source, [("a.txt", b"no image")])
    os.utime(source, ns=(LONG_AGO_NS + 1, LONG_AGO_NS + 1))
    (report,) = resized([str(source)], output.parent)
    assert report.refusal and not output.exists() and not (output.parent / ".resized" / "0.tar.json").exists()


def test_data_image_chooses_which_image_becomes_smaller(tmp_path):
    content = picture((160, 128))
    source = shard_at(tmp_path / "s.tar", [("a.left.jpg", content), ("a.right.jpg", content), ("a.cls", b"1")])
    resized([source], tmp_path / "out", image="left.jpg")
    after = members_of(tmp_path / "out" / "s.tar")
    assert probe(after["a.left.jpg"]).upright_size == (80, 64) and after["a.right.jpg"] == content


def test_packing_with_a_shorter_side_writes_smaller_jpegs(tmp_path, caplog):
    source = tmp_path / "images"
    for label in ("x", "y"):
        (source / label).mkdir(parents=True)
    (source / "x" / "large.png").write_bytes(picture((160, 128), "PNG"))
    (source / "x" / "small.png").write_bytes(picture((60, 40), "PNG"))
    (source / "y" / "large.jpg").write_bytes(picture((160, 128)))
    (packed,) = pack_folder(source, tmp_path / "out", PackConfig(shorter=64))
    images = {}
    for sample in samples_of(str(tmp_path / "out")):
        (extension,) = set(sample) & {"jpg", "png"}
        images[json.loads(sample["json"])["file"]] = extension, probe(sample[extension]).upright_size
    assert images == {
        "x/large.png": ("jpg", (80, 64)), "x/small.png": ("png", (60, 40)), "y/large.jpg": ("jpg", (80, 64))
    }  # fmt: skip
    assert (source / "x" / "small.png").read_bytes() in members_of(packed.shards[0]).values()
    assert (packed.num_images, packed.num_classes) == (3, 2)
    broken = picture((160, 128), "PNG")
    (source / "y" / "broken.png").write_bytes(broken[:200] + bytes(300) + broken[500:])
    with pytest.raises(ValueError, match=r"broken\.png .*cannot be decoded.*leave_out_bad=true"):
        pack_folder(source, tmp_path / "bad", PackConfig(shorter=64))
    assert not (tmp_path / "bad").exists()
    (packed,) = pack_folder(source, tmp_path / "bad", PackConfig(shorter=64, leave_out_bad=True))
    assert packed.num_images == 3 and "broken.png" in caplog.text
    with pytest.raises(ValueError, match="quality must be unset without shorter="):
        PackConfig(quality=80)


@pytest.mark.slow
def test_processes_write_the_same_bytes_as_one(tmp_path):
    sources = [shard_at(tmp_path / "in" / f"t-{n}.tar", MEMBERS) for n in range(3)]
    resized(sources, tmp_path / "one")
    list(resize_shards(sources, tmp_path / "two", ResizeConfig(shorter=64), num_processes=2))
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.tar")} == {
        path.name: path.read_bytes() for path in (tmp_path / "two").glob("*.tar")
    }
    (tmp_path / "images").mkdir()
    for number in range(250):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(picture((100 + number, 80)))
    pack_folder(tmp_path / "images", tmp_path / "packed", PackConfig(shorter=64))
    os.sched_setaffinity(0, {min(cores := os.sched_getaffinity(0))})
    try:
        pack_folder(tmp_path / "images", tmp_path / "alone", PackConfig(shorter=64))
    finally:
        os.sched_setaffinity(0, cores)
    assert digests(tmp_path / "packed") == digests(tmp_path / "alone")
