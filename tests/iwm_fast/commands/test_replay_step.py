"""Action logs survive kills and full disks, and `iwm replay` renders their steps exactly as training saw them."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fixtures.tar_files import TinyShards, encode, photograph, write_tar
from fixtures.tiny_pretraining import STEPS, tiny_run
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.cli import main
from iwm_fast.commands.replay_step import render_again, replay_step
from iwm_fast.config.commands import ReplayConfig
from iwm_fast.config.loading import iter_settings, save_config
from iwm_fast.config.run import RunConfig
from iwm_fast.pipelines.action_log.files import ActionLogError, list_log_files, read_rows, read_step
from iwm_fast.pipelines.action_log.schema import column, read_metadata
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import IMAGENET, DataConfig, LoaderConfig
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.runtime import distributed
from iwm_fast.train import run
from iwm_fast.training.components import build_components
from iwm_fast.training.pretraining import PretrainTask
from iwm_fast.training.trainer import Trainer


@pytest.fixture
def damaged_shards(tmp_path) -> TinyShards:
    """Return two shards of twelve images, one of which is damaged in a way that only its decoder detects."""
    pixels = photograph("chelsea.png")
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        members = []
        for number in range(12 * shard, 12 * shard + 12):
            crop = pixels[number : number + 60 + number, 2 * number : 3 * number + 70]
            content = encode(crop, "PNG" if number == 5 else "JPEG")
            if number == 5:
                content = content[:1000] + bytes([content[1000] ^ 0xFF]) + content[1001:]
            members += [(f"{number:02}.{'png' if number == 5 else 'jpg'}", content)]
        write_tar(folder / f"{shard}.tar", members)
    return TinyShards(pattern=str(folder / "{0..1}.tar"), folder=folder, num_samples=24)


def logged_run(shards, folder: Path, **runtime) -> RunConfig:
    config = tiny_run(shards, folder, **runtime)
    return replace(config, output=replace(config.output, action_log=True), resume="auto")


def with_source_geometry(config: RunConfig) -> RunConfig:
    return replace(
        config,
        views=replace(
            config.views,
            crop=replace(config.views.crop, source_scale=(0.3, 0.9)),
            flip=replace(config.views.flip, source_probability=0.5),
        ),
    )


def captured_run(config: RunConfig) -> list[Batch]:
    """Train, and return all batches that the networks received."""
    batches = []
    try:
        trainer = build_components(config, distributed.start("cpu"))
        forward = trainer.engine.forward
        trainer.engine.forward = lambda batch: forward(batches.append(batch) or batch)
        Trainer(PretrainTask(trainer)).run()
    finally:
        distributed.stop()
    return batches


def loader_settings(backend: str) -> LoaderConfig:
    return LoaderConfig(loader=backend, reader_threads=1, loader_threads=1, prefetch=1)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_rendered_views_equal_those_of_training_bit_for_bit(damaged_shards, tmp_path, backend):
    config = with_source_geometry(
        logged_run(damaged_shards, tmp_path / "run", loader=backend, micro_batch_size=4, max_bad_samples=2.0)
    )
    batches = captured_run(replace(config, optim=replace(config.optim, epochs=4.0)))
    assert sum(int((batch.sample != batch.scheduled_sample).sum()) for batch in batches) == 4, "once in each epoch"
    last = batches[-1].step
    for step in (0, last // 2, last):
        trained = [batch for batch in batches if batch.step == step]
        path = replay_step(ReplayConfig(run=config.output.folder, step=step, format="tensors"))
        assert path == tmp_path / "run" / f"replay-step-{step:08}.safetensors"
        tensors = load_file(path)
        for name in ("source_view", "target_view"):
            pixels = [denormalize_view(getattr(batch, name), IMAGENET) for batch in trained]
            assert torch.equal(tensors[name], torch.cat(pixels))
        for name in ("action", "slot", "sample"):
            assert torch.equal(tensors[name], torch.cat([getattr(batch, name) for batch in trained])), name
    assert not torch.equal(tensors["source_view"], tensors["target_view"])


def test_a_replayed_batch_equals_the_batch_of_training(damaged_shards, tmp_path):
    config = with_source_geometry(logged_run(damaged_shards, tmp_path / "run", loader="torch", max_bad_samples=2.0))
    batches = captured_run(config)
    trained = next(batch for batch in batches if (batch.sample != batch.scheduled_sample).any())
    rows = read_step(tmp_path / "run" / "actions", trained.step)
    shards = open_shards(damaged_shards.pattern)
    metadata, device = read_metadata(rows.schema), torch.device("cpu")
    (replayed,) = render_again(rows, metadata, shards, loader_settings("torch"), device)
    for name in ("source_view", "target_view", "scheduled_sample", "label", "crop_window", "source_window"):
        assert torch.equal(getattr(replayed, name), getattr(trained, name)), name
    for name in ("context", "target"):
        actual, expected = getattr(replayed, name), getattr(trained, name)
        assert torch.equal(actual.row, expected.row)
        assert (actual.total, actual.lengths) == (expected.total, expected.lengths)
    assert (replayed.key, replayed.step) == (trained.key, trained.step)


def test_steps_before_a_restarted_epoch_are_rendered_with_old_settings(tiny_shards, tmp_path):
    config = logged_run(tiny_shards, tmp_path / "run", loader="torch")
    batches = captured_run(replace(config, output=replace(config.output, checkpoint_every=8)))
    shutil.rmtree(checkpoints.find_newest_folder(tmp_path / "run"))
    changed = replace(
        config,
        seed=5,
        data=replace(config.data, restart_epoch=True),
        views=replace(config.views, jitter=replace(config.views.jitter, hue=0.3)),
        optim=replace(config.optim, global_batch_size=8),
    )
    after = captured_run(changed)
    for step, trained in ((7, batches[7]), (8, after[0])):
        tensors = load_file(replay_step(ReplayConfig(run=config.output.folder, step=step, format="tensors")))
        assert torch.equal(tensors["source_view"], denormalize_view(trained.source_view, IMAGENET))
        assert torch.equal(tensors["action"], trained.action)


def test_a_picture_is_drawn_from_the_command_line(tiny_shards, tmp_path, capsys):
    run(logged_run(tiny_shards, tmp_path / "run"))
    main(["replay", f"run={tmp_path / 'run'}", "step=3"])
    main(["replay", f"run={tmp_path / 'run'}", "step=3", "num_images=2", "first_slot=5", "backend=torch",
          f"out={tmp_path / 'sheets' / 'some.png'}"])  # fmt: skip
    first, second = map(Path, capsys.readouterr().out.split())
    assert (first, second) == (tmp_path / "run" / "replay-step-00000003.png", tmp_path / "sheets" / "some.png")
    assert second.read_bytes().startswith(b"\x89PNG") and first.stat().st_size > second.stat().st_size


def test_all_settings_of_a_replay_have_explanations():
    assert all(text.endswith(".") for _, _, _, text in iter_settings(ReplayConfig))


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main(["replay", *arguments])
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def test_refusals_name_the_problem_and_the_steps_in_the_log(tiny_shards, tmp_path, capsys):
    config = logged_run(tiny_shards, tmp_path / "run")
    run(config)
    run(tiny_run(tiny_shards, tmp_path / "unlogged"))
    logged = f"run={tmp_path / 'run'}"
    assert "run must name the folder" in refused(capsys, "step=1")
    assert "is not a run folder" in refused(capsys, f"run={tmp_path}", "step=1")
    assert "train with output.action_log=true" in refused(capsys, f"run={tmp_path / 'unlogged'}", "step=1")
    assert f"step 12 is not in {tmp_path}/run/actions, which holds steps 0 .. 11" in refused(capsys, logged, "step=12")
    assert f"one of the steps in {tmp_path}/run/actions, 0 .. 11, but is not set" in refused(capsys, logged)
    assert "first_slot must lie in 0 .. 15, got 16" in refused(capsys, logged, "step=1", "first_slot=16")
    assert "did you mean 'format'?" in refused(capsys, logged, "step=1", "formt=png")


def test_moved_shards_are_accepted_and_changed_shards_are_refused(damaged_shards, tmp_path):
    run(logged_run(damaged_shards, tmp_path / "run", loader="torch", max_bad_samples=2.0))
    moved = tmp_path / "moved"
    damaged_shards.folder.rename(moved)
    request = ReplayConfig(run=str(tmp_path / "run"), step=2, format="tensors")
    with pytest.raises(FileNotFoundError, match=r"0\.tar"):
        replay_step(request)
    replay_step(replace(request, shards=str(moved)))
    sample = int(column(read_step(tmp_path / "run" / "actions", 2), "sample")[0])
    with pytest.raises(ActionLogError, match=r"slot \d+ had sample \d+ .*, but there are only 12 samples now; set"):
        replay_step(replace(request, shards=str(moved / "0.tar")))
    with pytest.raises(ActionLogError, match=rf"sample {sample} in slot 0 was '{sample:02}' of .*, now '") as caught:
        replay_step(replace(request, shards=f"{moved / '1.tar'}::{moved / '0.tar'}"))
    assert "shards=..." in str(caught.value)
    # The keys stay the same, but the images of a shard are replaced by another one.
    image = encode(photograph("coffee.png")[:90, :70])
    write_tar(moved / "1.tar", [(f"{number:02}.jpg", image) for number in range(12, 24)])
    with pytest.raises(ActionLogError, match=r"have changed since the step was trained \(sizes"):
        replay_step(replace(request, shards=str(moved)))


def test_a_replaced_image_of_the_same_size_in_bytes_is_refused(tiny_shards, tmp_path):
    for folder, shape in (("then", (64, 96)), ("now", (96, 64))):
        (tmp_path / folder).mkdir()
        image = encode(photograph("coffee.png")[: shape[0], : shape[1]])
        padded = image + bytes(12_000 - len(image))
        write_tar(tmp_path / folder / "0.tar", [(f"{number:02}.jpg", padded) for number in range(24)])
    config = logged_run(tiny_shards, tmp_path / "run", loader="torch")
    run(replace(config, data=DataConfig(train=str(tmp_path / "then"))))
    with pytest.raises(ActionLogError, match=r"crop_window of step 0, slot 0, sample '\d\d' is .*, but the log has"):
        replay_step(ReplayConfig(run=str(tmp_path / "run"), step=0, shards=str(tmp_path / "now")))


def test_a_run_without_a_log_writes_none_and_drops_superseded_rows(tiny_shards, tmp_path):
    config = logged_run(tiny_shards, tmp_path / "run", loader="torch")
    run(config)
    shutil.rmtree(checkpoints.find_newest_folder(tmp_path / "run"))
    run(replace(config, output=replace(config.output, action_log=False)))
    files = list_log_files(tmp_path / "run" / "actions")
    assert [(file.first_step, file.end_step) for file in files] == [(0, 5), (5, 10)]
    run(tiny_run(tiny_shards, tmp_path / "unlogged", loader="torch"))
    assert not (tmp_path / "unlogged" / "actions").exists()


# Trains until step 7, after the checkpoint of step 5. Then it kills itself or simulates a full disk.
STRUCK = """
import os, resource, signal, sys, time
from iwm_fast.checkpoints.checkpoint import find_newest_folder
from iwm_fast.runtime import distributed
from iwm_fast.runtime.error_reporting import user_facing_errors
from iwm_fast.config.loading import load_config
from iwm_fast.training.pretraining import PretrainTask
from iwm_fast.training.trainer import Trainer
from iwm_fast.training.components import build_components

