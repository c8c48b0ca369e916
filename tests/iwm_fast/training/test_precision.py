"""Engines in bf16, the default precision: they differ less from the plain engine than by one rounding to bf16."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fixtures.launchers import CHILD_ENVIRONMENT, free_port
from fixtures.paths import PYTHONPATH, WORKERS
from fixtures.tiny_pretraining import tiny_run, train
from iwm_fast.runtime import distributed

NUM_STEPS = 3
MICRO_BATCH_SIZE = 8
# Relative. A rounding to bf16, which has eight significant bits, is a relative error of up to 2**-8.
TOLERANCE = 2**-8 / 100


def train_alone(shards, folder, precision, **runtime):
    """Return the state of one process before and after the first steps, and its losses."""
    config = tiny_run(shards, folder, micro_batch_size=MICRO_BATCH_SIZE, loader="torch", **runtime)
    config = replace(config, optim=replace(config.optim, precision=precision))
    rank_info = distributed.start("cpu")
    try:
        before = train(rank_info, config, 0)[0].engine.state()
        components, reports = train(rank_info, config, NUM_STEPS)
        return before, components.engine.state(), torch.stack([report.loss for report in reports])
    finally:
        distributed.stop()


@pytest.fixture(scope="module")
def plain(tiny_shards, tmp_path_factory):
    return train_alone(tiny_shards, tmp_path_factory.mktemp("plain"), "bf16")


def distance(actual, expected, before):
    """Return the larger of the relative distances of updates and first moments, over all parameters."""

    def relative(prefix, start):
        names = [name for name in expected if name.startswith(prefix)]
        difference, size = (
            torch.cat([(minuend[name] - subtrahend.get(name, torch.zeros(()))).flatten() for name in names]).norm()
            for minuend, subtrahend in ((actual, expected), (expected, start))
        )
        return float(difference / size)

    assert actual.keys() == expected.keys() == before.keys()
    return max(relative("weight/", before), relative("exp_avg/", {}))


@pytest.mark.parametrize("stage", range(4))
def test_every_zero_stage_trains_in_bf16_as_the_plain_engine_does(tiny_shards, tmp_path, plain, stage):
    before, expected, losses = plain
    _, actual, actual_losses = train_alone(tiny_shards, tmp_path, "bf16", engine="deepspeed", zero_stage=stage)
    assert distance(actual, expected, before) < TOLERANCE
    torch.testing.assert_close(actual_losses, losses, rtol=TOLERANCE, atol=0)


def test_the_tolerance_is_exceeded_by_a_rounding_and_by_another_precision(tiny_shards, tmp_path, plain):
    before, expected, _ = plain
    rounded = {
        name: tensor.bfloat16().float() if name.startswith("exp_avg/") else tensor for name, tensor in expected.items()
    }
    assert distance(rounded, expected, before) > 10 * TOLERANCE
    assert distance(train_alone(tiny_shards, tmp_path, "fp32")[1], expected, before) > 10 * TOLERANCE


@pytest.mark.slow
@pytest.mark.multi_rank
@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_train_in_bf16_as_one_process_does(tiny_shards, tmp_path, plain, stage):
    before, expected, losses = plain
    port, ranks = free_port(), []
    arguments = [tiny_shards.pattern, str(tmp_path), str(stage), str(MICRO_BATCH_SIZE), str(NUM_STEPS)]
    for rank in range(2):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = CHILD_ENVIRONMENT | {"PYTHONPATH": PYTHONPATH} | {key: str(variables[key]) for key in variables}
        command = [sys.executable, str(WORKERS / "ranks_precision.py"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        ranks.append(subprocess.Popen(command, env=os.environ | environment, **pipes))
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    actual = load_file(tmp_path / "state.safetensors")
    torch.testing.assert_close(actual.pop("losses"), losses, rtol=TOLERANCE, atol=0)
    assert distance(actual, expected, before) < TOLERANCE
