"""`iwm play`: serve the page of a run, or write it as a file that needs no server."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from iwm_fast.config.evaluation import PlayConfig
from iwm_fast.evals.datasets import clean_images, validation_shards
from iwm_fast.evals.playing.page import build_page
from iwm_fast.evals.playing.player import Player
from iwm_fast.evals.playing.server import PlayServer
from iwm_fast.evals.retrieval.bank import open_world_model
from iwm_fast.evals.retrieval.choice import choose_shown
from iwm_fast.evals.retrieval.imagined import find_decoder
from iwm_fast.evals.retrieval.sweeps import BankedImage
from iwm_fast.monitoring.evaluation_progress import track_progress
from iwm_fast.pipelines.storage.atomic import replace_file
from iwm_fast.rendering.imagine_page import data_uri
from iwm_fast.runtime.distributed import single_process

MAX_PAGE_BYTES = 5_000_000
"""Largest page that needs no server. If it would be larger, its pictures get smaller."""
# An odd number, so that the middle is the unchanged value.
_NUM_STEPS = 9


def play(config: PlayConfig) -> tuple[Path, ...]:
    """Serve the page until Ctrl-C, or write it to a file, and return the files that were written.

    Raises:
        FileNotFoundError, CheckpointError, ShardError: if the run or its shards cannot be used.
        ValueError: if the run's predictor is the identity, or its training varied no entry of the action.
        OSError: if the page cannot be written, or the address is in use.
    """
    model = open_world_model(config.run, single_process(config.device).device, config.checkpoint)
    player = Player(model, find_decoder(config.run, model), config)
    if not player.controls:
        raise ValueError(f"run must have trained with changes of colour, but the views of {config.run!r} have none")
    shards = validation_shards(model, config.data)
    samples = choose_shown(model, shards, config.num_images)
    images = track_progress(clean_images(model, shards, samples), len(samples), "images prepared")
    subjects = [player.open(pixels.to(model.device), number) for pixels, number in images]
    run = Path(config.run).resolve().name
    if config.to:
        path = Path(config.to)
        replace_file(path, lambda draft: draft.write_text(_page_without_server(player, subjects, run), "utf-8"))
        return (path,)
    with PlayServer(player, subjects, run, config.host, config.port) as server:
        others = "; everyone in the network can open it" if server.is_open_to_others else ""
        print(f"{server.address} shows what {run} imagines{others}. Ctrl-C ends it.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return ()


def _page_without_server(player: Player, subjects: list[BankedImage], run: str) -> str:
    """Return the page with the answers of all images for one control at a time, as large as the limit allows."""
    answers = {
        f"{number}{key}": player.answer(subject, values, switched_on)
        for number, subject in enumerate(track_progress(subjects, len(subjects), "images answered"))
        for key, values, switched_on in _single_moves(player)
    }
    side = player.model.config.views.size
    while True:
        pictures: dict[str, int] = {}
        by_key: dict[str, Any] = {}
        for key, answer in answers.items():
            addresses = {name: data_uri(_at_most(pixels, side)) for name, pixels in answer.pictures.items()}
            # Many answers share pictures: the source, and what is retrieved.
            numbers = {name: pictures.setdefault(address, len(pictures)) for name, address in addresses.items()}
            by_key[key] = {"pictures": numbers, "captions": answer.captions, "distances": answer.distances}
        content = {"byKey": by_key, "pictures": list(pictures), "numSteps": _NUM_STEPS}
        thumbnails = [data_uri(_at_most(subject.pixels.cpu().numpy(), side)) for subject in subjects]
        text = build_page(
            run, player.controls, thumbnails, has_decoder=player.decoder is not None, can_upload=False, answers=content
        )
        if len(text) <= MAX_PAGE_BYTES or side <= 8:
            return text
        side = side * 3 // 4


def _single_moves(player: Player) -> list[tuple[str, dict[str, float], list[str]]]:
    """Return key, values and switches of all answers of an image: no change, then each control alone."""
    moves: list[tuple[str, dict[str, float], list[str]]] = [("", {}, [])]
    for control in player.controls:
        if control.is_switch:
            moves.append((f"|{control.name}", {}, [control.name]))
            continue
        values = np.linspace(control.low, control.high, _NUM_STEPS).round(6)
        moves += [(f"|{control.name}|{index}", {control.name: float(value)}, []) for index, value in enumerate(values)]
    return moves


def _at_most(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return an image, reduced if it is larger than that."""
    if len(pixels) <= side:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX))
