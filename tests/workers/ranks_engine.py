"""A rank of test_engine_ranks.py: `python ranks_engine.py FOLDER STAGE`, ranks from the environment.

STAGE is single, straight, resumed or settings.

It writes each state and outcome to a file in the folder; the tests compare the files.
"""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from iwm_fast.checkpoints.async_writer import CheckpointWriter
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.config.deepspeed_settings import SIZES, SWITCHES
from iwm_fast.config.run import OptimConfig, OutputConfig, RunConfig, RuntimeConfig
from iwm_fast.engines.factory import build_engine
from iwm_fast.runtime import distributed
from iwm_fast.runtime.process import end_process

ENGINES = {"plain": ("plain", None), **{f"zero{stage}": ("deepspeed", stage) for stage in range(4)}}
GLOBAL_BATCH_SIZE = 8


def main(folder, stage):
    # Uninitialised memory is NaN, so that padding which is never written would show.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    rank_info = distributed.start("cpu")
    {"single": single, "straight": straight, "resumed": resumed, "settings": settings}[stage](folder, rank_info)
    distributed.stop()


def single(folder, rank_info):
    """One process with the complete batch: the reference."""
    engine = make_engine(rank_info, "plain", micro_batch_size=GLOBAL_BATCH_SIZE)
    outcomes = train(engine, rank_info, range(3), micro_batch_size=GLOBAL_BATCH_SIZE)
    save(engine, rank_info, folder / "single-3")
    (folder / "single-norms.json").write_text(json.dumps([float(outcome.grad_norm) for outcome in outcomes]))


def straight(folder, rank_info):
    """Two ranks, two micro-batches each: an uninterrupted run, and one with a bad sample on the last rank."""
    for name in ENGINES:
        engine = make_engine(rank_info, name)
        outcomes = train(engine, rank_info, range(3))
        if rank_info.rank == 0:
            (folder / f"{name}-norms.json").write_text(json.dumps([float(outcome.grad_norm) for outcome in outcomes]))
        save(engine, rank_info, folder / f"{name}-3")
        train(engine, rank_info, range(3, 5))
        save(engine, rank_info, folder / f"{name}-5")

        engine = make_engine(rank_info, name)
        train(engine, rank_info, range(2))
        save(engine, rank_info, folder / f"{name}-before-bad")
        weights = {key: weight.detach().clone() for key, weight in engine.named_parameters()}
        bad = train(engine, rank_info, range(2, 3), bad_rank=1)
        save(engine, rank_info, folder / f"{name}-after-bad")
        # Compare this rank's own copy before the next collective can repair or break it.
        is_same = all(torch.equal(weight, weights[key]) for key, weight in engine.named_parameters())
        train(engine, rank_info, range(2, 3))
        save(engine, rank_info, folder / f"{name}-3-after-bad")
        report = {"applied": [outcome.applied for outcome in bad], "is_same": is_same}
        (folder / f"{name}-rank{rank_info.rank}.json").write_text(json.dumps(report))
    train_with_statistics_of_all_ranks(folder, rank_info)
    use_collectives(folder, rank_info)


VICREG_ROWS = ((11, 5), (3, 8))
"""Rows of both ranks, for each of two micro-batches."""


def vicreg_inputs():
    """Return the inputs of each micro-batch and rank, and the targets of their rows."""
    generator = torch.Generator().manual_seed(5)
    return [[torch.randn(rows, 5 + 3, generator=generator).split((5, 3), 1) for rows in micro] for micro in VICREG_ROWS]


def train_with_statistics_of_all_ranks(folder, rank_info):
    """Make one step with VICReg's terms, on micro-batches of unequal numbers of rows."""
    # Imported here, because the other stages need not wait for it.
    from iwm_fast.config.run import ObjectiveConfig
    from iwm_fast.models.student import Prediction
    from iwm_fast.pipelines.batch import RaggedIndex
    from iwm_fast.training.objective import Objective

    objective = Objective(ObjectiveConfig(), is_identity=True)
    for name in ENGINES:
        engine = make_engine(rank_info, name)
        losses = []
        for micro in vicreg_inputs():
            inputs, target = micro[rank_info.rank]
            tokens = engine.forward(inputs)
            patch = torch.arange(len(inputs))
            index = RaggedIndex(
                patch=patch, row=patch, offsets=torch.tensor([0, len(inputs)], dtype=torch.int32),
                lengths=(len(inputs),), total=sum(map(sum, VICREG_ROWS)),
            )  # fmt: skip
            losses.append(objective(Prediction(tokens, tokens, index), target, index))
            engine.backward(losses[-1])
        outcome = engine.step()
        loss = distributed.sum_over_ranks(torch.stack(losses).sum())
        if rank_info.rank == 0:
            report = {"loss": float(loss), "grad_norm": float(outcome.grad_norm)}
            (folder / f"{name}-vicreg.json").write_text(json.dumps(report))
        save(engine, rank_info, folder / f"{name}-vicreg")


