"""Which rank reports which error when a launch of several ranks fails."""

import subprocess
import sys
import time
from contextlib import nullcontext

import pytest

from iwm_fast.config.loading import load_config
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks, user_facing_errors


def printed_error(capsys, monkeypatch, rank: int, is_shared: bool) -> str:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(SystemExit) as stop,
        user_facing_errors(),
        same_error_on_all_ranks() if is_shared else nullcontext(),
    ):
        load_config("absent.yaml")
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_an_error_common_to_all_ranks_is_reported_by_rank_zero_at_once(capsys, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("rank 0 must not wait"))
    assert "error (rank 0): no configuration file" in printed_error(capsys, monkeypatch, 0, is_shared=True)


def test_another_rank_reports_it_only_if_the_launcher_has_not_ended_it_by_then(capsys, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    assert "error (rank 1): no configuration file" in printed_error(capsys, monkeypatch, 1, is_shared=True)
    assert waits == [5.0]


@pytest.mark.parametrize(
    "error", [ValueError("x"), FileNotFoundError("x"), PermissionError("x"), NotADirectoryError("x")]
)
def test_an_error_of_one_rank_alone_is_never_lost(monkeypatch, error):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("iwm_fast.runtime.error_reporting._SHARED_GRACE_S", 0.0)
    with pytest.raises(type(error)), same_error_on_all_ranks():
        raise error


def test_an_error_of_a_single_rank_is_reported_by_that_rank(capsys, monkeypatch):
    assert "error (rank 1): no configuration file" in printed_error(capsys, monkeypatch, 1, is_shared=False)


PEER_FAILURES = (
    "[enforce fail at /gloo/transport/tcp/pair.cc:550] . Connection closed by peer [10.0.0.7]:5123. Check the logs.",
    "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    "NCCL error: ncclRemoteError: remote process exited or there was a network error",
    "[/gloo/transport/tcp/pair.cc:446] writev [10.0.0.7]:5123: Broken pipe",
)


@pytest.mark.parametrize("message", PEER_FAILURES)
def test_a_rank_reports_in_one_line_that_another_is_gone(capsys, monkeypatch, message):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("iwm_fast.runtime.error_reporting._GRACE_S", 0.0)
    with pytest.raises(SystemExit) as stop, user_facing_errors():
        raise RuntimeError(message)
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rank 0 ends: another rank is gone or hangs (") and "Check the logs" not in line


def test_a_single_process_never_reports_a_lost_rank(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RuntimeError, match="Connection closed"), user_facing_errors():
        raise RuntimeError("Connection closed by peer")


def test_an_error_of_a_library_keeps_its_traceback():
    with pytest.raises(ValueError, match="invalid literal"), user_facing_errors():
        int("x")


def test_our_own_message_keeps_its_traceback_on_request(monkeypatch):
    monkeypatch.setenv("IWM_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError), user_facing_errors():
        load_config("absent.yaml")


def test_a_finished_process_ends_with_code_zero_despite_a_running_thread():
    script = (
        "import threading, time\nfrom iwm_fast.runtime.process import end_process\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\nprint('done')\nend_process()\n"
    )
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (completed.returncode, completed.stdout) == (0, "done\n")
