"""Engines on two real ranks: ranks_engine.py runs them, and these tests compare the files that it writes."""

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from fixtures.launchers import CHILD_ENVIRONMENT
from fixtures.paths import WORKERS
from iwm_fast.config.deepspeed_settings import SIZES, SWITCHES

pytestmark = pytest.mark.multi_rank

ENGINES = ("plain", "zero0", "zero1", "zero2", "zero3")
WORKER = WORKERS / "ranks_engine.py"


_spec = importlib.util.spec_from_file_location("ranks_engine", WORKER)
ranks_engine = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ranks_engine)


def run_ranks(folder, stage, world_size):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world_size):
        rank_variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
        rank_variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | CHILD_ENVIRONMENT | {name: str(value) for name, value in rank_variables.items()}
        with (folder / f"{stage}-{rank}.log").open("w") as log:
            command = [sys.executable, str(WORKER), str(folder), stage]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"{stage}-{rank}.log").read_text() for rank in range(world_size))
    assert codes == [0] * world_size, logs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder with the files of all runs."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(folder, "single", world_size=1)
    run_ranks(folder, "straight", world_size=2)
    run_ranks(folder, "resumed", world_size=2)
    return folder


def load(folder, name):
    return load_file(folder / f"{name}.safetensors")


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    assert not [name for name in actual if not torch.equal(actual[name], expected[name])]


def assert_close_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(
            tensor, expected[name], atol=1e-6, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_with_two_micro_batches_equal_one_process(folder, engine):
    single = load(folder, "single-3")
    assert int(single["adam_step"]) == 3
    assert_close_state(load(folder, f"{engine}-3"), single)
    # The state cannot show a wrong scale of the gradients, because clipping removes it.
    norms = json.loads((folder / f"{engine}-norms.json").read_text())
    assert norms == pytest.approx(json.loads((folder / "single-norms.json").read_text()), rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_new_processes_continue_bit_equal_from_a_saved_state(folder, engine):
    assert_same_state(load(folder, f"{engine}-3-{engine}-5"), load(folder, f"{engine}-5"))


@pytest.mark.parametrize("source", ENGINES)
@pytest.mark.parametrize("target", ENGINES)
def test_another_engine_continues_from_a_state_within_rounding(folder, source, target):
    assert_close_state(load(folder, f"{source}-3-{target}-5"), load(folder, f"{source}-5"))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bad_sample_on_one_rank_changes_the_state_of_no_rank(folder, engine):
    for rank in range(2):
        report = json.loads((folder / f"{engine}-rank{rank}.json").read_text())
        assert report == {"applied": [False], "is_same": True}
    assert_same_state(load(folder, f"{engine}-after-bad"), load(folder, f"{engine}-before-bad"))


@pytest.mark.parametrize("engine", ENGINES)
def test_training_continues_as_if_a_bad_sample_had_not_been_there(folder, engine):
    assert_same_state(load(folder, f"{engine}-3-after-bad"), load(folder, f"{engine}-3"))


def test_ranks_vote_sum_and_gather(folder):
    for rank in range(2):
        report = json.loads((folder / f"report-rank{rank}.json").read_text())
        assert report["agree"] == [True, False]
        assert report["sum"] == [3.0]
        assert report["gathered"] == [1.0, 2.0]


def test_a_checkpoint_that_rank_zero_cannot_write_fails_on_all_ranks(folder):
    for rank in range(2):
        report = json.loads((folder / f"report-rank{rank}.json").read_text())
        assert "rank 0 could not write" in report["error"] and "step-00000001" in report["error"]
        assert report["error again"] == report["error"]
        assert report["has_failed"] == (rank == 0)


@pytest.mark.slow
def test_deepspeed_settings_that_are_accepted_do_not_change_what_is_learned(tmp_path):
    run_ranks(tmp_path, "settings", world_size=2)
    for rank in range(2):
        changes = json.loads((tmp_path / f"changes-rank{rank}.json").read_text())
        assert len(changes) == 3 * len((*SIZES, *SWITCHES))
        assert {name: change for name, change in changes.items() if change > 1e-6} == {}


@pytest.fixture(scope="module")
def vicreg_reference():
    """Return loss and gradients of a step with VICReg's terms, computed in float64 by one process."""
    torch.manual_seed(0)
    module = ranks_engine.make_module().double()
    total, loss = sum(map(sum, ranks_engine.VICREG_ROWS)), torch.zeros((), dtype=torch.float64)
    for micro in ranks_engine.vicreg_inputs():
        inputs, target = (torch.cat(parts).double() for parts in zip(*micro, strict=True))
        tokens = module(inputs)
        covariance = tokens.T.cov()
        variance = covariance.diagonal()
        hinge = torch.relu(1 - (variance + 1e-4).sqrt()).mean()
        off_diagonal = (covariance.square().sum() - variance.square().sum()) / 3
        share = len(tokens) / total
        loss = loss + (tokens - target).square().sum() / (3 * total) + share * (hinge + 0.04 * off_diagonal)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("engine", ENGINES)
def test_vicreg_terms_are_statistics_of_all_ranks(folder, engine, vicreg_reference):
    loss, gradients = vicreg_reference
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    report = json.loads((folder / f"{engine}-vicreg.json").read_text())
    assert report == {"loss": pytest.approx(loss, rel=1e-5), "grad_norm": pytest.approx(norm, rel=1e-5)}
    state = load(folder, f"{engine}-vicreg")
    for name, gradient in gradients.items():
        # Adam's first moment is a tenth of the gradient, which is clipped to a norm of 0.1.
        expected = (0.1 * gradient * min(1.0, 0.1 / norm)).float()
        torch.testing.assert_close(state[f"exp_avg/{name}"], expected, rtol=1e-4, atol=1e-7)
