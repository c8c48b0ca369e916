"""Exhausted memory ends a run with one message, wherever it is raised, and leaves its checkpoints alone."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fixtures.launchers import CHILD_ENVIRONMENT, free_port
from fixtures.paths import WORKERS
from fixtures.tiny_finetuning import tiny_task, train_toy
from fixtures.tiny_pretraining import tiny_run
from iwm_fast import train
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.config.run import RunConfig
from iwm_fast.engines.torch_engine import TorchEngine
from iwm_fast.evals.online import OnlineEvaluation
from iwm_fast.monitoring.out_of_memory import TrainingMemoryError, memory_errors_explained
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.runtime.error_reporting import PeerFailedError, user_facing_errors
from iwm_fast.runtime.memory_errors import exhausted_memory
from iwm_fast.runtime.run_status import read_status, write_status
from iwm_fast.training import components, pretraining

GPU_TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB."
ERRORS = {
    "torch": torch.OutOfMemoryError(GPU_TEXT),
    "kernel launch": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "DALI": RuntimeError("Critical error in pipeline:\nCUDA allocation failed: can't allocate 1073741824 bytes"),
    "NCCL": RuntimeError("NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'"),
    "Python": MemoryError(),
    "torch on the host": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
    "C++": RuntimeError("std::bad_alloc"),
    "fork": OSError(12, "Cannot allocate memory"),
}


@pytest.fixture
def config(tiny_shards, tmp_path) -> RunConfig:
    return tiny_run(tiny_shards, tmp_path / "run", loader="torch", micro_batch_size=8)


def failing(error: Exception, at_call: int = 0):
    """Return a decorator for a function that raises an error in one of its calls."""

    def decorate(function):
        calls = iter(range(at_call))

        def call(*arguments, **options):
            if next(calls, None) is None:
                raise error
            return function(*arguments, **options)

        return call

    return decorate


def run_and_read(config: RunConfig, capsys) -> str:
    """Train as an entry point does, and return what is printed; the exit code is 2."""
    with pytest.raises(SystemExit) as stop, user_facing_errors():
        train.run(config)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("error: out of") == 1 and "Traceback" not in printed
    return printed


@pytest.mark.parametrize("name", ERRORS)
def test_the_errors_of_all_libraries_are_recognised_also_if_they_are_wrapped(name):
    error = ERRORS[name]
    wrapper = RuntimeError("the batch cannot be rendered")
    wrapper.__cause__ = error
    for raised in (error, wrapper):
        kind, text = exhausted_memory(raised)
        assert kind == ("GPU" if list(ERRORS).index(name) < 6 else "host")
        assert text == " ".join(str(error).split()) or text == "MemoryError"


@pytest.mark.parametrize("error", [ERRORS["torch"], MemoryError("cannot allocate 8 GB")])
def test_exhausted_memory_ends_a_run_with_one_message_and_its_checkpoint(config, tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(TorchEngine, "backward", failing(error, at_call=14)(TorchEngine.backward))
    printed = run_and_read(config, capsys)
    if isinstance(error, MemoryError):
        assert f"out of host memory in step 8 ({error}); lower runtime.prefetch (now 2)" in printed
    else:
        assert f"out of GPU memory in step 8 ({error}); runtime.micro_batch_size is 8: set runtime.micro_" in printed
    assert "resume with resume=auto; earlier checkpoints are kept" in printed
    status = read_status(tmp_path / "run")
    assert status["state"] == "failed" and "memory in step 8" in status["reason"]
    assert [checkpoints.parse_step(path) for path in checkpoints.list_checkpoint_folders(tmp_path / "run")] == [5]
    # As the message says.
    monkeypatch.undo()
    smaller = replace(config.runtime, micro_batch_size=4)
    assert train.run(replace(config, runtime=smaller, resume="auto")).step == 12


def spoil_start(monkeypatch, fail):
    monkeypatch.setattr(pretraining.PretrainTask, "open_stream", fail(pretraining.PretrainTask.open_stream))


def spoil_networks(monkeypatch, fail):
    monkeypatch.setattr(components, "build_engine", fail(components.build_engine))


def spoil_evaluation(monkeypatch, fail):
    monkeypatch.setattr(OnlineEvaluation, "prepare", lambda self: None)
    monkeypatch.setattr(OnlineEvaluation, "__call__", fail(OnlineEvaluation.__call__))


def spoil_checkpoint(monkeypatch, fail):
    monkeypatch.setattr(TorchEngine, "state", fail(TorchEngine.state))


@pytest.mark.parametrize(
    ("spoil", "place"),
    [
        (spoil_networks, "the construction of the networks"),
        (spoil_start, "the start"),
        (spoil_evaluation, "the evaluation after step 4"),
        (spoil_checkpoint, "the checkpoint of step 5"),
    ],
)
def test_the_message_names_what_was_done(config, monkeypatch, capsys, spoil, place):
    config = replace(config, output=replace(config.output, evaluate_every=4 if spoil is spoil_evaluation else None))
    spoil(monkeypatch, failing(ERRORS["torch"]))
    printed = run_and_read(config, capsys)
    assert f"out of GPU memory in {place} ({GPU_TEXT})" in printed
    status = read_status(Path(config.output.folder))
    assert status["state"] == "failed" and place in status["reason"]


@pytest.mark.parametrize("state", ["finished", "running"])
def test_networks_that_do_not_fit_leave_the_status_of_another_run(config, tmp_path, monkeypatch, capsys, state):
    write_status(tmp_path / "run", state)
    spoil_networks(monkeypatch, failing(ERRORS["torch"]))
    run_and_read(config, capsys)
    assert read_status(tmp_path / "run")["state"] == state


def advice(config: RunConfig, world_size: int) -> str:
    """Return the message on one of several ranks."""
    rank_info = RankInfo(rank=0, local_rank=0, world_size=world_size, device=torch.device("cpu"))
    with pytest.raises(TrainingMemoryError) as caught, memory_errors_explained(config, rank_info, lambda: "step 1"):
        raise ERRORS["torch"]
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "world_size", "expected"),
    [
        ({"micro_batch_size": 8}, 1, "set runtime.micro_batch_size=4 or runtime.activation_checkpointing=true,"),
        ({}, 2, "is 8: set runtime.micro_batch_size=4 or"),
        ({"activation_checkpointing": True, "micro_batch_size": 1}, 1, "use a larger GPU or more ranks,"),
        ({"engine": "deepspeed"}, 2, "or runtime.zero_stage=2,"),
        ({"engine": "deepspeed", "zero_stage": 3}, 2, "or runtime.activation_checkpointing=true,"),
        ({"engine": "deepspeed", "zero_stage": 2, "compile": True}, 2, "or runtime.activation_checkpointing=true,"),
        ({"engine": "plain"}, 2, "or runtime.engine=deepspeed,"),
        ({"depth": 0}, 1, "runtime.micro_batch_size=8 (in a new run, because VICReg's terms depend on it)"),
    ],
)
def test_the_advice_follows_from_the_settings(tiny_shards, tmp_path, settings, world_size, expected):
    assert expected in advice(tiny_run(tiny_shards, tmp_path, **settings), world_size)


def test_a_micro_batch_of_a_share_that_two_does_not_divide_is_made_smaller(tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path, micro_batch_size=15)
    config = replace(config, optim=replace(config.optim, global_batch_size=45))
    assert "set runtime.micro_batch_size=9 or" in advice(config, 1)


def test_only_the_first_rank_reports(tiny_shards, tmp_path):
    rank_info = distributed.start("cpu")
    try:
        for expected in (TrainingMemoryError, PeerFailedError):
            with (
                pytest.raises(expected),
                memory_errors_explained(tiny_run(tiny_shards, tmp_path), rank_info, lambda: "step 1"),
            ):
                raise ERRORS["torch"]
    finally:
        distributed.stop()


def test_other_errors_pass(tiny_shards, tmp_path):
    rank_info = RankInfo(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    for error in (RuntimeError("shape mismatch"), ValueError("out of range"), OSError(28, "No space left on device")):
        with (
            pytest.raises(type(error)) as caught,
            memory_errors_explained(tiny_run(tiny_shards, tmp_path), rank_info, lambda: "step 1"),
        ):
            raise error
        assert caught.value is error


def test_finetuning_without_memory_ends_with_the_message(tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(TorchEngine, "backward", failing(ERRORS["torch"], at_call=5)(TorchEngine.backward))
    rank_info = distributed.start("cpu")
    try:
        with pytest.raises(TrainingMemoryError, match=r"in step 6 .*micro_batch_size is 8: set .*=4 .* start again"):
            train_toy(rank_info, tiny_shards, tmp_path, tiny_task(tiny_shards))
    finally:
        distributed.stop()
    assert read_status(tmp_path / "toy")["state"] == "failed"


def test_a_command_without_a_run_ends_with_a_message(capsys):
    with pytest.raises(SystemExit), user_facing_errors():
        raise torch.OutOfMemoryError(GPU_TEXT)
    assert capsys.readouterr().err.startswith(f"error: out of GPU memory: {GPU_TEXT}; nvidia-smi")


@pytest.mark.slow
@pytest.mark.multi_rank
@pytest.mark.parametrize("ranks", ["1", "01"])
def test_of_two_ranks_one_prints_the_message(tiny_shards, tmp_path, ranks):
    port, processes = free_port(), []
    for rank in range(2):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        arguments = [tiny_shards.pattern, str(tmp_path / "run"), ranks]
        processes.append(
            subprocess.Popen(
                [sys.executable, str(WORKERS / "ranks_out_of_memory.py"), *arguments],
                env=os.environ | CHILD_ENVIRONMENT | variables, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    printed = [process.communicate(timeout=120)[1] for process in processes]
    assert sum(text.count("out of GPU memory in step 3") for text in printed) == 1, printed
    assert sum(text.count("error (rank") for text in printed) == 1, printed
    assert not any("Traceback" in text for text in printed), printed
    codes = [process.returncode for process in processes]
    assert codes == ([2, 2] if ranks == "01" else [1, 2])
    status = read_status(Path(tmp_path / "run"))
    assert status["state"] == "failed" and "out of GPU memory in step 3" in status["reason"]
    assert [checkpoints.parse_step(path) for path in checkpoints.list_checkpoint_folders(tmp_path / "run")] == [1, 2]
