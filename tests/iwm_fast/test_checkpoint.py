import json
import signal
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_model
from torch import nn

from iwm_fast import checkpoint
from iwm_fast.checkpoint import CheckpointError
from iwm_fast.config import EncoderConfig, OptimConfig, RunConfig, RuntimeConfig
from iwm_fast.distributed import Place
from iwm_fast.engine import build_engine
from iwm_fast.models.encoder import Encoder
from iwm_fast.models.layers import initialize_
from kernels.ops import REFERENCE

PLACE = Place(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
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


def write(folder, step, scale=1.0, **others):
    values = {
        "engine_state": {"weight/encoder.norm": torch.arange(4.0) * scale, "adam_step": torch.tensor(float(step))},
        "teacher_state": {"pos_embed": torch.ones(1, 2, 3) * scale},
        "step": step,
        "applied_steps": step - 1,
        "fingerprint": FINGERPRINT,
        "place": PLACE,
    }
    return checkpoint.write(folder, **values | others)


def test_what_was_written_is_read_back_bit_equal(tmp_path):
    odd = torch.tensor([1e-45, -0.0, 3.4e38, 1 / 3])
    folder = write(tmp_path, 7, engine_state={"weight/a.b": odd}, counters={"skipped": 2})
    saved = checkpoint.read(folder)
    assert folder == tmp_path / "checkpoints" / "step-00000007" == saved.folder
    assert torch.equal(saved.engine_state["weight/a.b"].view(torch.int32), odd.view(torch.int32))
    assert saved.teacher_state.keys() == {"pos_embed"}
    assert (saved.step, saved.applied_steps, saved.world_size, saved.counters) == (7, 6, 1, {"skipped": 2})
    assert (
        saved.versions["torch"] == torch.__version__.partition("+")[0] or saved.versions["torch"] == torch.__version__
    )


def test_weights_of_a_part_are_found_by_its_prefix(tmp_path):
    saved = checkpoint.read(write(tmp_path, 1))
    assert saved.weights("encoder.").keys() == {"norm"}
    assert saved.weights("predictor.") == {}


def test_a_run_without_checkpoints_has_no_newest(tmp_path):
    assert checkpoint.newest(tmp_path) is None


def test_the_newest_is_found_and_two_older_ones_are_kept(tmp_path):
    for step in (2, 10, 100, 1000):
        write(tmp_path, step)
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints" / "step-00001000"
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000100", "step-00001000"]


@pytest.mark.parametrize("files_before_death", [0, 1])
def test_a_process_killed_while_writing_leaves_no_visible_checkpoint(tmp_path, files_before_death):
    write(tmp_path, 1)
    code = f"""
import os, signal
from pathlib import Path
from iwm_fast.commit import publish

def complete(path):
    path.write_bytes(b"whole")

def die(path):
    path.write_bytes(b"ha")
    os.kill(os.getpid(), signal.SIGKILL)

writers = {{"model.safetensors": [die, complete][{files_before_death}], "state.json": die}}
publish(Path({str(tmp_path)!r}) / "checkpoints" / "step-00000002", writers)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2, "the torso is there"
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints" / "step-00000001"
    # and it is cleared away by the next
    write(tmp_path, 2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_one_flipped_bit_is_refused_with_the_file_and_what_to_do(tmp_path, name):
    folder = write(tmp_path, 1)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} is .*sha256.*move .*step-00000001 away"):
        checkpoint.read(folder)


def test_a_cut_off_file_is_refused(tmp_path):
    folder = write(tmp_path, 1)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is"):
        checkpoint.read(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_missing_file_is_refused(tmp_path, name):
    folder = write(tmp_path, 1)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match="damaged; move"):
        checkpoint.read(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"model.safetensors": 1}', b"\xff\x00"])
def test_a_damaged_manifest_is_refused(tmp_path, content):
    folder = write(tmp_path, 1)
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged; move"):
        checkpoint.read(folder)


def test_other_settings_are_refused_with_every_key_that_differs(tmp_path):
    saved = checkpoint.read(write(tmp_path, 1)).fingerprint
    assert checkpoint.differing_settings(saved, FINGERPRINT) == []
    current = FINGERPRINT | {"optim.lr": 2e-3, "seed": 5, "mask.new": 1}
    for may_restart in (False, True):
        with pytest.raises(CheckpointError) as caught:
            checkpoint.differing_settings(saved, current, may_restart=may_restart)
    message = str(caught.value)
    for row in ("optim.lr: 0.001 -> 0.002", "seed: 0 -> 5", "mask.new: None -> 1", "output.folder"):
        assert row in message
    assert "betas" not in message and "restart_epoch" not in message


def test_settings_of_the_data_stream_may_differ_where_an_epoch_may_begin_anew():
    current = FINGERPRINT | {"seed": 5, "views.new": 1}
    with pytest.raises(CheckpointError, match=r"(?s)seed: 0 -> 5.*data.restart_epoch=true goes on"):
        checkpoint.differing_settings(FINGERPRINT, current)
    assert checkpoint.differing_settings(FINGERPRINT, current, may_restart=True) == ["seed", "views.new"]


def test_another_format_is_refused(tmp_path):
    folder = write(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text()) | {"format": 99}
    (folder / "state.json").write_text(json.dumps(state))
    size_and_hash = subprocess.run(["sha256sum", folder / "state.json"], capture_output=True, text=True, check=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = {
        "size_bytes": (folder / "state.json").stat().st_size,
        "sha256": size_and_hash.stdout.split()[0],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.read(folder)


def test_a_step_is_never_overwritten(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(CheckpointError, match="exists already"):
        write(tmp_path, 1, scale=2.0)
    assert checkpoint.read(tmp_path / "checkpoints" / "step-00000001").engine_state["weight/encoder.norm"][1] == 1


def make_engine(width):
    module = nn.Linear(3, width)
    groups = [{"params": [module.weight], "name": "decay"}, {"params": [module.bias], "name": "no_decay"}]
    config = RunConfig(optim=OptimConfig(global_batch_size=1), runtime=RuntimeConfig(engine="plain"))
    return build_engine(config, module, torch.optim.AdamW(groups), PLACE)


def test_an_engine_is_restored_and_a_model_of_other_shapes_is_refused_with_both(tmp_path):
    engine = make_engine(4)
    saved = checkpoint.read(write(tmp_path, 1, engine_state=engine.state()))
    other = make_engine(4)
    checkpoint.restore(saved, other)
    assert all(torch.equal(tensor, saved.engine_state[name]) for name, tensor in other.state().items())
    with pytest.raises(CheckpointError, match=r"weight/weight has shape \(4, 3\) in the saved state, \(5, 3\) in this"):
        checkpoint.restore(saved, make_engine(5))


@pytest.fixture
def teacher():
    config = EncoderConfig(dim=24, depth=2, num_heads=3, patch_size=8, mlp_ratio=2.0)
    encoder = Encoder(config, FINGERPRINT["views.size"], REFERENCE).eval()
    initialize_(encoder, torch.Generator().manual_seed(0))
    return encoder


def test_the_exported_encoder_in_timm_computes_the_mean_of_the_teachers_tokens(tmp_path, teacher):
    saved = checkpoint.read(write(tmp_path, 1, teacher_state=teacher.state_dict()))
    checkpoint.export_encoder(saved, tmp_path / "exported")
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    model = eval(config["call"], {"timm": timm}).eval()
    load_model(model, tmp_path / "exported" / "encoder.safetensors")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = teacher(images, None).unflatten(0, (2, 16))
        torch.testing.assert_close(model(images), tokens.mean(1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.forward_features(images), tokens, atol=1e-5, rtol=1e-5)


def test_an_export_overwrites_nothing(tmp_path, teacher):
    saved = checkpoint.read(write(tmp_path, 1, teacher_state=teacher.state_dict()))
    (tmp_path / "exported").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoint.export_encoder(saved, tmp_path / "exported")
