"""The page with sliders: what it answers, whom it answers, and how a browser shows it."""

import http.client
import json
import re
import shutil
import subprocess
from dataclasses import replace
from threading import Thread

import numpy as np
import pytest
import torch

from fixtures.tar_files import encode, photograph
from fixtures.tiny_pretraining import tiny_run
from iwm_fast import world_model
from iwm_fast.config.evaluation import PlayConfig
from iwm_fast.config.finetuning import PixelDecoderConfig
from iwm_fast.evals.playing import play as playing
from iwm_fast.evals.playing.page import build_page
from iwm_fast.evals.playing.play import play
from iwm_fast.evals.playing.player import Player
from iwm_fast.evals.playing.server import MAX_BYTES, PlayServer
from iwm_fast.models.pixel_decoder import PixelDecoderSpec, build_pixel_decoder
from iwm_fast.train import run

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
SIZE = 16


def decoder_of(model: world_model.WorldModel):
    config = model.config
    sizes = PixelDecoderConfig(dim=32, depth=1, num_heads=2)
    normalization = config.data.normalization
    spec = PixelDecoderSpec(
        decoder=sizes, token_dim=config.model.encoder.dim, grid=config.grid,
        patch_size=config.model.encoder.patch_size, pixel_mean=tuple(normalization.mean),
        pixel_std=tuple(normalization.std), step=0,
    )  # fmt: skip
    return build_pixel_decoder(spec, 0).requires_grad_(False).eval()


@pytest.fixture
def player(tiny_config) -> Player:
    model = world_model.build_untrained(tiny_config())
    return Player(model, decoder_of(model), PlayConfig(run="run", bank_size=6, device="cpu"))


@pytest.fixture
def subject(player):
    return player.open(torch.from_numpy(photograph("coffee.png")[100 : 100 + SIZE, 100 : 100 + SIZE].copy()), 0)


def test_there_is_a_control_for_each_entry_that_training_varied(player):
    controls = {control.name: control for control in player.controls}
    assert [name for name, control in controls.items() if not control.is_switch] == [
        "brightness", "contrast", "saturation", "hue"
    ]  # fmt: skip
    assert {name for name, control in controls.items() if control.is_switch} == {"grayscale", "blur", "solarize"}
    assert (controls["brightness"].low, controls["brightness"].neutral, controls["hue"].neutral) == (
        pytest.approx(0.6), 1.0, 0.0
    )  # fmt: skip


def test_without_a_change_nothing_has_to_be_imagined(player, subject):
    answer = player.answer(subject, {"brightness": 1.0}, [])
    assert np.array_equal(answer.pictures["source"], answer.pictures["asked for"])
    assert max(answer.distances["source"], answer.distances["difference"]) < 1e-6
    assert answer.captions["brightness"] == "unchanged" and answer.distances["absolute"] > 0.01


def test_sliders_change_what_is_asked_for_and_switches_change_the_source(player, subject):
    still = player.answer(subject, {}, [])
    moved, switched = player.answer(subject, {"brightness": 1.3}, []), player.answer(subject, {}, ["grayscale"])
    assert np.array_equal(moved.pictures["source"], still.pictures["source"])
    assert moved.pictures["asked for"].mean() > 1.2 * still.pictures["asked for"].mean()
    assert moved.captions["brightness"] == "× 1.30" and moved.distances["source"] > 0
    assert np.array_equal(switched.pictures["asked for"], still.pictures["asked for"])
    assert np.ptp(switched.pictures["source"].astype(int), axis=2).max() == 0
    assert (moved.pictures["absolute"] != still.pictures["absolute"]).any()
    assert set(moved.pictures) == {"source", "asked for", "retrieved", "absolute", "difference"}


@pytest.mark.parametrize(
    ("values", "switches", "message"),
    [
        ({"sharpness": 1.0}, [], "sliders are brightness, .* got 'sharpness'"),
        ({"blur": 1.0}, [], "sliders are .* got 'blur'"),
        ({"brightness": 9.0}, [], "brightness must lie between 0.6 and 1.4, got 9"),
        ({"brightness": float("nan")}, [], "got nan"),
        ({}, ["hue"], "switches must be among those of the page, got 'hue'"),
    ],
)
def test_other_names_and_values_are_refused(player, subject, values, switches, message):
    with pytest.raises(ValueError, match=message):
        player.answer(subject, values, switches)


@pytest.fixture
def server(player, subject):
    with PlayServer(player, [subject], "run <&>", "127.0.0.1", 0) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, method: str, path: str, body: bytes | None = None, **headers: str):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, content.decode() if reply.headers["Content-Type"].startswith("text") else json.loads(content)


def request(**changes) -> bytes:
    return json.dumps({"image": 0, "values": {"hue": 0.05}, "switchedOn": ["blur"]} | changes).encode()


def test_the_server_sends_the_page_and_answers(server):
    status, text = ask(server, "GET", "/")
    assert status == 200 and "run &lt;&amp;&gt;" in text and 'data-control="hue"' in text
    status, answer = ask(server, "POST", "/answer", request())
    assert status == 200 and answer["captions"]["hue"] == "+18°"
    assert all(address.startswith("data:image/png;base64,") for address in answer["pictures"].values())


