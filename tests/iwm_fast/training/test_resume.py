"""Resuming: from the newest complete checkpoint, with other data in a restarted epoch, or for more epochs."""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fixtures.launchers import CHILD_ENVIRONMENT, free_port, tiny_yaml
from fixtures.paths import WORKERS
from fixtures.tar_files import TinyShards
from fixtures.tiny_pretraining import tiny_run
from iwm_fast import world_model
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.config.fingerprint import fingerprint
from iwm_fast.config.run import RunConfig
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.pipelines.sampling.batch_plan import StreamStart
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.runtime import distributed
from iwm_fast.runtime.preemption import PreemptedError, Preemption
from iwm_fast.train import run
from iwm_fast.training.loaders import training_loader
from iwm_fast.training.schedules import build_schedules

# Of 12 steps of 16 images, this one is in the third of four epochs of 48.
HALF = 8


def half_trained(shards: TinyShards, folder: Path) -> RunConfig:
    """Train to the end and delete the last checkpoint, as if the run had been stopped at step 8."""
    config = tiny_run(shards, folder)
    config = replace(config, output=replace(config.output, checkpoint_every=HALF), resume="auto")
    run(config)
    shutil.rmtree(checkpoints.find_newest_folder(folder))
    assert checkpoints.find_newest_folder(folder).name == f"step-{HALF:08}"
    return config


def restarted(config: RunConfig) -> RunConfig:
    return replace(config, data=replace(config.data, restart_epoch=True))


CHANGES = {
    "seed": lambda config: replace(config, seed=3),
    "views.jitter.brightness": lambda config: replace(
        config, views=replace(config.views, jitter=replace(config.views.jitter, brightness=0.1))
    ),
    "mask.num_target_blocks": lambda config: replace(config, mask=replace(config.mask, num_target_blocks=3)),
    "data.shuffle_window": lambda config: replace(config, data=replace(config.data, shuffle_window=3)),
    "optim.global_batch_size": lambda config: replace(config, optim=replace(config.optim, global_batch_size=8)),
    "data.train": lambda config: replace(
        config, data=replace(config.data, train=config.data.train.replace("000002}", "000001}"))
    ),
}


def stream(config: RunConfig) -> tuple[StreamStart, torch.Tensor]:
    """Return where the stream of the newest checkpoint begins, and the samples from there up to the checkpoint."""
    saved = checkpoints.read(checkpoints.find_newest_folder(Path(config.output.folder)))
    start = StreamStart(**saved.counters["stream"])
    rank_info = distributed.start("cpu")
    loader = training_loader(config, open_shards(config.data.train), rank_info, start.step, start)
    try:
        return start, torch.cat([next(loader).sample for _ in range(saved.step - start.step)])
    finally:
        loader.close()
        distributed.stop()


@pytest.fixture(scope="module")
def half(tiny_shards, tmp_path_factory):
    return half_trained(tiny_shards, tmp_path_factory.mktemp("half") / "run")


@pytest.mark.parametrize("name", CHANGES)
def test_changed_data_settings_are_refused_unless_the_epoch_restarts(half, tmp_path, name):
    shutil.copytree(half.output.folder, tmp_path / "run")
    config = CHANGES[name](replace(half, output=replace(half.output, folder=str(tmp_path / "run"))))
    with pytest.raises(CheckpointError, match=rf"(?s)  {name}: .* -> .*data.restart_epoch=true continues") as caught:
        run(config)
    assert str(caught.value).count(" -> ") == 2, "the heading and one setting are listed"
    config = restarted(config)
    run(config)
    # Two epochs were complete, so the third one restarts and the fourth one follows.
    start, samples = stream(config)
    num_samples = open_shards(config.data.train).num_samples
    assert start == StreamStart(step=HALF, position=2 * num_samples)
    counts = torch.bincount(samples, minlength=num_samples)
    # The last global batch may go beyond the fourth epoch.
    assert counts.min() == 2 and counts.sum() - 2 * num_samples < config.optim.global_batch_size
    assert (torch.bincount(samples[:num_samples]) == 1).all()


def test_after_a_restarted_epoch_the_run_resumes_like_any_other(half, tmp_path):
    shutil.copytree(half.output.folder, tmp_path / "straight")
    config = restarted(CHANGES["seed"](half))
    config = replace(config, output=replace(config.output, checkpoint_every=2, folder=str(tmp_path / "straight")))
    run(config)
    states = [checkpoints.read(path) for path in sorted((tmp_path / "straight/checkpoints").glob("step-*"))]
    # Stop again after the restart, and resume without and with the flag.
    for flag in (False, True):
        folder = tmp_path / f"stopped-{flag}"
        shutil.copytree(tmp_path / "straight", folder)
        shutil.rmtree(checkpoints.find_newest_folder(folder))
        again = replace(config, data=replace(config.data, restart_epoch=flag))
        run(replace(again, output=replace(again.output, folder=str(folder))))
        state = checkpoints.read(checkpoints.find_newest_folder(folder))
        assert state.step == states[-1].step == 14 and state.counters["stream"] == states[-1].counters["stream"]
        for name, value in states[-1].engine_state.items():
            assert torch.equal(value, state.engine_state[name]), name
        assert [row["step"] for row in read_metrics(folder)] == [4, 8, 12, 14]


