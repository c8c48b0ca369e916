"""Pictures of retrieved predictions: what they show, and that it is correct."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures.exact_predictor import JITTER, Pair, exact, ignore_action
from fixtures.tar_files import encode, photograph, write_tar
from fixtures.tiny_pretraining import tiny_run
from fixtures.untrained_decoder import untrained_decoder
from iwm_fast import world_model
from iwm_fast.checkpoints.pixel_decoder import save_pixel_decoder
from iwm_fast.config.evaluation import EvalDataConfig, ImagineConfig
from iwm_fast.evals.retrieval.bank import draw_bank, encode_bank, make_query, read_out
from iwm_fast.evals.retrieval.choice import choose_shown
from iwm_fast.evals.retrieval.imagined import decode_pixels
from iwm_fast.evals.retrieval.sweeps import (
    BankedImage,
    make_sections,
    retrieve_clean,
    retrieve_version,
    sweep,
    sweep_values,
    swept_entries,
    trained_flags,
)
from iwm_fast.evals.retrieval.visualize import imagine
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.pipelines.transforms.operations.blur import Blur
from iwm_fast.pipelines.transforms.operations.jitter import Jitter
from iwm_fast.rendering.image_grid import ImageGrid, Panel, save_image_grids
from iwm_fast.rendering.imagine_page import write_imagine_page
from iwm_fast.train import run


@pytest.fixture
def model(tiny_config):
    return world_model.build_untrained(tiny_config())


@pytest.fixture
def image(model) -> BankedImage:
    pixels = torch.from_numpy(photograph("coffee.png")[100:116, 100:116].copy())
    bank = draw_bank(pixels, 0, 12, model=model, strengths="default", seed=0)
    return BankedImage(pixels=pixels, bank=bank, target=encode_bank(model, bank))


@pytest.fixture(scope="module")
def folder(tiny_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagine") / "run"
    config = tiny_run(tiny_shards, folder, loader="torch")
    optim = replace(config.optim, epochs=1.0, warmup_epochs=0.0)
    run(replace(config, data=replace(config.data, val=tiny_shards.pattern), optim=optim))
    return folder


def small(folder, **more):
    return ImagineConfig(**({"run": str(folder), "num_images": 3, "bank_size": 4, "device": "cpu"} | more))


def test_sheet_sweeps_and_a_self_contained_page_are_written(folder):
    *pictures, page = imagine(small(folder, steps=5, num_plotted=4))
    assert [path.name for path in pictures] == ["imagine.png", "imagine_sweeps.png", "imagine_plots.png"]
    assert page.name == "imagine.html"
    for picture in pictures:
        with Image.open(picture) as opened:
            assert opened.format == "PNG"
    text = page.read_text()
    sources = re.findall(r'<img[^>]* src="([^"]*)"', text)
    # 3 images in 4 rows; 4 entries with 3 rows of 5 values; 3 destroyed versions of 3 images in 4 rows.
    assert len(sources) == 3 * 4 + 4 * 3 * 5 + 3 * 3 * 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    # SVG names its own namespaces and parts.
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"|url\(#\w+\)', "", text)
    assert not re.search(r"https?:|<script|<link|url\(", without_names)
    assert "prefers-color-scheme: dark" in text and "max-width: 600px" in text
    titles = ["The", "Brightness", "Contrast", "Saturation", "Hue", "Colours", "Blur", "Solarize", "Over"]
    assert re.findall(r"<h2>(\w+)", text) == titles
    assert re.findall(r"<h3>(\w+)", text) == ["Rank", "Brightness", "Contrast", "Saturation", "Hue"]
    assert len(re.findall(r"by absolute readout; \d\.\d+ by difference readout; by chance 0\.\d+ among", text)) == 8


def test_an_own_image_is_shown_with_several_changes_and_decoded(folder, tmp_path):
    decoder = untrained_decoder(world_model.load(folder))
    file = save_pixel_decoder(folder, decoder)
    Image.fromarray(photograph("coffee.png")).save(tmp_path / "cup.png")
    try:
        sheet, sweeps, page = imagine(small(folder, steps=5, image=str(tmp_path / "cup.png")))
    finally:
        file.unlink()
    assert [sheet.name, sweeps.name, page.name] == ["imagine_cup.png", "imagine_cup_sweeps.png", "imagine_cup.html"]
    text = page.read_text()
    # 3 changes in 6 rows; 4 entries with 5 rows of 5 values; 3 destroyed versions in 6 rows.
    assert len(re.findall(r"<img", text)) == 3 * 6 + 4 * 5 * 5 + 3 * 6
    assert "Over many images" not in text and text.count("imagined by difference") >= 3
    with pytest.raises(ValueError, match=r"image and data\.val must not both be set"):
        small(folder, image="cup.png", data=EvalDataConfig(val="val.tar"))
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        imagine(small(folder, image=str(tmp_path / "none.jpg")))


def test_colourful_and_different_images_are_chosen(folder, tmp_path):
    # Grey images, then reds that are nearly equal, and one blue.
    colours = [*[(level, level, level) for level in range(40, 200, 20)], *[(200 + n, 30, 30) for n in range(8)]]
    colours.append((20, 40, 200))
    content = [(f"{number:02d}.png", encode(np.full((20, 20, 3), colour, np.uint8), "PNG"))
               for number, colour in enumerate(colours)]  # fmt: skip
    write_tar(tmp_path / "val.tar", content)
    shards = open_shards(str(tmp_path / "val.tar"))
    model = world_model.load(folder)
    chosen = choose_shown(model, shards, 2).tolist()
    assert chosen[1] == 16 and 8 <= chosen[0] < 16
    assert choose_shown(model, shards, 17).tolist() == list(range(17))


def test_pictures_are_a_pure_function_of_run_and_settings(folder, tmp_path):
    written = [imagine(small(folder, num_images=1, steps=2, picture=str(tmp_path / f"{name}.png"))) for name in "ab"]
    for first, second in zip(*written, strict=True):
        assert first.read_bytes() == second.read_bytes() and first.parent == tmp_path


def test_an_unwritable_picture_is_refused_before_the_run_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"picture must name a file in a folder that can be written to, got '.*file/a"):
        imagine(small("no run at all", picture=str(tmp_path / "file" / "a.png")))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"picture must name a file .*folder.png'.*: it is a folder"):
        imagine(small("no run at all", picture=str(tmp_path / "folder.png")))
    with pytest.raises(ValueError, match=r"picture must end with \.png"):
        small("x", picture="imagined.jpg")
    with pytest.raises(ValueError, match="steps must be at least 2"):
        small("x", steps=1)


def test_a_sweep_covers_the_range_of_jitter_around_the_unchanged_image():
    views = ViewConfig(jitter=Jitter(brightness=0.8, hue=0.2))
    assert sweep_values("brightness", 5, views).tolist() == pytest.approx([0.2, 0.6, 1.0, 1.4, 1.8])
    assert sweep_values("hue", 3, views).tolist() == pytest.approx([-0.2, 0.0, 0.2])
    for name in JITTER:
        assert sweep_values(name, 7, views)[3] == (0.0 if name == "hue" else 1.0)


def test_only_entries_that_training_varies_are_swept_or_undone():
    views = ViewConfig(
        jitter=Jitter(saturation=0.0),
        blur=Blur(probability=0.0),
        action_entries=("brightness", "saturation", "blur", "solarize"),
    )
    assert swept_entries(views, "run") == ("brightness",) and trained_flags(views) == ("solarize",)
    assert swept_entries(ViewConfig(), "default") == JITTER
    assert trained_flags(ViewConfig()) == ("grayscale", "blur", "solarize")


@pytest.mark.parametrize("entry", JITTER)
def test_an_exact_predictor_retrieves_each_value_of_a_sweep(model, image, entry):
    section = sweep(entry, image, 5, exact(model, Pair(source=image.pixels, clean=image.pixels)), strengths="default")
    requested, *by_readout = section.rows
    for retrieved in by_readout:
        assert [(panel.caption, panel.is_correct) for panel in retrieved] == [("correct", True)] * 5
        for asked, found in zip(requested, retrieved, strict=True):
            assert np.array_equal(asked.pixels, found.pixels)
    assert len(by_readout) == 2
    assert np.array_equal(requested[2].pixels, image.pixels.numpy()) and requested[2].caption == "unchanged"
    assert section.numbers["correct"] == "5 of 5 by absolute readout; 5 of 5 by difference readout"
    assert section.numbers["mean reciprocal rank"].startswith("1.000 by absolute readout; 1.000 by difference readout;")
    errors = "0.000 by absolute readout; 0.000 by difference readout; of no change 0."
    assert section.numbers["mean error of the retrieved value"].startswith(errors)


def test_a_predictor_that_ignores_the_action_retrieves_one_image(model, image):
    requested, retrieved, by_difference = sweep("brightness", image, 5, ignore_action(model), strengths="default").rows
    num_distinct = [len({panel.pixels.tobytes() for panel in row}) for row in (requested, retrieved, by_difference)]
    assert num_distinct == [5, 1, 1]
    assert sum(panel.is_correct for panel in retrieved) <= 1
    wrong = next(panel for panel in retrieved if not panel.is_correct)
    assert re.fullmatch(r"(unchanged|× \d\.\d\d)( of a bank image)?; correct answer at rank \d+", wrong.caption)


@pytest.mark.parametrize("flag", ["grayscale", "blur", "solarize"])
def test_an_exact_predictor_retrieves_the_clean_image(model, image, flag):
    source = make_query(image.pixels, image.bank, flag, model).source
    case = retrieve_clean(flag, image, exact(model, Pair(source=source, clean=image.pixels, flags=(flag,))), None)
    shown, correct, retrieved, by_difference = case.panels.values()
    assert np.array_equal(shown.pixels, source.numpy()) and np.array_equal(correct.pixels, image.pixels.numpy())
    assert retrieved.is_correct and retrieved.caption == "correct" and case.num_candidates == 13
    # Without the flag, the exact predictor is wrong about the source. So its difference readout is wrong as well.
    assert case.ranks[0] == 1 and by_difference.is_correct == (case.ranks[1] == 1)
    case = retrieve_clean(flag, image, ignore_action(model), None)
    retrieved = case.panels["retrieved"]
    assert retrieved.is_correct == (case.ranks[0] == 1) == (retrieved.caption == "correct")


@pytest.mark.parametrize("number", [0, 5])
def test_a_case_shows_a_candidate_of_the_bank_and_retrieves_it(model, image, number):
    exact_model = exact(model, Pair(source=image.pixels, clean=image.pixels))
    case = retrieve_version(image, number, exact_model, None)
    assert list(case.panels) == ["source", "asked for", "retrieved", "retrieved by difference"]
    for label in ("asked for", "retrieved", "retrieved by difference"):
        assert np.array_equal(case.panels[label].pixels, image.bank.pixels[number].numpy())
    assert case.ranks == (1, 1) and case.panels["retrieved"].is_correct and case.num_candidates == 12
    assert re.search(r"brightness × \d\.\d\d", case.panels["asked for"].caption)


def test_a_decoder_shows_what_each_readout_predicts(model, image):
    decoder = untrained_decoder(model)
    query = make_query(image.pixels, image.bank, "jitter", model)
    decoded = [decode_pixels(decoder, tokens) for tokens in read_out(model, query)]
    imagined = retrieve_version(image, 2, model, decoder).panels
    assert list(imagined)[2:4] == ["imagined", "imagined by difference"]
    for label, pixels in zip(("imagined", "imagined by difference"), decoded, strict=True):
        assert np.abs(imagined[label].pixels.astype(int) - pixels[2]).max() <= 1
    assert not np.array_equal(imagined["imagined"].pixels, imagined["imagined by difference"].pixels)
    strip = sweep("hue", image, 3, model, strengths="default", decoder=decoder)
    assert strip.labels == ("asked for", "imagined", "imagined by difference", "retrieved", "retrieved by difference")
    assert len(strip.rows[1]) == 3


def test_many_images_are_split_into_sections_with_common_numbers(model, image):
    case = retrieve_version(image, 0, exact(model, Pair(source=image.pixels, clean=image.pixels)), None)
    first, second = make_sections("Many", [case] * 11)
    assert len(first.rows[0]) == 8 and len(second.rows[0]) == 3 and second.title == ""
    assert first.numbers["correct"].startswith("11 of 11 by absolute readout; 11 of 11 by") and not second.numbers


def test_the_page_has_large_pictures_as_jpeg_and_escapes_text(tmp_path):
    panel = Panel(pixels=np.zeros((128, 128, 3), np.uint8), caption="<b>")
    write_imagine_page(tmp_path / "page.html", [ImageGrid(labels=("a",), rows=((panel,),))], [], "title", run="a&b")
    text = (tmp_path / "page.html").read_text()
    assert "data:image/jpeg;base64," in text and "&lt;b&gt;" in text and "a&amp;b" in text


def test_panels_keep_their_pixels_in_their_row_and_column(tmp_path):
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)
    rows = tuple(tuple(Panel(pixels=np.tile(colour, (4, 4, 1))) for colour in row) for row in colours)
    save_image_grids(tmp_path / "sheet.png", [ImageGrid(labels=("one", "two"), rows=rows)], "title")
    with Image.open(tmp_path / "sheet.png") as opened:
        drawn = np.array(opened.convert("RGB"))
    centres = [[np.argwhere((drawn == colour).all(axis=2)).mean(axis=0) for colour in row] for row in colours]
    (red, green), (blue, yellow) = centres
    assert red[0] == pytest.approx(green[0], abs=1) and red[1] == pytest.approx(blue[1], abs=1)
    assert red[0] < blue[0] and red[1] < green[1] and yellow == pytest.approx([blue[0], green[1]], abs=1)
