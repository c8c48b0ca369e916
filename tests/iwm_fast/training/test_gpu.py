"""Training on a GPU: the same inputs give nearly the same losses as on the CPU.

Run these tests on their own (`pytest -m gpu`), because DeepSpeed chooses its device once per process.
"""

from dataclasses import replace

import pytest
import torch

from fixtures.tiny_pretraining import losses, tiny_run
from iwm_fast.commands.demo import CONFIG
from iwm_fast.config.loading import load_config
from iwm_fast.runtime import distributed

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("loader", ["dali", "torch"])
@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_the_first_steps_have_the_losses_of_the_cpu(tiny_shards, tmp_path, engine, loader):
    measured = {}
    for device, device_engine in (("cpu", "plain"), ("cuda", engine)):
        config = tiny_run(tiny_shards, tmp_path, engine=device_engine, loader=loader)
        rank_info = distributed.start(device)
        try:
            measured[device] = losses(rank_info, replace(config, runtime=replace(config.runtime, device=device)))[0]
        finally:
            distributed.stop()
    # Decoders on the GPU upsample chroma differently.
    torch.testing.assert_close(torch.tensor(measured["cuda"]), torch.tensor(measured["cpu"]), rtol=2e-2, atol=0)


def test_the_demo_on_fused_operations_has_the_losses_of_the_reference(tiny_shards):
    measured = []
    for ops in ("fused", "reference"):
        # Fused attention takes half precision only.
        settings = [f"data.train={tiny_shards.pattern}", "optim.global_batch_size=16", "optim.precision=bf16"]
        config = load_config(CONFIG, [*settings, "runtime.device=cuda", f"runtime.ops={ops}"])
        rank_info = distributed.start("cuda")
        try:
            measured.append(losses(rank_info, config, steps=6)[0])
        finally:
            distributed.stop()
    torch.testing.assert_close(torch.tensor(measured[0]), torch.tensor(measured[1]), rtol=2e-2, atol=0)


@pytest.mark.parametrize("stage", range(4))
def test_every_zero_stage_trains_in_bf16_as_the_plain_engine_does(tiny_shards, tmp_path, stage):
    measured = []
    for settings in ({"engine": "plain"}, {"engine": "deepspeed", "zero_stage": stage}):
        config = tiny_run(tiny_shards, tmp_path, micro_batch_size=8, **settings)
        optim, runtime = replace(config.optim, precision="bf16"), replace(config.runtime, device="cuda")
        rank_info = distributed.start("cuda")
        try:
            measured.append(losses(rank_info, replace(config, optim=optim, runtime=runtime)))
        finally:
            distributed.stop()
    # Losses and gradient norms. Stage 3 has linear layers of its own, whose gradients may be rounded to bf16 elsewhere.
    torch.testing.assert_close(torch.tensor(measured[1]), torch.tensor(measured[0]), rtol=2**-8, atol=0)
