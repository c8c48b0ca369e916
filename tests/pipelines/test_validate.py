"""Checking shards: bad samples are found, named and no longer drawn, and no good sample is lost."""

import io
import logging
import os

import numpy as np
import pytest
from PIL import Image

from fixtures.tar_files import write_tar
from iwm_fast.cli import main
from iwm_fast.pipelines.storage.shard import index_shard
from iwm_fast.pipelines.storage.shard_set import find_shards, open_shards
from iwm_fast.pipelines.validate import validate_shards

LONG_AGO_NS = 1_700_000_000 * 10**9


def picture(kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (12, 8)) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(content, kind)
    return content.getvalue()


BAD = {
    "cut": picture(size=(60, 60))[:900],
    "page": b"<!DOCTYPE html><html>not found</html>",
    "noise": bytes(range(256)),
    "movie": picture("GIF"),
    "header": picture()[:20],
    "nothing": b"",
}
GOOD = {
    "plain": picture(size=(20, 30)),
    "print": picture(mode="CMYK"),
    "gray": picture(mode="L"),
    "other": picture("PNG", "RGBA"),
    "web": picture("WEBP"),
    "more": picture(),
}


def shard_at(path, images: dict[str, bytes], *, labelled=True) -> str:
    members = []
    for key, image in images.items():
        members += [(f"{key}.jpg", image), *([(f"{key}.cls", b"1")] if labelled else [])]
    write_tar(path, members)
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))
    return str(path)


@pytest.fixture
def mixed(tmp_path) -> str:
    """Write a shard of alternating good and bad samples."""
    pairs = zip(GOOD.items(), BAD.items(), strict=True)
    return shard_at(tmp_path / "mixed.tar", dict(item for pair in pairs for item in pair))


def test_all_bad_images_are_reported_and_all_good_ones_counted(mixed):
    (report,) = validate_shards([mixed])
    assert {bad.key for bad in report.bad} == set(BAD)
    reasons = {bad.key: bad.reason for bad in report.bad}
    assert "is GIF; accepted formats are JPEG" in reasons["movie"] and "truncated" in reasons["cut"]
    assert reasons["page"] == "is not an image, it begins with b'<!DOCTYPE html><'"
    assert reasons["nothing"] == "has 0 bytes"
    assert report.formats == {"JPEG": 4, "PNG": 1, "WEBP": 1}
    assert sorted(report.sizes) == sorted([(20, 30), *[(12, 8)] * 5])
    assert not report.refusal


def test_bad_samples_are_not_drawn_until_the_shard_changes(mixed, tmp_path, caplog):
    list(validate_shards([mixed]))
    with caplog.at_level(logging.WARNING):
        shards = open_shards(mixed)
    assert shards.shards[0].keys == tuple(GOOD)
    assert "6 samples are left out" in caplog.text
    complete = index_shard(mixed)
    for position, key in enumerate(shards.shards[0].keys):
        assert shards.shards[0].image_offset[position] == complete.image_offset[complete.keys.index(key)]
    shard_at(tmp_path / "mixed.tar", BAD | {"x" * 90: picture(size=(200, 200))})
    assert len(open_shards(mixed).shards[0].keys) == len(BAD) + 1


def test_a_second_check_gives_the_same_report(mixed):
    first, second = (list(validate_shards([mixed])) for _ in range(2))
    assert first == second


def test_the_bad_samples_of_a_shard_written_just_now_are_left_out(tmp_path):
    path = shard_at(tmp_path / "new.tar", GOOD | BAD)
    os.utime(path)
    list(validate_shards([path]))
    assert set(open_shards(path).shards[0].keys) == set(GOOD)


def test_bad_samples_that_cannot_be_left_out_are_an_error(mixed, tmp_path, monkeypatch, capsys):
    # The index can be written neither next to the shard nor in the cache.
    (tmp_path / "mixed.tar.index").mkdir()
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("IWM_CACHE", str(tmp_path / "file"))
    with pytest.raises(SystemExit):
        main(["shards", "check", mixed])
    output = capsys.readouterr()
    assert "6 samples cannot be decoded and would still be drawn" in output.err and "IWM_CACHE" in output.err
    assert "will not be drawn" not in output.out


