import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from iwm_fast.checkpoints import checkpoint
from iwm_fast.checkpoints.checkpoint import Checkpoint
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.config.fingerprint import fingerprint
from iwm_fast.config.loading import load_config
from iwm_fast.config.run import (
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PredictorConfig,
    RunConfig,
    RuntimeConfig,
)
from iwm_fast.engines.factory import build_engine
from iwm_fast.pipelines.storage.atomic import remove_unfinished, set_aside
from iwm_fast.runtime.distributed import RankInfo

RANK_INFO = RankInfo(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
FINGERPRINT = {
    "seed": 0,
    "views.size": 32,
    "optim.lr": 1e-3,
    "optim.betas": [0.9, 0.999],
    "model.encoder.dim": 24,
    "model.encoder.depth": 2,
    "model.encoder.num_heads": 3,
    "model.encoder.patch_size": 8,
    "model.encoder.mlp_ratio": 2.0,
}


def write(folder, step, scale=1.0, **changes):
    """Write a small checkpoint and return its folder."""
    values = {
        "engine_state": {"weight/encoder.norm": torch.arange(4.0) * scale, "adam_step": torch.tensor(float(step))},
        "teacher_state": {"pos_embed": torch.ones(1, 2, 3) * scale},
        "step": step,
        "applied_steps": step - 1,
        "fingerprint": FINGERPRINT,
        "run_id": "0f0f",
        "world_size": 1,
        "counters": {},
        "versions": checkpoint.package_versions(),
    }
    saved = Checkpoint(folder=checkpoint.checkpoint_folder(folder, step), **values | changes)
    checkpoint.write(saved, RunConfig())
    return saved.folder


def test_what_was_written_is_read_back_bit_equal(tmp_path):
    odd = torch.tensor([1e-45, -0.0, 3.4e38, 1 / 3])
    folder = write(tmp_path, 7, engine_state={"weight/a.b": odd}, counters={"skipped": 2})
    saved = checkpoint.read(folder)
    assert folder == tmp_path / "checkpoints" / "step-00000007" == saved.folder
    assert torch.equal(saved.engine_state["weight/a.b"].view(torch.int32), odd.view(torch.int32))
    assert saved.teacher_state.keys() == {"pos_embed"}
    assert (saved.step, saved.applied_steps, saved.world_size, saved.counters) == (7, 6, 1, {"skipped": 2})
    assert (saved.run_id, saved.fingerprint) == ("0f0f", FINGERPRINT)
    assert load_config(folder / "config.yaml") == RunConfig()
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "all files must have the same permissions"
    assert saved.versions["torch"] in (torch.__version__, torch.__version__.partition("+")[0])


def test_weights_of_a_network_are_selected_by_prefix(tmp_path):
    saved = checkpoint.read(write(tmp_path, 1))
    assert saved.weights("encoder.").keys() == {"norm"}
    assert saved.weights("predictor.") == {}


def test_a_run_without_checkpoints_has_no_newest_one(tmp_path):
    assert checkpoint.find_newest_folder(tmp_path) is None


def test_checkpoints_are_in_order_of_step_and_other_folders_do_not_count(tmp_path):
    steps = (2, 1000, 10, 123_456_789, 99_999_999)
    folders = {step: write(tmp_path, step) for step in steps}
    for name in (".unfinished-step-200000000", "step-200000000.refused", "step-2", "stepping"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert checkpoint.list_checkpoint_folders(tmp_path) == [folders[step] for step in sorted(steps)]
    assert checkpoint.find_newest_folder(tmp_path) == folders[123_456_789]


@pytest.mark.parametrize("files_before_death", [0, 1])
def test_a_process_killed_while_writing_leaves_no_visible_checkpoint(tmp_path, files_before_death):
    write(tmp_path, 1)
    code = f"""
import os, signal
from pathlib import Path
from iwm_fast.pipelines.storage.atomic import write_folder

def complete(path):
    path.write_bytes(b"complete")

def die(path):
    path.write_bytes(b"ha")
    os.kill(os.getpid(), signal.SIGKILL)

writers = {{"model.safetensors": [die, complete][{files_before_death}], "state.json": die}}
write_folder(Path({str(tmp_path)!r}) / "checkpoints" / "step-00000002", writers)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2, "the unfinished folder must exist"
    assert checkpoint.find_newest_folder(tmp_path) == tmp_path / "checkpoints" / "step-00000001"
    # The next process removes it.
    remove_unfinished(tmp_path / "checkpoints")
    write(tmp_path, 2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000002"]


FILES = ["model.safetensors", "state.json", "config.yaml", "manifest.json"]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES[:-1])
def test_one_flipped_bit_is_refused_with_file_and_remedy(tmp_path, name):
    folder = write(tmp_path, 1)
    flip_a_bit(folder / name)
    with pytest.raises(CheckpointError, match=rf"step-00000001/{name} is .*sha256.*is damaged; the run's other"):
        checkpoint.read(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink, lambda path: os.truncate(path, 20)])
def test_before_a_damaged_checkpoint_the_previous_one_is_the_newest(tmp_path, name, damage):
    undamaged = write(tmp_path, 1)
    damaged = write(tmp_path, 2, scale=2.0)
    damage(damaged / name)
    saved, refused = checkpoint.read_newest(tmp_path)
    assert saved.folder == undamaged and saved.engine_state["weight/encoder.norm"][1] == 1
    assert list(refused) == [damaged] and str(damaged) in str(refused[damaged])


def test_if_all_checkpoints_are_damaged_all_are_named(tmp_path):
    assert checkpoint.read_newest(tmp_path) == (None, {})
    for step in (1, 2):
        flip_a_bit(write(tmp_path, step) / "state.json")
    with pytest.raises(
        CheckpointError, match=r"(?s)none of the .*step-00000002/state.*step-00000001/state.*a backup, or"
    ):
        checkpoint.read_newest(tmp_path)


def test_a_folder_set_aside_frees_its_name_and_overwrites_nothing(tmp_path):
    for number, ending in enumerate((".refused", ".refused-2", ".refused-3")):
        folder = write(tmp_path, 1, applied_steps=number)
        aside = set_aside(folder)
        assert not folder.exists() and aside.name == folder.name + ending
        assert checkpoint.list_checkpoint_folders(tmp_path) == []
        assert checkpoint.read(aside).applied_steps == number


def test_a_truncated_file_is_refused(tmp_path):
    folder = write(tmp_path, 1)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is"):
        checkpoint.read(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(tmp_path, name):
    folder = write(tmp_path, 1)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match="damaged; the run's other"):
        checkpoint.read(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"model.safetensors": 1}', b"\xff\x00"])
def test_a_damaged_manifest_is_refused(tmp_path, content):
    folder = write(tmp_path, 1)
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged; the run's other"):
        checkpoint.read(folder)


def test_other_settings_are_refused_with_all_that_differ(tmp_path):
    saved = checkpoint.read(write(tmp_path, 1)).fingerprint
    assert checkpoint.differing_settings(saved, FINGERPRINT) == []
    current = FINGERPRINT | {"optim.lr": 2e-3, "optim.precision": "fp32", "seed": 5, "mask.new": 1}
    for may_restart in (False, True):
        with pytest.raises(CheckpointError) as caught:
            checkpoint.differing_settings(saved, current, may_restart=may_restart)
    message = str(caught.value)
    for row in ("optim.lr: 0.001 -> 0.002", "seed: 0 -> 5", "mask.new: None -> 1", "output.folder"):
        assert row in message
    assert "betas" not in message and "restart_epoch" not in message


def test_settings_of_the_data_stream_may_differ_if_the_epoch_restarts():
    current = FINGERPRINT | {"seed": 5, "views.new": 1}
    with pytest.raises(CheckpointError, match=r"(?s)seed: 0 -> 5.*data.restart_epoch=true continues"):
        checkpoint.differing_settings(FINGERPRINT, current)
    assert checkpoint.differing_settings(FINGERPRINT, current, may_restart=True) == ["seed", "views.new"]


def test_the_number_of_epochs_may_differ_if_a_run_is_extended():
    saved = FINGERPRINT | {"optim.epochs": 4.0}
    longer, other = saved | {"optim.epochs": 6.0}, saved | {"optim.epochs": 6.0, "seed": 5}
    with pytest.raises(
        CheckpointError, match=r"(?s)optim.epochs: 4.0 -> 6.0\nresume=extend continues .*; otherwise set"
    ):
        checkpoint.differing_settings(saved, longer, may_restart=True)
    assert checkpoint.differing_settings(saved, longer, may_extend=True) == ["optim.epochs"]
    # Both must be allowed.
    both = r"(?s)data.restart_epoch=true continues .*, and resume=extend continues "
    for allowed in ({}, {"may_restart": True}, {"may_extend": True}):
        with pytest.raises(CheckpointError, match=both):
            checkpoint.differing_settings(saved, other, **allowed)
    assert checkpoint.differing_settings(saved, other, may_restart=True, may_extend=True) == ["optim.epochs", "seed"]
    with pytest.raises(CheckpointError, match=r"optim.betas: .* -> 1\nset them back"):
        checkpoint.differing_settings(
            saved, saved | {"optim.betas": 1}, may_restart=True, may_extend=True, may_adjust=True
        )


def test_an_extended_run_may_stretch_its_warmup_with_its_epochs_only():
    saved = FINGERPRINT | {"optim.epochs": 4.0, "optim.warmup_epochs": 4 * 40 / 300}
    longer = saved | {"optim.epochs": 6.0, "optim.warmup_epochs": 6 * 40 / 300}
    both = ["optim.epochs", "optim.warmup_epochs"]
    assert checkpoint.differing_settings(saved, longer, may_extend=True) == both
    with pytest.raises(CheckpointError, match="resume=extend continues"):
        checkpoint.differing_settings(saved, longer)
    with pytest.raises(CheckpointError, match=r"optim.warmup_epochs: .* -> 1.0\nresume=adjust continues"):
        checkpoint.differing_settings(saved, longer | {"optim.warmup_epochs": 1.0}, may_extend=True)


@pytest.mark.parametrize(
    ("depth", "objective", "is_counted"),
    [
        (0, {}, True),
        (0, {"covariance_weight": 0.0}, True),
        (0, {"variance_weight": 0.0, "covariance_weight": 0.0}, False),
        (12, {}, False),
        (12, {"variance_weight": 0.5}, True),
        (12, {"covariance_weight": 0.01}, True),
    ],
)
def test_images_per_forward_count_with_vicreg_terms_only(depth, objective, is_counted):
    model = ModelConfig(predictor=PredictorConfig(depth=depth))
    config = RunConfig(model=model, objective=ObjectiveConfig(**objective))
    saved, same, other = (fingerprint(config, "x", images_per_forward=images) for images in (16, 16, 8))
    assert checkpoint.differing_settings(saved, same) == []
    if not is_counted:
        assert saved == other == fingerprint(config, "x")
        return
    message = r"  ranks \* runtime.micro_batch_size: 16 -> 8\nset them back"
    for allowed in ({}, {"may_adjust": True}, {"may_restart": True, "may_extend": True}):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.differing_settings(saved, other, **allowed)
    # Earlier versions did not record them.
    assert checkpoint.differing_settings(fingerprint(config, "x"), other) == []


def test_another_format_is_refused(tmp_path):
    folder = write(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text()) | {"format": 99}
    (folder / "state.json").write_text(json.dumps(state))
    hash_and_name = subprocess.run(["sha256sum", folder / "state.json"], capture_output=True, text=True, check=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    size_bytes = (folder / "state.json").stat().st_size
    manifest["state.json"] = {"size_bytes": size_bytes, "sha256": hash_and_name.stdout.split()[0]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.read(folder)


def test_a_checkpoint_is_never_overwritten(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(FileExistsError, match="exists already"):
        write(tmp_path, 1, scale=2.0)
    assert checkpoint.read(tmp_path / "checkpoints" / "step-00000001").engine_state["weight/encoder.norm"][1] == 1


def make_engine(width):
    module = nn.Linear(3, width)
    groups = [{"params": [module.weight], "name": "decay"}, {"params": [module.bias], "name": "no_decay"}]
    config = RunConfig(optim=OptimConfig(global_batch_size=1), runtime=RuntimeConfig(engine="plain"))
    return build_engine(config, module, torch.optim.AdamW(groups), RANK_INFO)


def test_an_engine_is_restored_and_another_model_is_refused(tmp_path):
    engine = make_engine(4)
    saved = checkpoint.read(write(tmp_path, 1, engine_state=engine.state()))
    other = make_engine(4)
    checkpoint.restore(saved, other)
    assert all(torch.equal(tensor, saved.engine_state[name]) for name, tensor in other.state().items())
    with pytest.raises(CheckpointError, match=r"weight/weight has shape \(4, 3\) in the saved state, \(5, 3\) in this"):
        checkpoint.restore(saved, make_engine(5))
