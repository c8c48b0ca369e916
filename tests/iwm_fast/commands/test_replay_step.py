"""A run with an action log: what it logs survives what ends it, and is rendered again as training saw it."""

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
from iwm_fast.commands.replay_step import rendered_again, replay
from iwm_fast.config.commands import ReplayConfig
from iwm_fast.config.loading import iter_settings, save_config
from iwm_fast.config.run import RunConfig
from iwm_fast.pipelines.action_log.files import ActionLogError, list_log_files, read_rows, read_step
from iwm_fast.pipelines.action_log.schema import column, read_metadata
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import DataConfig, LoaderConfig
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.runtime import distributed
from iwm_fast.train import run
from iwm_fast.training.components import build_components
from iwm_fast.training.pretraining import PretrainTask
from iwm_fast.training.trainer import Trainer


@pytest.fixture
def damaged_shards(tmp_path) -> TinyShards:
    """Two shards of twelve photographs, one of which only its decoder finds to be damaged."""
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
    return replace(config, views=replace(config.views, source_crop=(0.3, 0.9), source_flip_probability=0.5))


def captured_run(config: RunConfig) -> list[Batch]:
    """Train, and return every batch that the networks received."""
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
def test_the_views_of_a_step_are_rendered_again_bit_for_bit(damaged_shards, tmp_path, backend):
    config = with_source_geometry(
        logged_run(damaged_shards, tmp_path / "run", loader=backend, micro_batch_size=4, max_bad_samples=2.0)
    )
    batches = captured_run(replace(config, optim=replace(config.optim, epochs=4.0)))
    assert sum(int((batch.sample != batch.scheduled_sample).sum()) for batch in batches) == 4, "once in each epoch"
    last = batches[-1].step
    for step in (0, last // 2, last):
        seen = [batch for batch in batches if batch.step == step]
        path = replay(ReplayConfig(run=config.output.folder, step=step, format="tensors"))
        assert path == tmp_path / "run" / f"replay-step-{step:08}.safetensors"
        tensors = load_file(path)
        for name in ("source_view", "target_view"):
            assert torch.equal(tensors[name], torch.cat([denormalize_view(getattr(batch, name)) for batch in seen]))
        for name in ("action", "slot", "sample"):
            assert torch.equal(tensors[name], torch.cat([getattr(batch, name) for batch in seen])), name
    assert not torch.equal(tensors["source_view"], tensors["target_view"])


def test_a_replayed_batch_has_all_that_training_received(damaged_shards, tmp_path):
    config = with_source_geometry(logged_run(damaged_shards, tmp_path / "run", loader="torch", max_bad_samples=2.0))
    batches = captured_run(config)
    (seen,) = [batch for batch in batches if (batch.sample != batch.scheduled_sample).any()][:1]
    rows = read_step(tmp_path / "run" / "actions", seen.step)
    shards = open_shards(damaged_shards.pattern)
    (again,) = rendered_again(rows, read_metadata(rows.schema), shards, loader_settings("torch"), torch.device("cpu"))
    for name in ("source_view", "target_view", "scheduled_sample", "label", "crop_window", "source_window"):
        assert torch.equal(getattr(again, name), getattr(seen, name)), name
    for name in ("context", "target"):
        mine, other = getattr(again, name), getattr(seen, name)
        assert torch.equal(mine.row, other.row) and (mine.total, mine.longest) == (other.total, other.longest)
    assert (again.key, again.step) == (seen.key, seen.step)


def test_the_step_before_an_epoch_began_anew_is_rendered_with_the_settings_it_had(tiny_shards, tmp_path):
    config = logged_run(tiny_shards, tmp_path / "run", loader="torch")
    batches = captured_run(replace(config, output=replace(config.output, checkpoint_every=8)))
    shutil.rmtree(checkpoints.newest(tmp_path / "run"))
    other = replace(
        config,
        seed=5,
        data=replace(config.data, restart_epoch=True),
        views=replace(config.views, hue=0.3),
        optim=replace(config.optim, global_batch_size=8),
    )
    after = captured_run(other)
    for step, seen in ((7, batches[7]), (8, after[0])):
        tensors = load_file(replay(ReplayConfig(run=config.output.folder, step=step, format="tensors")))
        assert torch.equal(tensors["source_view"], denormalize_view(seen.source_view))
        assert torch.equal(tensors["action"], seen.action)


def test_a_picture_is_drawn_from_the_command_line(tiny_shards, tmp_path, capsys):
    run(logged_run(tiny_shards, tmp_path / "run"))
    main(["replay", f"run={tmp_path / 'run'}", "step=3"])
    main(["replay", f"run={tmp_path / 'run'}", "step=3", "num_images=2", "first_slot=5", "backend=torch",
          f"out={tmp_path / 'sheets' / 'some.png'}"])  # fmt: skip
    first, second = map(Path, capsys.readouterr().out.split())
    assert (first, second) == (tmp_path / "run" / "replay-step-00000003.png", tmp_path / "sheets" / "some.png")
    assert second.read_bytes().startswith(b"\x89PNG") and first.stat().st_size > second.stat().st_size


def test_every_setting_of_a_replay_is_explained():
    assert all(text.endswith(".") for _, _, _, text in iter_settings(ReplayConfig))


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["replay", *arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_replayed_is_refused_with_what_there_is(tiny_shards, tmp_path, capsys):
    config = logged_run(tiny_shards, tmp_path / "run")
    run(config)
    run(tiny_run(tiny_shards, tmp_path / "unlogged"))
    logged = f"run={tmp_path / 'run'}"
    assert "run must name the folder" in refused(capsys, "step=1")
    assert "is not a run folder" in refused(capsys, f"run={tmp_path}", "step=1")
    assert "train with output.action_log=true" in refused(capsys, f"run={tmp_path / 'unlogged'}", "step=1")
    assert f"step 12 is not in {tmp_path}/run/actions, which holds steps 0 .. 11" in refused(capsys, logged, "step=12")
    assert f"step must be one of those in {tmp_path}/run/actions, 0 .. 11; none was given" in refused(capsys, logged)
    assert "first_slot must lie in 0 .. 15, got 16" in refused(capsys, logged, "step=1", "first_slot=16")
    assert "did you mean 'format'?" in refused(capsys, logged, "step=1", "formt=png")


def test_shards_that_moved_are_found_and_shards_that_changed_are_refused(damaged_shards, tmp_path):
    run(logged_run(damaged_shards, tmp_path / "run", loader="torch", max_bad_samples=2.0))
    moved = tmp_path / "moved"
    damaged_shards.folder.rename(moved)
    ask = ReplayConfig(run=str(tmp_path / "run"), step=2, format="tensors")
    with pytest.raises(FileNotFoundError, match=r"0\.tar"):
        replay(ask)
    replay(replace(ask, shards=str(moved)))
    sample = int(column(read_step(tmp_path / "run" / "actions", 2), "sample")[0])
    with pytest.raises(ActionLogError, match=r"sample \d+ .* was in slot \d+, there are 12 now; give the shards"):
        replay(replace(ask, shards=str(moved / "0.tar")))
    with pytest.raises(ActionLogError, match=rf"sample {sample} in slot 0 was '{sample:02}' of .*, it is '") as caught:
        replay(replace(ask, shards=f"{moved / '1.tar'}::{moved / '0.tar'}"))
    assert "shards=..." in str(caught.value)
    # the same keys, but one image is another one
    image = encode(photograph("coffee.png")[:90, :70])
    write_tar(moved / "1.tar", [(f"{number:02}.jpg", image) for number in range(12, 24)])
    with pytest.raises(ActionLogError, match=r"have changed since \(other sizes"):
        replay(replace(ask, shards=str(moved)))


def test_another_image_of_the_same_name_and_size_is_noticed_by_its_window(tiny_shards, tmp_path):
    for folder, shape in (("then", (64, 96)), ("now", (96, 64))):
        (tmp_path / folder).mkdir()
        image = encode(photograph("coffee.png")[: shape[0], : shape[1]])
        padded = image + bytes(12_000 - len(image))
        write_tar(tmp_path / folder / "0.tar", [(f"{number:02}.jpg", padded) for number in range(24)])
    config = logged_run(tiny_shards, tmp_path / "run", loader="torch")
    run(replace(config, data=DataConfig(train=str(tmp_path / "then"))))
    with pytest.raises(ActionLogError, match=r"crop_window of step 0, slot 0, sample '\d\d' is .*, logged is"):
        replay(ReplayConfig(run=str(tmp_path / "run"), step=0, shards=str(tmp_path / "now")))


def test_a_run_without_a_log_writes_none_and_drops_rows_that_it_will_not_make_again(tiny_shards, tmp_path):
    config = logged_run(tiny_shards, tmp_path / "run", loader="torch")
    run(config)
    shutil.rmtree(checkpoints.newest(tmp_path / "run"))
    run(replace(config, output=replace(config.output, action_log=False)))
    assert [(part.first_step, part.end_step) for part in list_log_files(tmp_path / "run" / "actions")] == [
        (0, 5),
        (5, 10),
    ]
    run(tiny_run(tiny_shards, tmp_path / "unlogged", loader="torch"))
    assert not (tmp_path / "unlogged" / "actions").exists()


# trains until step 7, behind the checkpoint of step 5, and then lets happen what the second argument says
STRUCK = """
import os, resource, signal, sys, time
from iwm_fast.checkpoints.checkpoint import newest
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
            # written beside training
            while newest(trainer.folder) is None:
                time.sleep(0.01)
            if sys.argv[2] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            # every write behind the 8000th byte of a file fails from now on, as on a full disk
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
def test_a_killed_run_has_logged_as_far_as_its_checkpoint_and_goes_on_without_a_gap(tiny_shards, tmp_path):
    straight = logged_run(tiny_shards, tmp_path / "straight", loader="torch")
    run(straight)
    config = logged_run(tiny_shards, tmp_path / "killed", loader="torch")
    killed = struck(config, tmp_path, "kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    actions = tmp_path / "killed" / "actions"
    assert checkpoints.newest(tmp_path / "killed").name == "step-00000005"
    assert [part.path.name for part in list_log_files(actions)] == ["step-00000000-00000005-rank-000.parquet"]
    # what another rank was writing
    (actions / ".unfinished-rank-001.parquet").write_bytes(b"PAR1")
    run(config)
    assert read_rows(actions, 0, STEPS).equals(read_rows(tmp_path / "straight" / "actions", 0, STEPS))
    assert not list(actions.glob(".*"))


@pytest.mark.launcher
def test_a_full_disk_ends_the_run_with_one_message_and_it_goes_on_from_the_checkpoint(tiny_shards, tmp_path):
    config = logged_run(tiny_shards, tmp_path / "full", loader="torch")
    ended = struck(config, tmp_path, "full")
    assert ended.returncode == 2
    assert "File too large" in ended.stderr and "Traceback" not in ended.stderr
    actions = tmp_path / "full" / "actions"
    assert f"while writing the action log in {actions}; free space there" in ended.stderr
    assert "output.action_log=false" in ended.stderr and "resume=auto" in ended.stderr
    # nothing half written, and no checkpoint that the log does not reach
    assert sorted(path.name for path in actions.iterdir()) == ["step-00000000-00000005-rank-000.parquet"]
    assert checkpoints.newest(tmp_path / "full").name == "step-00000005"
    assert len(read_rows(actions, 0, 5)) == 5 * 16
    assert run(config).step == STEPS
    assert len(read_rows(actions, 0, STEPS)) == STEPS * 16


@pytest.mark.launcher
def test_two_ranks_log_together_and_one_goes_on_alone(tiny_shards, tmp_path):
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
