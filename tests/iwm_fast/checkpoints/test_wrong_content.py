"""Runs and exports whose files agree with their manifest, but hold the wrong content: one message, no allocation."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import iwm_fast
from fixtures.tiny_pretraining import tiny_run
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.checkpoints.export import export
from iwm_fast.checkpoints.pretrained import read_pretrained_weights
from iwm_fast.cli import main
from iwm_fast.config.commands import ExportConfig
from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models import student
from iwm_fast.train import run


@pytest.fixture(scope="module")
def originals(tiny_shards, tmp_path_factory) -> Path:
    """Train a run and export it."""
    folder = tmp_path_factory.mktemp("originals")
    config = tiny_run(tiny_shards, folder / "run", loader="torch")
    run(replace(config, optim=replace(config.optim, epochs=2.0)))
    export(ExportConfig(run=str(folder / "run"), to=str(folder / "export")))
    return folder


def sign(folder: Path) -> None:
    """Write the manifest again, so that it agrees with the files."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            manifest[name] = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def set_entry(tree: Any, address: str, value: Any) -> None:
    *groups, last = address.split(".")
    for group in groups:
        tree = tree[group]
    tree[last] = value


def setting(address: str, value: Any) -> Callable[[Path], None]:
    """Return a function that changes a setting in iwm.json or config.yaml."""

    def change(path: Path) -> None:
        is_json = path.suffix == ".json"
        tree = (json.loads if is_json else yaml.safe_load)(path.read_text())
        set_entry(tree["settings"] if is_json else tree, address, value)
        path.write_text(json.dumps(tree) if is_json else yaml.safe_dump(tree))

    return change


# Settings that do not describe the networks of the weights, and what the message says.
SETTINGS = {
    "depth": (setting("model.encoder.depth", 3), r"model\.encoder\.depth is 3, the weights have 2 blocks"),
    "endless depth": (setting("model.predictor.depth", 10**12), r"model\.predictor\.depth must be between 0 and 1000"),
    "identity predictor": (setting("model.predictor.depth", 0), r"model\.predictor\.depth is 0, the weights have 1"),
    "width": (setting("model.encoder.dim", 64), r"positions of shape \(1, 16, 64\), the weights have \(1, 16, 32\)"),
    "endless width": (setting("model.predictor.dim", 4 * 10**15), r"model\.predictor\.dim must be a multiple of 4"),
    "size": (setting("views.size", 10**9 * 4), r"views\.size must be between 8 and 8192"),
    "wide layers": (setting("model.encoder.mlp_ratio", 1e9), r"model\.encoder\.mlp_ratio must be between"),
    "no number": (setting("model.encoder.mlp_ratio", float("nan")), "cannot be used|that it describes|mlp_ratio"),
    "conditioning": (setting("model.predictor.conditioning", "none"), "the predictor that it describes needs mixer"),
    "action": (setting("views.action_entries", ["hue"]), r"needs mixer\.layers\.0\.weight of shape \(16, 17\)"),
    "wrong type": (setting("model.encoder.dim", "wide"), "dim"),
    "out of range": (setting("views.crop.scale", [2.0, 3.0]), r"views\.crop\.scale"),
    "unknown": (setting("model.encoder.width", 3), "width"),
    "group that is a list": (setting("model", [1, 2]), "model"),
}  # fmt: skip


def no_real_network(*_, **__):
    assert torch.empty(0).is_meta, "a network was built before its weights were known to fit"


def refused(load: Callable[[], Any], path: Path, message: str) -> str:
    with pytest.raises(CheckpointError, match=message) as caught:
        load()
    text = "\n".join([str(caught.value), *caught.value.__notes__])
    assert str(path) in text
    return text


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_an_export_that_do_not_fit_are_refused(name, originals, tmp_path, monkeypatch, tiny_shards):
    change, message = SETTINGS[name]
    folder = shutil.copytree(originals / "export", tmp_path / "export")
    change(folder / "iwm.json")
    sign(folder)
    config = replace(tiny_run(tiny_shards, tmp_path / "next"), init_from=str(folder))
    with torch.device("meta"):
        networks = student.build_student(config, REFERENCE)
    monkeypatch.setattr(student, "initialize_", no_real_network)
    text = refused(lambda: iwm_fast.load(folder), folder / "iwm.json", message)
    assert "export the run again" in text
    refused(lambda: read_pretrained_weights(config, networks), folder / "iwm.json", message)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_checkpoint_that_do_not_fit_are_refused(name, originals, tmp_path, monkeypatch, capsys):
    change, message = SETTINGS[name]
    folder = shutil.copytree(originals / "run", tmp_path / "run")
    newest = checkpoints.find_newest_folder(folder)
    assert newest is not None
    change(newest / "config.yaml")
    sign(newest)
    monkeypatch.setattr(student, "initialize_", no_real_network)
    for use in (
        lambda: iwm_fast.load(folder),
        lambda: export(ExportConfig(run=str(folder), to=str(tmp_path / "to"))),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            use()
        assert str(newest / "config.yaml") in str(caught.value)
    assert not (tmp_path / "to").exists()
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "knn", f"run={folder}", "data.val=anything"])
    assert stop.value.code == 2 and str(newest / "config.yaml") in capsys.readouterr().err


