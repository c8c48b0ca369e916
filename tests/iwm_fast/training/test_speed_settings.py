"""Settings that change the speed and memory of a run do not change what it learns."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fixtures.paths import PYTHONPATH, WORKERS
from fixtures.tiny_pretraining import losses, tiny_run
from iwm_fast.config.run import RuntimeConfig
from iwm_fast.kernels.attention.sequences import Sequences
from iwm_fast.runtime import distributed
from iwm_fast.training.components import build_components


@pytest.fixture
def rank_info():
    yield distributed.start("cpu")
    distributed.stop()


@pytest.mark.parametrize(("engine", "stage"), [("plain", None), ("deepspeed", 1), ("deepspeed", 3)])
def test_activation_checkpointing_changes_no_bit(rank_info, tiny_shards, tmp_path, engine, stage):
    config = tiny_run(tiny_shards, tmp_path, engine=engine, zero_stage=stage)
    checkpointed = replace(config, runtime=replace(config.runtime, activation_checkpointing=True))
    assert losses(rank_info, checkpointed) == losses(rank_info, config)


def test_activation_checkpointing_keeps_less_for_the_backward_pass(rank_info, tiny_shards, tmp_path):
    def kept_bytes(is_on: bool) -> int:
        config = tiny_run(tiny_shards, tmp_path, activation_checkpointing=is_on)
        blocks = build_components(config, rank_info).engine._module.encoder.blocks
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            blocks(torch.randn(64, 32), Sequences.of_equal_length(16))
        return sum(sizes)

    assert kept_bytes(True) < kept_bytes(False) / 4


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_compiled_blocks_have_the_losses_of_uncompiled_ones(tiny_shards, engine):
    script = WORKERS / "compile_run.py"
    environment = {"PYTHONPATH": PYTHONPATH}
    done = subprocess.run(
        [sys.executable, str(script), tiny_shards.pattern, engine],
        env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plain, compiled = json.loads(done.stdout.splitlines()[-1])
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(plain), rtol=1e-4, atol=1e-6)


def test_compile_is_refused_with_sharded_weights():
    with pytest.raises(ValueError, match=r"runtime.compile must be false with runtime.zero_stage=3"):
        RuntimeConfig(compile=True, zero_stage=3)
