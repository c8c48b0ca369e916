from contextlib import suppress

import pytest
import torch

from iwm_fast.runtime import distributed
from iwm_fast.runtime.preemption import PreemptedError

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    distributed.stop()


def test_without_a_launcher_a_single_process_has_a_group_of_its_own():
    rank_info = distributed.start("cpu")
    assert (rank_info.rank, rank_info.local_rank, rank_info.world_size, rank_info.device.type) == (0, 0, 1, "cpu")
    assert torch.distributed.is_initialized()


def test_a_single_process_votes_without_its_device():
    distributed.start("cpu")
    # Values on the meta device cannot be read.
    assert distributed.any_rank([True, False], torch.device("meta")) == [True, False]


def test_a_group_can_be_started_again_after_stop():
    distributed.start("cpu")
    distributed.stop()
    distributed.start("cpu")


def test_starting_twice_is_refused():
    distributed.start("cpu")
    with pytest.raises(RuntimeError, match="stop"):
        distributed.start("cpu")


@pytest.mark.parametrize("missing", LAUNCHER_VARIABLES)
def test_an_incomplete_environment_is_refused(monkeypatch, missing):
    for name, value in zip(LAUNCHER_VARIABLES, ("0", "0", "1", "127.0.0.1", "29500"), strict=True):
        if name != missing:
            monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=f"not {missing}; start with torchrun"):
        distributed.start("cpu")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("rank", "world_size"), [("2", "2"), ("-1", "2"), ("one", "2")])
def test_impossible_ranks_are_refused(monkeypatch, rank, world_size):
    for name, value in zip(LAUNCHER_VARIABLES, (rank, "0", world_size, "127.0.0.1", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="RANK"):
        distributed.start("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error_with_setting_and_remedy():
    with pytest.raises(RuntimeError, match=r"runtime\.device=cuda .* finds 0.*runtime\.device=cpu"):
        distributed.start("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_auto_logs_the_device_that_it_chose(caplog):
    with caplog.at_level("INFO"):
        assert distributed.start("auto").device.type == "cpu"
    assert "CPU" in caplog.text


@pytest.mark.parametrize(("num_threads", "expected"), [(None, 1), ("2", 2)])
def test_a_cpu_rank_uses_one_thread_unless_omp_num_threads_is_set(monkeypatch, num_threads, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if num_threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", num_threads)
    torch.set_num_threads(2)
    try:
        distributed.start("cpu")
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("is_started", [False, True])
def test_collectives_of_a_single_process_return_copies(is_started):
    if is_started:
        distributed.start("cpu")
    values = torch.tensor([1.0, 2.0])
    total = distributed.sum_over_ranks(values)
    total += 1
    torch.testing.assert_close(values, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(distributed.all_gather(values), values)
    assert distributed.any_rank([True, False], torch.device("cpu")) == [True, False]


@pytest.mark.parametrize(
    ("num_ranks", "error", "has_left"),
    [(2, None, True), (2, PreemptedError("SIGTERM", 3), True), (2, OSError("full"), False), (1, OSError("full"), True)],
)
def test_a_rank_that_fails_alone_ends_without_leaving_the_group(monkeypatch, num_ranks, error, has_left):
    # With NCCL it would wait for its peers, which are in a collective, and its message would not be printed.
    distributed.start("cpu")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: num_ranks)
    with suppress(PreemptedError, OSError), distributed.left_unless_failed():
        if error:
            raise error
    assert torch.distributed.is_initialized() != has_left