def test_an_uploaded_image_is_one_more_to_choose_from(server):
    status, answer = ask(server, "POST", "/image", encode(photograph("astronaut.png")))
    assert status == 200 and answer["image"] == 1
    assert ask(server, "POST", "/answer", request(image=1))[0] == 200


@pytest.mark.parametrize(
    ("sent", "headers", "status", "words"),
    [
        (("POST", "/image", b"no image"), {}, 400, "is not an image"),
        (("POST", "/image", encode(photograph("coffee.png"))[:2000]), {}, 400, "truncated"),
        (("POST", "/image", b""), {}, 400, "has 0 bytes"),
        (("POST", "/image", None), {"Content_Length": str(MAX_BYTES + 1)}, 413, "the limit is 21.0 MB"),
        (("POST", "/image", None), {"Content_Length": "-5"}, 411, "Content-Length"),
        (("POST", "/answer", b"{"), {}, 400, "not a request of this page"),
        (("POST", "/answer", b"[" * 100_000), {}, 400, "not a request of this page"),
        (("POST", "/answer", request(image=7)), {}, 400, "image must be a number from 0 to 0, got 7"),
        (("POST", "/answer", request(values={"hue": 3})), {}, 400, "hue must lie between"),
        (("POST", "/answer", request()), {"Host": "evil.example"}, 403, "comes from another page"),
        (("POST", "/answer", request()), {"Origin": "http://evil.example"}, 403, "comes from another page"),
        (("GET", "/", None), {"Host": "evil.example:80"}, 403, "comes from another page"),
        (("GET", "/../etc/passwd", None), {}, 404, "only the page itself"),
        (("POST", "/other", b""), {}, 404, "address that does not exist"),
    ],
)  # fmt: skip
def test_everything_else_is_refused(server, sent, headers, status, words):
    got, answer = ask(server, *sent, **headers)
    assert got == status and words in answer["error"], answer
    assert ask(server, "POST", "/answer", request())[0] == 200


def test_an_image_above_the_limit_of_pixels_is_refused(server):
    server.player.model = replace(
        server.player.model, config=replace(server.player.model.config, data=replace(
            server.player.model.config.data, max_pixels=1000))
    )  # fmt: skip
    status, answer = ask(server, "POST", "/image", encode(photograph("coffee.png")))
    assert status == 400 and "above data.max_pixels=1000" in answer["error"]


@pytest.fixture(scope="module")
def folder(tiny_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("play") / "run"
    config = tiny_run(tiny_shards, folder, loader="torch")
    optim = replace(config.optim, epochs=0.25, warmup_epochs=0.0)
    run(replace(config, data=replace(config.data, val=tiny_shards.pattern), optim=optim))
    return folder


@pytest.fixture(scope="module")
def static_page(folder):
    path = folder.parent / "page.html"
    settings = PlayConfig(run=str(folder), bank_size=4, num_images=2, device="cpu", to=str(path))
    assert play(settings) == (path,)
    return path


def test_a_static_page_holds_all_answers_and_stays_below_its_limit(static_page, folder, monkeypatch):
    text = static_page.read_text()
    answers = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])["answers"]
    # No change, nine values of each slider and one of each switch, for two images.
    assert len(answers["byKey"]) == 2 * (1 + 9 * 4 + 3)
    assert "needs a decoder" not in text and "Imagined pictures need a decoder" in text
    assert not re.search(r"https?://|@import|<link|src=\"[^d]", text)
    monkeypatch.setattr(playing, "MAX_PAGE_BYTES", len(text) - 1)
    play(PlayConfig(run=str(folder), bank_size=4, num_images=2, device="cpu", to=str(static_page) + ".html"))
    assert static_page.with_suffix(".html.html").stat().st_size < len(text)


PROBE = """<script>addEventListener("load", () => {
  const shown = () => document.querySelector('[data-picture="asked for"]').src;
  const slider = document.querySelector('[data-control="brightness"]'), before = shown();
  slider.value = slider.max;
  slider.dispatchEvent(new Event("input"));
  document.title = JSON.stringify({ width: innerWidth, page: document.documentElement.scrollWidth,
    isLoaded: before.startsWith("data:"), isOther: shown() !== before,
    value: document.querySelector('[data-value="brightness"]').textContent });
});</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: chromium)")
@pytest.mark.parametrize("width", [500, 1280])
def test_in_a_browser_another_picture_is_shown_when_a_slider_moves(static_page, tmp_path, width):
    copy = tmp_path / "page.html"
    copy.write_text(static_page.read_text().replace("</body>", f"{PROBE}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
               f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1200", "--dump-dom"]  # fmt: skip
    output = subprocess.run([BROWSER, *options, copy.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    seen = json.loads(re.search(r"<title>(\{.*?\})</title>", output.stdout)[1])
    assert seen["isLoaded"] and seen["isOther"] and seen["value"] == "× 1.40" and seen["page"] <= seen["width"]


def test_no_text_of_the_data_ends_its_element(player):
    page = build_page("</script><b>", player.controls, ["</script>"], has_decoder=False, can_upload=True)
    assert page.count("</script>") == 2 and "run=&lt;/script&gt;" in page