def test_several_processes_give_the_same_reports_as_one(mixed, tmp_path):
    shard_at(tmp_path / "more.tar", GOOD, labelled=False)
    serial, parallel = (list(validate_shards(find_shards(str(tmp_path)), number)) for number in (1, 2))
    assert serial == parallel
    assert [report.num_unlabelled for report in serial] == [0, len(GOOD)]


def test_unusable_shards_are_named_and_the_others_still_checked(mixed, tmp_path, capsys):
    shard_at(tmp_path / "all_bad.tar", BAD)
    (tmp_path / "truncated.tar").write_bytes((tmp_path / "mixed.tar").read_bytes()[:3000])
    refused = {
        report.path: report.refusal for report in validate_shards(find_shards(str(tmp_path)), 1) if report.refusal
    }
    assert {os.path.basename(path) for path in refused} == {"all_bad.tar", "truncated.tar"}
    with pytest.raises(SystemExit) as exit_info:
        main(["shards", "check", str(tmp_path)])
    output = capsys.readouterr()
    assert exit_info.value.code == 2
    assert "2 of 3 shards cannot be used" in output.err
    assert "mixed.tar:page is not an image" in output.out


def test_the_report_counts_samples_and_names_those_left_out(mixed, capsys):
    main(["shards", "check", mixed])
    output = capsys.readouterr().out
    assert "4 JPEG, 1 PNG, 1 WEBP" in output and "will not be drawn" in output
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in output.splitlines() if "│" in line}
    assert rows["samples"] == "12" and rows["cannot be decoded"] == "6" and rows["without a label"] == "0"


def mask(size: tuple[int, int] = (12, 8)) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 5, size[::-1], np.uint8)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def described(tmp_path) -> str:
    """Write two shards with good and bad .json members and masks."""
    members = [
        ("both.jpg", picture()), ("both.json", b"{}"), ("both.seg.png", mask()),
        ("beside.jpg", picture()), ("beside.png", mask()),
        ("cut.jpg", picture()), ("cut.seg.png", mask()[:-30]), ("cut.json", b"{}"),
        ("empty.jpg", picture()), ("empty.seg.png", b""),
        ("large.jpg", picture()), ("large.png", mask((8, 12))),
        ("none.jpg", picture()),
        ("photo.jpg", picture()), ("photo.png", picture("PNG")),
    ]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "b.tar", [("b.jpg", picture())])
    for name in ("a.tar", "b.tar"):
        os.utime(tmp_path / name, ns=(LONG_AGO_NS, LONG_AGO_NS))
    return str(tmp_path)


def test_broken_masks_are_bad_samples_but_other_pictures_are_not(described):
    first, second = validate_shards(find_shards(described), 1)
    assert (first.num_json, first.num_masks, second.num_json, second.num_masks) == (2, 2, 0, 0)
    assert (first.first_without_json, second.first_without_json) == ("beside", "b")
    reasons = {bad.key: bad.reason for bad in first.bad}
    assert set(reasons) == {"cut", "empty", "large"}
    assert all("segmentation map cannot be decoded" in reasons[key] for key in ("cut", "empty"))
    assert reasons["large"] == "segmentation map is 8 x 12, its image (turned upright) is 12 x 8"
    assert [(sample.key, "RGB of 8 bits" in sample.reason) for sample in first.invalid_masks] == [("photo", True)]
    assert open_shards(described).shards[0].keys == ("both", "beside", "none", "photo")
    assert len(first.sizes) == sum(first.formats.values()) == 4


def test_the_report_counts_json_and_masks_and_names_samples_without(described, capsys):
    main(["shards", "check", described])
    output = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in output.splitlines() if "│" in line}
    assert (rows["samples"], rows["with .json"], rows["with a segmentation map"]) == ("8", "2", "2")
    assert "a.tar:beside has no .json, unlike other samples; it is the first of 5 in this shard" in output
    assert "b.tar:b has no .json, unlike other samples; it is the first of 1 in this shard" in output
    no_map = "has a PNG that is no segmentation map; it is the first of 1 in this shard: PNG with RGB of 8 bits"
    assert f"a.tar:photo {no_map}" in output


def test_json_is_not_missed_if_no_sample_has_it(mixed, capsys):
    main(["shards", "check", mixed])
    assert "has no .json" not in capsys.readouterr().out