def resumed(folder, rank_info):
    """New processes: continue from the states of `straight`, with the same engine and with others."""
    for source in ENGINES:
        for target in ENGINES:
            engine = make_engine(rank_info, target)
            engine.load_state(load_file(folder / f"{source}-3.safetensors"))
            train(engine, rank_info, range(3, 5))
            save(engine, rank_info, folder / f"{source}-3-{target}-5")


def settings(folder, rank_info):
    """Write the largest change of a weight by each setting that runtime.deepspeed accepts, at stages 1 to 3."""
    changes = {}
    for name in ("zero1", "zero2", "zero3"):
        expected = trained_weights(rank_info, name, {})
        for setting in (*SIZES, *SWITCHES):
            *groups, leaf = setting.split(".")
            # Sizes below those of the tensors, and switches that differ from their defaults.
            deepspeed = {leaf: 8 if setting in SIZES else leaf not in ("contiguous_gradients", "prof_all")}
            for group in reversed(groups):
                deepspeed = {group: deepspeed}
            weights = trained_weights(rank_info, name, deepspeed)
            changes[f"{name} {setting}"] = max(float((weights[key] - expected[key]).abs().max()) for key in expected)
    (folder / f"changes-rank{rank_info.rank}.json").write_text(json.dumps(changes))


def trained_weights(rank_info, name, deepspeed):
    engine = make_engine(rank_info, name, deepspeed=deepspeed)
    train(engine, rank_info, range(4))
    return {key: weight.detach().clone() for key, weight in engine.named_parameters()}


def use_collectives(folder, rank_info):
    """Ranks with different flags and numbers, and a disk to which rank 0 cannot write."""
    cpu = rank_info.device
    number = torch.tensor([float(rank_info.rank + 1)])
    report = {
        "agree": [distributed.any_rank([rank_info.rank == 1], cpu)[0], distributed.any_rank([False], cpu)[0]],
        "sum": distributed.sum_over_ranks(number).tolist(),
        "gathered": distributed.all_gather(number).tolist(),
    }
    (folder / "no-folder").write_text("a file where a run folder should be")
    config = RunConfig(output=OutputConfig(folder=str(folder / "no-folder")))
    writer = CheckpointWriter(config, rank_info, fingerprint={}, run_id="")
    # It is written asynchronously, so the next call raises, on both ranks.
    writer.write(engine_state={}, teacher_state={}, step=1, applied_steps=1)
    try:
        writer.wait()
    except CheckpointError as error:
        report["error"] = str(error)
    report["has_failed"] = writer.has_failed
    try:
        writer.write(engine_state={}, teacher_state={}, step=2, applied_steps=2)
    except CheckpointError as error:
        report["error again"] = str(error)
    writer.close()
    (folder / f"report-rank{rank_info.rank}.json").write_text(json.dumps(report))


def make_module():
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3), nn.Linear(3, 3, bias=False))


def make_engine(rank_info, name, micro_batch_size=2, deepspeed=None):
    # Weights differ between ranks; all must start from those of rank 0.
    torch.manual_seed(rank_info.rank)
    module = make_module()
    groups = [
        {"params": [parameter for parameter in module.parameters() if parameter.ndim > 1], "name": "decay"},
        {"params": [parameter for parameter in module.parameters() if parameter.ndim < 2], "name": "no_decay"},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0)
    engine, stage = ENGINES[name]
    small = {"zero_optimization": {"reduce_bucket_size": 30}} if engine == "deepspeed" and deepspeed is None else {}
    runtime = RuntimeConfig(
        engine=engine, zero_stage=stage, micro_batch_size=micro_batch_size, deepspeed=deepspeed or small
    )
    config = RunConfig(optim=OptimConfig(global_batch_size=GLOBAL_BATCH_SIZE, clip_norm=0.1), runtime=runtime)
    return build_engine(config, module, optimizer, rank_info)


def train(engine, rank_info, steps, micro_batch_size=2, bad_rank=None):
    """Make steps whose samples depend on (step, slot) only; a micro-batch takes consecutive slots, rank after rank."""
    outcomes = []
    for step in steps:
        engine.set_hyperparameters(lr=0.01 * (step + 1), weight_decay=0.1 * (step + 1))
        for begin in range(0, GLOBAL_BATCH_SIZE, micro_batch_size * rank_info.world_size):
            slot = begin + micro_batch_size * rank_info.rank
            samples = torch.randn(GLOBAL_BATCH_SIZE, 5, generator=torch.Generator().manual_seed(step))
            samples = samples[slot : slot + micro_batch_size]
            is_bad = rank_info.rank == bad_rank and begin == 0
            loss = (engine.forward(samples * math.nan if is_bad else samples) ** 2).sum() / GLOBAL_BATCH_SIZE
            engine.backward(loss)
        outcomes.append(engine.step())
        assert outcomes[-1].grad_norm > 0.1, "clipping must be active"
    return outcomes


def save(engine, rank_info, path):
    state = engine.state()
    assert bool(state) == (rank_info.rank == 0)
    if rank_info.rank == 0:
        save_file(state, path.with_suffix(".safetensors"))
    # A barrier, because the other rank may read the file.
    distributed.any_rank([False], rank_info.device)[0]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    end_process()
