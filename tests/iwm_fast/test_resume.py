"""Going on with other data: refused with the settings that differ, or from the beginning of an epoch if asked for."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from iwm_fast import checkpoint as checkpoints
from iwm_fast import distributed
from iwm_fast.commit import CheckpointError
from iwm_fast.config import RunConfig
from iwm_fast.data import training_loader
from iwm_fast.metrics import read_metrics
from iwm_fast.schedules import build_schedules
from iwm_fast.settings import fingerprint
from iwm_fast.train import run
from pipelines.plan import StreamStart
from pipelines.shards import open_shards
from samples import TinyShards
from tiny_runs import tiny_run

HALF = 8  # of 12 steps of 16 images: in the third of four epochs of 48


def half_trained(shards: TinyShards, folder: Path) -> RunConfig:
    """Train to the end and go back to an earlier checkpoint, as if the run had been stopped there."""
    config = tiny_run(shards, folder)
    config = replace(config, output=replace(config.output, checkpoint_every=HALF, resume="auto"))
    run(config)
    shutil.rmtree(checkpoints.newest(folder))
    assert checkpoints.newest(folder).name == f"step-{HALF:08}"
    return config


def restarted(config: RunConfig) -> RunConfig:
    return replace(config, data=replace(config.data, restart_epoch=True))


CHANGES = {
    "seed": lambda config: replace(config, seed=3),
    "views.brightness": lambda config: replace(config, views=replace(config.views, brightness=0.1)),
    "mask.num_target_blocks": lambda config: replace(config, mask=replace(config.mask, num_target_blocks=3)),
    "data.shuffle_window": lambda config: replace(config, data=replace(config.data, shuffle_window=3)),
    "optim.global_batch_size": lambda config: replace(config, optim=replace(config.optim, global_batch_size=8)),
    "data.train": lambda config: replace(
        config, data=replace(config.data, train=config.data.train.replace("000002}", "000001}"))
    ),
}


def stream(config: RunConfig) -> tuple[StreamStart, torch.Tensor]:
    """Return where the newest checkpoint's stream begins, and the samples of its steps up to the checkpoint."""
    saved = checkpoints.read(checkpoints.newest(Path(config.output.folder)))
    start = StreamStart(**saved.counters["stream"])
    place = distributed.start("cpu")
    loader = training_loader(config, open_shards(config.data.train), place, start.step, start)
    try:
        return start, torch.cat([next(loader).sample for _ in range(saved.step - start.step)])
    finally:
        loader.close()
        distributed.stop()


@pytest.fixture(scope="module")
def half(tiny_shards, tmp_path_factory):
    return half_trained(tiny_shards, tmp_path_factory.mktemp("half") / "run")


@pytest.mark.parametrize("name", CHANGES)
def test_another_data_stream_is_refused_by_name_and_can_begin_at_an_epoch(half, tmp_path, name):
    shutil.copytree(half.output.folder, tmp_path / "run")
    config = CHANGES[name](replace(half, output=replace(half.output, folder=str(tmp_path / "run"))))
    with pytest.raises(CheckpointError, match=rf"(?s)  {name}: .* -> .*data.restart_epoch=true goes on") as caught:
        run(config)
    assert str(caught.value).count(" -> ") == 2, "the heading and one setting"
    config = restarted(config)
    run(config)
    # two whole epochs were done: the third begins anew, and the fourth follows
    start, samples = stream(config)
    num_samples = open_shards(config.data.train).num_samples
    assert start == StreamStart(step=HALF, position=2 * num_samples)
    counts = torch.bincount(samples, minlength=num_samples)
    # the last global batch counts whole
    assert counts.min() == 2 and counts.sum() - 2 * num_samples < config.optim.global_batch_size
    assert (torch.bincount(samples[:num_samples]) == 1).all()


def test_after_the_restart_the_run_goes_on_like_any_other(half, tmp_path):
    shutil.copytree(half.output.folder, tmp_path / "straight")
    config = restarted(CHANGES["seed"](half))
    config = replace(config, output=replace(config.output, checkpoint_every=2, folder=str(tmp_path / "straight")))
    run(config)
    states = [checkpoints.read(path) for path in sorted((tmp_path / "straight/checkpoints").glob("step-*"))]
    # stopped again after the restart, and gone on without and with the flag
    for flag in (False, True):
        folder = tmp_path / f"stopped-{flag}"
        shutil.copytree(tmp_path / "straight", folder)
        shutil.rmtree(checkpoints.newest(folder))
        again = replace(config, data=replace(config.data, restart_epoch=flag))
        run(replace(again, output=replace(again.output, folder=str(folder))))
        state = checkpoints.read(checkpoints.newest(folder))
        assert state.step == states[-1].step == 14 and state.counters == states[-1].counters
        for name, value in states[-1].engine_state.items():
            assert torch.equal(value, state.engine_state[name]), name
        assert [row["step"] for row in read_metrics(folder)] == [4, 8, 12, 14]


def test_networks_that_differ_are_refused_even_so(half, tmp_path):
    shutil.copytree(half.output.folder, tmp_path / "run")
    config = restarted(replace(half, output=replace(half.output, folder=str(tmp_path / "run"))))
    other = replace(config, optim=replace(config.optim, lr=1e-3), seed=4)
    with pytest.raises(CheckpointError, match=r"(?s)optim.lr: .*seed: 0 -> 4\nset them back"):
        run(other)


def test_the_flag_itself_changes_nothing(half):
    assert fingerprint(half, "x") == fingerprint(restarted(half), "x")
    assert "data.restart_epoch" not in fingerprint(half, "x")


def test_steps_before_a_restart_count_as_they_are():
    optim = tiny_run(TinyShards(pattern="", folder=Path()), Path("x")).optim
    assert build_schedules(optim, 48).total_steps == 12
    # 8 steps were made; two of four epochs remain, in batches of 16 and of 8
    start = StreamStart(step=8, position=96)
    assert build_schedules(optim, 48, start).total_steps == 14
    assert build_schedules(replace(optim, global_batch_size=8), 48, start).total_steps == 20
