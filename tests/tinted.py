"""Shards whose label `json.look.tint` an encoder cannot miss while `.cls` says nothing, and a short run on them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from iwm_fast.loop import run
from samples import TinyShards, encode, photograph, write_tar
from tiny_runs import tiny_run

TINTS = {"red": (150, 0, 0), "green": (0, 150, 0), "blue": (0, 0, 150)}


def write_tinted(path: Path, count: int, first: int, tints=TINTS, *, bad: int | None = None) -> str:
    """Write crops in one of three tints, named in .json; .cls counts on and says nothing about the image."""
    members = []
    for number in range(first, first + count):
        name = list(tints)[number % len(tints)]
        crop = photograph("coffee.png")[number : number + 40, number : number + 40] * 0.4 + np.array(tints[name])
        note = {"name": number, "look": {"tint": name, "hue_bin": list(TINTS).index(name) + 4}}
        image = encode(crop.astype(np.uint8))
        members += [
            (f"{number:03}.jpg", image[: len(image) // 2] if number == bad else image),
            (f"{number:03}.json", json.dumps(note).encode()),
            (f"{number:03}.cls", b"%d" % (number // 3 % 2)),
        ]
    write_tar(path, members)
    return str(path)


def tinted_run(folder: Path, *, num_train: int = 48, num_val: int = 12) -> Path:
    """Write both sets and train for a moment; return the run's folder."""
    train = write_tinted(folder / "train.tar", num_train, 0)
    val = write_tinted(folder / "val.tar", num_val, num_train + 50, {name: TINTS[name] for name in ("blue", "red")})
    config = tiny_run(TinyShards(pattern=train, folder=folder), folder / "run", loader="torch")
    config = replace(config, data=replace(config.data, val=val))
    run(replace(config, optim=replace(config.optim, epochs=1.0, warmup_epochs=0.0)))
    return folder / "run"