def test_changed_network_settings_are_refused_even_with_a_restart(half, tmp_path):
    shutil.copytree(half.output.folder, tmp_path / "run")
    config = restarted(replace(half, output=replace(half.output, folder=str(tmp_path / "run"))))
    other = replace(config, optim=replace(config.optim, betas=(0.8, 0.9)), seed=4)
    with pytest.raises(CheckpointError, match=r"(?s)optim.betas: .*seed: 0 -> 4\nset them back"):
        run(other)


def test_restart_epoch_is_not_in_the_fingerprint(half):
    assert fingerprint(half, "x") == fingerprint(restarted(half), "x")
    assert "data.restart_epoch" not in fingerprint(half, "x")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    saved = checkpoints.read(checkpoints.find_newest_folder(folder))
    return saved.engine_state | {f"teacher/{name}": value for name, value in saved.teacher_state.items()}


def assert_bit_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name, value in first.items() if not torch.equal(value, second[name])]


def in_folder(config: RunConfig, folder: Path, **output) -> RunConfig:
    return replace(config, output=replace(config.output, folder=str(folder), **output))


@pytest.fixture(scope="module")
def finished(half, tmp_path_factory):
    """Return the settings of a finished run that has checkpoints of steps 8 and 12."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(half.output.folder, folder)
    config = in_folder(half, folder)
    run(config)
    return config


def test_a_damaged_checkpoint_is_renamed_and_its_steps_are_repeated(finished, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(finished.output.folder, folder)
    flip_a_bit(checkpoints.find_newest_folder(folder) / "model.safetensors")
    damaged = (checkpoints.find_newest_folder(folder) / "model.safetensors").read_bytes()
    assert run(in_folder(finished, folder)).step == 12
    (warning,) = [record.getMessage() for record in caplog.records if "resuming from step" in record.getMessage()]
    assert "step-00000012/model.safetensors is {'size_bytes'" in warning
    assert "resuming from step 8 instead" in warning and "renamed to" in warning
    assert "step-00000012.refused: check it" in warning
    assert_bit_equal(state_of(folder), state_of(Path(finished.output.folder)))
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000008", "step-00000012", "step-00000012.refused"]
    assert (folder / "checkpoints" / names[2] / "model.safetensors").read_bytes() == damaged
    assert [row["step"] for row in read_metrics(folder)] == [4, 8, 12]


def test_without_a_complete_checkpoint_the_run_ends_and_moves_nothing(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.output.folder, folder)
    for damaged in checkpoints.list_checkpoint_folders(folder):
        flip_a_bit(damaged / "state.json")
    before = sorted((folder / "checkpoints").rglob("*"))
    with pytest.raises(CheckpointError, match=r"(?s)none of .*step-00000012/state.*step-00000008/state.*from a backup"):
        run(in_folder(finished, folder))
    assert sorted((folder / "checkpoints").rglob("*")) == before


def test_a_refused_run_moves_no_damaged_checkpoint(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.output.folder, folder)
    flip_a_bit(checkpoints.find_newest_folder(folder) / "state.json")
    with pytest.raises(CheckpointError, match="seed: 0 -> 5"):
        run(replace(in_folder(finished, folder), seed=5))
    assert [checkpoints.parse_step(path) for path in checkpoints.list_checkpoint_folders(folder)] == [8, 12]


def test_instead_of_a_damaged_checkpoint_the_previous_one_is_loaded(finished, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(finished.output.folder, folder)
    flip_a_bit(checkpoints.find_newest_folder(folder) / "model.safetensors")
    assert world_model.load(folder).step == 8
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "step-00000012/model.safetensors is" in warning and "loading step 8 instead" in warning
    assert [checkpoints.parse_step(path) for path in checkpoints.list_checkpoint_folders(folder)] == [8, 12], (
        "loading moves no checkpoint"
    )


def test_only_resume_extend_continues_a_finished_run_for_more_epochs(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.output.folder, folder)
    longer = in_folder(finished, folder)
    longer = replace(longer, optim=replace(longer.optim, epochs=6.0))
    with pytest.raises(CheckpointError, match=r"optim.epochs: 4.0 -> 6.0\nresume=extend continues"):
        run(longer)
    assert run(replace(longer, resume="extend")).step == 18
    # The samples are those of a run of six epochs, and so are the schedules from here on.
    start, samples = stream(longer)
    assert start == StreamStart() and (torch.bincount(samples) == 6).all()
    schedules, before = build_schedules(longer.optim, 48), build_schedules(finished.optim, 48)
    rows = {row["step"]: row["optim/lr"] for row in read_metrics(folder)}
    assert rows == {
        **{step: before.lr(step - 1) for step in (4, 8, 12)},
        **{step: schedules.lr(step - 1) for step in (16, 18)},
    }
    # This is the run's number of epochs from now on, so resume=auto accepts it.
    assert run(longer).step == 18


def test_an_extended_run_can_restart_its_epoch_with_other_data(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.output.folder, folder)
    longer = replace(in_folder(finished, folder), seed=3, optim=replace(finished.optim, epochs=6.0))
    with pytest.raises(CheckpointError, match=r"data.restart_epoch=true continues .*, and resume=extend continues"):
        run(replace(longer, resume="extend"))
    assert run(restarted(replace(longer, resume="extend"))).step == 18
    start, samples = stream(longer)
    assert start == StreamStart(step=12, position=4 * 48) and (torch.bincount(samples) == 2).all()


def test_a_run_keeps_its_id_when_resumed_and_runs_have_different_ids(half, tiny_shards, tmp_path):
    folder = tmp_path / "run"
    config = in_folder(replace(tiny_run(tiny_shards, folder), resume="auto"), folder)
    run_ids = [run(config).run_id]
    # The second start finds no checkpoint, the third start one of step 5.
    shutil.rmtree(folder / "checkpoints")
    run_ids.append(run(config).run_id)
    # A line that a crash cut short.
    with (folder / "started.jsonl").open("a") as file:
        file.write('{"step": 5, "run_')
    for newer in checkpoints.list_checkpoint_folders(folder)[1:]:
        shutil.rmtree(newer)
    run_ids.append(run(config).run_id)
    assert len(set(run_ids)) == 1 and len(run_ids[0]) == 12
    assert [json.loads(line)["run_id"] for line in (folder / "started.jsonl").read_text().splitlines()[:2]] == run_ids[
        :2
    ]
    assert checkpoints.read(checkpoints.find_newest_folder(folder)).run_id == run_ids[0]
    assert checkpoints.read(checkpoints.find_newest_folder(Path(half.output.folder))).run_id != run_ids[0]


def test_training_draws_nothing_from_torchs_global_generator(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.output.folder, folder)
    shutil.rmtree(checkpoints.find_newest_folder(folder))
    torch.manual_seed(17)
    run(in_folder(finished, folder))
    assert_bit_equal(state_of(folder), state_of(Path(finished.output.folder)))


def test_tensorboard_drops_steps_after_the_checkpoint(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.output.folder, folder)
    shutil.rmtree(checkpoints.find_newest_folder(folder))
    run(in_folder(finished, folder))
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/prediction")] == [4, 8, 12]


def test_a_run_stopped_before_its_first_step_saves_nothing(half, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(half.output.folder, folder)
    preemption = Preemption()
    preemption.reason = "SIGTERM"
    with pytest.raises(PreemptedError):
        run(in_folder(half, folder), preemption)
    assert [checkpoints.parse_step(path) for path in checkpoints.list_checkpoint_folders(folder)] == [HALF]


def test_steps_before_a_restarted_epoch_count_as_they_are():
    optim = tiny_run(TinyShards(pattern="", folder=Path()), Path("x")).optim
    assert build_schedules(optim, 48).total_steps == 12
    # After 8 steps, two of four epochs remain, in batches of 16 and of 8.
    start = StreamStart(step=8, position=96)
    assert build_schedules(optim, 48, start).total_steps == 14
    assert build_schedules(replace(optim, global_batch_size=8), 48, start).total_steps == 20


@pytest.mark.multi_rank
def test_ranks_resume_with_their_own_init_from_and_end_together_if_one_cannot_read_the_checkpoint(
    half, tiny_shards, tmp_path
):
    settings = tiny_yaml(tmp_path / "run.yaml", tiny_shards, optim={"warmup_epochs": 0.5})
    port, ranks = free_port(), []
    for rank in "01":
        # Another machine may have the weights in another place.
        source = shutil.copytree(half.output.folder, tmp_path / f"source {rank}")
        launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(WORKERS / "ranks_resume.py"), str(settings), f"init_from={source}"]
        ranks.append(
            subprocess.Popen(
                [*command, f"output.folder={tmp_path / 'run'}"], env=os.environ | CHILD_ENVIRONMENT | launch,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    printed = [rank.communicate(timeout=120) for rank in ranks]
    assert [(rank.returncode, out) for rank, (out, _) in zip(ranks, printed, strict=True)] == [
        (0, "trained to step 6\n")
    ] * 2, printed
