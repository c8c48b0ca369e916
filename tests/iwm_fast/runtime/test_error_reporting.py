"""Who says what when a launch of several ranks fails."""

import subprocess
import sys
from contextlib import nullcontext

import pytest

from iwm_fast.config.loading import load_config
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks, user_facing_errors


def printed_by(capsys, monkeypatch, rank: int, is_shared: bool) -> str:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(SystemExit) as ended,
        user_facing_errors(),
        same_error_on_all_ranks() if is_shared else nullcontext(),
    ):
        load_config("absent.yaml")
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_fault_that_every_rank_finds_is_told_by_rank_zero_alone(capsys, monkeypatch):
    assert "error (rank 0): no configuration file" in printed_by(capsys, monkeypatch, 0, is_shared=True)
    assert printed_by(capsys, monkeypatch, 1, is_shared=True) == ""


def test_what_one_rank_alone_runs_into_is_heard_from_that_rank(capsys, monkeypatch):
    assert "error (rank 1): no configuration file" in printed_by(capsys, monkeypatch, 1, is_shared=False)


GONE = (
    "[enforce fail at /gloo/transport/tcp/pair.cc:550] . Connection closed by peer [10.0.0.7]:5123. Check the logs.",
    "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    "NCCL error: ncclRemoteError: remote process exited or there was a network error",
    "[/gloo/transport/tcp/pair.cc:446] writev [10.0.0.7]:5123: Broken pipe",
)


@pytest.mark.parametrize("said", GONE)
def test_a_rank_that_finds_another_gone_says_so_in_one_line(capsys, monkeypatch, said):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("iwm_fast.runtime.error_reporting._GRACE_S", 0.0)
    with pytest.raises(SystemExit) as ended, user_facing_errors():
        raise RuntimeError(said)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rank 0 ends: another rank is gone or hangs (") and "Check the logs" not in line


def test_a_process_that_is_alone_has_lost_nobody(monkeypatch):
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


def test_a_finished_process_ends_with_code_zero_though_a_thread_is_left_behind():
    script = (
        "import threading, time\nfrom iwm_fast.runtime.process import end_process\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\nprint('done')\nend_process()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n")