with user_facing_errors():
    trainer = build_components(load_config(sys.argv[1]), distributed.start("cpu"))
    forward, steps_left = trainer.engine.forward, iter(range(7))

    def strike(batch):
        if next(steps_left, None) is None:
            # The checkpoint is written by a thread while training continues.
            while find_newest_folder(trainer.folder) is None:
                time.sleep(0.01)
            if sys.argv[2] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            # From now on, writes beyond byte 8000 of a file fail, as on a full disk.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
        return forward(batch)

    trainer.engine.forward = strike
    Trainer(PretrainTask(trainer)).run()
"""


def struck(config: RunConfig, folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    save_config(config, folder / f"{how}.yaml")
    command = [sys.executable, "-c", STRUCK, str(folder / f"{how}.yaml"), how]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.launcher
def test_a_killed_run_resumes_from_its_checkpoint_without_a_gap_in_its_log(tiny_shards, tmp_path):
    straight = logged_run(tiny_shards, tmp_path / "straight", loader="torch")
    run(straight)
    config = logged_run(tiny_shards, tmp_path / "killed", loader="torch")
    killed = struck(config, tmp_path, "kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    actions = tmp_path / "killed" / "actions"
    assert checkpoints.find_newest_folder(tmp_path / "killed").name == "step-00000005"
    assert [file.path.name for file in list_log_files(actions)] == ["step-00000000-00000005-rank-000.parquet"]
    # A file that another rank had not finished.
    (actions / ".unfinished-rank-001.parquet").write_bytes(b"PAR1")
    run(config)
    assert read_rows(actions, 0, STEPS).equals(read_rows(tmp_path / "straight" / "actions", 0, STEPS))
    assert not list(actions.glob(".*"))


@pytest.mark.slow
@pytest.mark.launcher
def test_a_full_disk_ends_a_run_with_one_message_and_it_can_resume(tiny_shards, tmp_path):
    config = logged_run(tiny_shards, tmp_path / "full", loader="torch")
    result = struck(config, tmp_path, "full")
    assert result.returncode == 2
    assert "File too large" in result.stderr and "Traceback" not in result.stderr
    actions = tmp_path / "full" / "actions"
    assert f"while writing the action log in {actions}: raise the limit" in result.stderr
    assert "output.action_log=false" in result.stderr and "resume=auto" in result.stderr
    # There are no unfinished files, and no checkpoint is newer than the log.
    assert sorted(path.name for path in actions.iterdir()) == ["step-00000000-00000005-rank-000.parquet"]
    assert checkpoints.find_newest_folder(tmp_path / "full").name == "step-00000005"
    assert len(read_rows(actions, 0, 5)) == 5 * 16
    assert run(config).step == STEPS
    assert len(read_rows(actions, 0, STEPS)) == STEPS * 16


@pytest.mark.launcher
@pytest.mark.slow
def test_two_ranks_share_a_log_that_one_rank_continues(tiny_shards, tmp_path):
    config = logged_run(tiny_shards, tmp_path / "run", loader="torch")
    save_config(config, tmp_path / "run.yaml")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "--master-port", port]
    command = [*torchrun, "-m", "iwm_fast.train", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "started.jsonl").read_text())["world_size"] == 2
    for name in ("step-00000010", "step-00000012"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    run(config)
    rows = read_rows(tmp_path / "run" / "actions", 0, STEPS)
    rank = column(rows, "rank").reshape(STEPS, 16)
    assert (rank[:5] == np.repeat([0, 1], 8)).all() and (rank[5:] == 0).all()
    straight = logged_run(tiny_shards, tmp_path / "straight", loader="torch")
    run(straight)
    expected = read_rows(tmp_path / "straight" / "actions", 0, STEPS)
    assert rows.drop_columns("rank").equals(expected.drop_columns("rank"))
