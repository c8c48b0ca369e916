"""Checking shards: everything bad is found and named, nothing good is lost, and what is bad is not drawn any more."""

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
from iwm_fast.pipelines.validate import validate

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
    members = [(f"{key}.{end}", content) for key, image in images.items()
               for end, content in (("jpg", image), ("cls", b"1")) if end == "jpg" or labelled]  # fmt: skip
    write_tar(path, members)
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))
    return str(path)


@pytest.fixture
def mixed(tmp_path) -> str:
    """Good and bad samples in turns."""
    pairs = zip(GOOD.items(), BAD.items(), strict=True)
    return shard_at(tmp_path / "mixed.tar", dict(item for pair in pairs for item in pair))


def test_every_bad_image_is_found_with_its_reason_and_every_good_one_counted(mixed):
    (report,) = validate([mixed])
    assert {bad.key for bad in report.bad} == set(BAD)
    reasons = {bad.key: bad.reason for bad in report.bad}
    assert "is GIF, accepted are JPEG" in reasons["movie"] and "truncated" in reasons["cut"]
    assert reasons["page"] == "is no image, it begins with b'<!DOCTYPE html><'"
    assert reasons["nothing"] == "has 0 bytes"
    assert report.formats == {"JPEG": 4, "PNG": 1, "WEBP": 1}
    assert sorted(report.sizes) == sorted([(20, 30), *[(12, 8)] * 5])
    assert not report.refusal


def test_what_is_bad_is_not_drawn_until_the_shard_changes(mixed, tmp_path, caplog):
    list(validate([mixed]))
    with caplog.at_level(logging.WARNING):
        shards = open_shards(mixed)
    assert shards.shards[0].keys == tuple(GOOD)
    assert "6 samples are left out" in caplog.text
    whole = index_shard(mixed)
    for position, key in enumerate(shards.shards[0].keys):
        assert shards.shards[0].image_offset[position] == whole.image_offset[whole.keys.index(key)]
    shard_at(tmp_path / "mixed.tar", BAD | {"x" * 90: picture(size=(200, 200))})
    assert len(open_shards(mixed).shards[0].keys) == len(BAD) + 1


def test_checking_again_finds_the_same(mixed):
    first, second = (list(validate([mixed])) for _ in range(2))
    assert first == second


def test_a_shard_written_just_now_is_marked_all_the_same(tmp_path):
    path = shard_at(tmp_path / "new.tar", GOOD | BAD)
    os.utime(path)
    list(validate([path]))
    assert set(open_shards(path).shards[0].keys) == set(GOOD)


def test_bad_samples_that_cannot_be_left_out_are_an_error_and_no_promise(mixed, tmp_path, monkeypatch, capsys):
    # neither beside the shard nor in the cache
    (tmp_path / "mixed.tar.index").mkdir()
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("IWM_CACHE", str(tmp_path / "file"))
    with pytest.raises(SystemExit):
        main(["shards", "check", mixed])
    output = capsys.readouterr()
    assert "6 samples cannot be decoded and would still be drawn" in output.err and "IWM_CACHE" in output.err
    assert "will not be drawn" not in output.out


def test_several_processes_report_what_one_does(mixed, tmp_path):
    shard_at(tmp_path / "more.tar", GOOD, labelled=False)
    alone, together = (list(validate(find_shards(str(tmp_path)), number)) for number in (1, 2))
    assert alone == together
    assert [report.num_unlabelled for report in alone] == [0, len(GOOD)]


def test_shards_that_cannot_be_used_are_named_and_the_others_are_still_checked(mixed, tmp_path, capsys):
    shard_at(tmp_path / "hopeless.tar", BAD)
    (tmp_path / "torn.tar").write_bytes((tmp_path / "mixed.tar").read_bytes()[:3000])
    refused = {report.path: report.refusal for report in validate(find_shards(str(tmp_path)), 1) if report.refusal}
    assert {os.path.basename(path) for path in refused} == {"hopeless.tar", "torn.tar"}
    with pytest.raises(SystemExit) as ended:
        main(["shards", "check", str(tmp_path)])
    output = capsys.readouterr()
    assert ended.value.code == 2
    assert "2 of 3 shards cannot be used" in output.err
    assert "mixed.tar:page is no image" in output.out


def test_the_report_counts_and_says_what_is_left_out(mixed, capsys):
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
    """Samples with .json and masks, good and bad, in two shards."""
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


def test_broken_masks_are_bad_samples_and_other_pictures_beside_an_image_are_not(described):
    first, second = validate(find_shards(described), 1)
    assert (first.num_json, first.num_masks, second.num_json, second.num_masks) == (2, 2, 0, 0)
    assert (first.first_without_json, second.first_without_json) == ("beside", "b")
    reasons = {bad.key: bad.reason for bad in first.bad}
    assert set(reasons) == {"cut", "empty", "large"}
    assert all("segmentation map cannot be decoded" in reasons[key] for key in ("cut", "empty"))
    assert reasons["large"] == "segmentation map is 8 x 12, its image (turned upright) 12 x 8"
    assert [(found.key, "RGB of 8 bits" in found.reason) for found in first.no_masks] == [("photo", True)]
    assert open_shards(described).shards[0].keys == ("both", "beside", "none", "photo")
    assert len(first.sizes) == sum(first.formats.values()) == 4


def test_the_report_counts_json_and_masks_and_names_what_lacks_them(described, capsys):
    main(["shards", "check", described])
    output = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in output.splitlines() if "│" in line}
    assert (rows["samples"], rows["with .json"], rows["with a segmentation map"]) == ("8", "2", "2")
    assert "a.tar:beside has no .json, unlike other samples; it is the first of 5 in this shard" in output
    assert "b.tar:b has no .json, unlike other samples; it is the first of 1 in this shard" in output
    no_map = "has a PNG that is no segmentation map; it is the first of 1 in this shard: PNG with RGB of 8 bits"
    assert f"a.tar:photo {no_map}" in output


def test_where_no_sample_has_json_none_is_missed(mixed, capsys):
    main(["shards", "check", mixed])
    assert "has no .json" not in capsys.readouterr().out