def edit(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """Return a function that changes the JSON object in a file, or replaces it by what `change` returns."""

    def apply(path: Path) -> None:
        tree = json.loads(path.read_text())
        path.write_text(json.dumps(change(tree) or tree))

    return apply


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def rename_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors["blocks.0.other"] = tensors.pop("blocks.0.norm1.weight")
    save_file(tensors, path)


FILES = {
    "list": ("iwm.json", edit(lambda tree: [tree]), "must hold a JSON object, got list"),
    "no settings": ("iwm.json", edit(lambda tree: {"format": 2, "step": 1, "predictor": None}), "it has no settings"),
    "no format": ("iwm.json", edit(lambda tree: {"a": 1}), "it has no format"),
    "unhashable format": ("iwm.json", edit(lambda tree: tree | {"format": [2]}), r"has format \[2\]"),
    "settings of another type": ("iwm.json", edit(lambda tree: tree | {"settings": 3}), "cannot be used"),
    "step of another type": ("iwm.json", edit(lambda tree: tree | {"step": "last"}), "step must be an integer"),
    "NaN": ("iwm.json", edit(lambda tree: tree | {"pixel_mean": float("nan")}), "it holds NaN, which is not JSON"),
    "nested": ("iwm.json", lambda path: path.write_text('{"a":' * 100_000), "cannot be used"),
    "other bytes": ("iwm.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot be used"),
    "nothing": ("iwm.json", lambda path: path.write_bytes(b""), "cannot be used"),
    "folder": ("iwm.json", replace_by_folder, "iwm.json"),
    "cut weights": ("model.safetensors", cut, "cannot be used: SafetensorError"),
    "empty weights": ("model.safetensors", lambda path: path.write_bytes(b""), "cannot be used: SafetensorError"),
    "other weights": ("predictor.safetensors", rename_tensor, "the weights have none"),
    "folder of weights": ("model.safetensors", replace_by_folder, "model.safetensors"),
    "folder of a predictor": ("predictor.safetensors", replace_by_folder, "predictor.safetensors"),
    "no predictor": ("iwm.json", edit(lambda tree: tree | {"predictor": None}), "the weights have 0 blocks"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_of_an_export_with_the_wrong_content_are_named(name, originals, tmp_path):
    file, change, message = FILES[name]
    folder = shutil.copytree(originals / "export", tmp_path / "export")
    change(folder / file)
    sign(folder)
    assert "export the run again" in refused(lambda: iwm_fast.load(folder), folder, message)


STATES = {
    "list": ("state.json", edit(lambda tree: [tree]), "must hold a JSON object, got list"),
    "unknown entry": ("state.json", edit(lambda tree: tree | {"more": 1}), "state.json cannot be used"),
    "cut weights": ("model.safetensors", cut, "cannot be used: SafetensorError"),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_files_of_a_checkpoint_with_the_wrong_content_are_named(name, originals, tmp_path):
    file, change, message = STATES[name]
    folder = shutil.copytree(originals / "run", tmp_path / "run")
    newest = checkpoints.find_newest_folder(folder)
    assert newest is not None
    change(newest / file)
    sign(newest)
    with pytest.raises(CheckpointError, match=message):
        iwm_fast.load(folder, checkpoint=newest)


def test_a_run_whose_settings_are_based_on_themselves_is_refused(originals, tmp_path):
    folder = shutil.copytree(originals / "run", tmp_path / "run")
    (folder / "config.yaml").write_text("base: config.yaml\n")
    with pytest.raises(CheckpointError, match="base must not lead back to the same file"):
        iwm_fast.load(folder)
