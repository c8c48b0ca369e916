"""Metrics in Weights & Biases: training never waits for it, and a run continues under the same id."""

import importlib.util
import logging
import socket
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from fixtures.tiny_pretraining import tiny_run
from iwm_fast.config.run import OutputConfig, RunConfig
from iwm_fast.monitoring.loggers import wandb_logger
from iwm_fast.monitoring.loggers.wandb_logger import WandbLogger
from iwm_fast.monitoring.metric_writer import require_logins
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.runtime.json_lines import read_starts
from iwm_fast.train import run

needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed: pip install 'iwm-fast[wandb]'"
)
KEY = "0123456789" * 4


class UnreachableError(Exception):
    """Replaces `wandb.Error`."""


class StandInServer:
    """Replaces the package wandb; `answers` is set once the server answers."""

    Error = UnreachableError

    def __init__(self, *, refuses: bool = False, breaks: bool = False) -> None:
        self.refuses, self.breaks = refuses, breaks
        self.answers, self.rows, self.starts = threading.Event(), [], []
        self.answers.set()

    def Settings(self, **values):
        return values

    def Artifact(self, *_, **__):
        return SimpleNamespace(add_reference=lambda *_, **__: None)

    def init(self, **values):
        self.starts.append(values)
        if self.refuses and values["mode"] is None:
            raise UnreachableError("connection refused\nat line 3")
        return SimpleNamespace(
            offline=values["mode"] == "offline",
            url="https://example.test/run",
            log=self.log,
            log_artifact=lambda _: None,
            finish=lambda: None,
        )

    def teardown(self):
        """Forget the attempt to connect."""

    def log(self, values, step):
        self.answers.wait()
        if self.breaks:
            raise BrokenPipeError("the service is gone")
        self.rows.append((step, values))


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return RunConfig(output=OutputConfig(folder=str(tmp_path / "run"), loggers=("wandb",)))


def opened(monkeypatch, config: RunConfig, **behaviour) -> tuple[WandbLogger, StandInServer]:
    server = StandInServer(**behaviour)
    monkeypatch.setitem(sys.modules, "wandb", server)
    return WandbLogger(config, "abc123"), server


def test_rows_settings_and_id_reach_the_run(monkeypatch, config):
    logger, server = opened(monkeypatch, config)
    logger.write(10, {"loss/prediction": 0.5})
    logger.close()
    (start,) = server.starts
    assert server.rows == [(10, {"loss/prediction": 0.5})] and start["config"]["optim"]["epochs"] == 300.0
    assert (start["id"], start["resume"], start["name"], start["project"]) == ("abc123", "allow", "run", "iwm-fast")


def test_a_server_that_hangs_delays_neither_rows_nor_the_end(monkeypatch, config, caplog):
    monkeypatch.setattr(wandb_logger, "_CLOSE_S", 0.2)
    logger, server = opened(monkeypatch, config)
    server.answers.clear()
    began = time.perf_counter()
    for step in range(1000):
        logger.write(step, {"loss/prediction": 1.0})
    assert time.perf_counter() - began < 0.5
    logger.close()
    assert time.perf_counter() - began < 2 and "has not confirmed all rows" in caplog.text
    server.answers.set()
    logger.close()


def test_a_server_that_is_away_means_offline(monkeypatch, config, caplog):
    caplog.set_level(logging.INFO)
    logger, server = opened(monkeypatch, config, refuses=True)
    logger.write(1, {"loss/prediction": 1.0})
    logger.close()
    assert [start["mode"] for start in server.starts] == [None, "offline"] and len(server.rows) == 1
    assert "cannot be reached and continues offline: connection refused" in caplog.text


def test_an_error_of_the_service_ends_only_the_logger(monkeypatch, config, caplog):
    logger, _ = opened(monkeypatch, config, breaks=True)
    logger.write(1, {})
    logger.write(2, {})
    logger.close()
    assert caplog.text.count("receives no more rows (BrokenPipeError: the service is gone)") == 1


@pytest.fixture
def wandb_home(monkeypatch, tmp_path):
    """Give W&B a home without keys and settings, and forget what it has read before."""
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    (tmp_path / "home").mkdir()
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


@needs_wandb
@pytest.mark.parametrize(
    ("variable", "netrc"),
    [
        (f"WANDB_API_KEY={KEY}", ""),
        ("WANDB_MODE=offline", ""),
        ("WANDB_SILENT=true", f"machine api.wandb.ai login user password {KEY}"),
    ],
)
def test_a_missing_key_is_one_message_before_anything_starts(wandb_home, tiny_shards, tmp_path, variable, netrc):
    import wandb

    config = tiny_run(tiny_shards, tmp_path / "run")
    config = replace(config, output=replace(config.output, loggers=("wandb",)))
    with pytest.raises(ValueError, match=r"no API key for W&B; run `wandb login`, set WANDB_API_KEY, set WANDB_MODE"):
        run(config)
    assert not (tmp_path / "run").exists()
    wandb_home.setenv(*variable.split("="))
    (tmp_path / "home" / ".netrc").write_text(netrc)
    wandb.teardown()
    require_logins(["wandb"])


@needs_wandb
@pytest.mark.slow
def test_offline_runs_keep_their_id_and_have_metrics_settings_and_pictures(wandb_home, tiny_shards, tmp_path):
    wandb_home.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run"
    config = tiny_run(tiny_shards, folder)
    config = replace(config, output=replace(config.output, loggers=("tensorboard", "wandb")))
    run(config)
    Image.new("RGB", (8, 8)).save(folder / "imagine.png")
    run(replace(config, resume="extend", optim=replace(config.optim, epochs=6.0)))
    run_id = read_starts(folder)[0]["run_id"]
    records = [path.read_bytes() for path in sorted(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))]
    assert len(records) == 2
    for record in records:
        assert b"loss/prediction" in record and b"teacher_momentum" in record and b"file://" in record
    assert b"pictures/imagine" in records[1] and len(read_metrics(folder)) == 5


@needs_wandb
@pytest.mark.slow
def test_a_real_server_that_never_answers_does_not_stop_a_run(wandb_home, tiny_shards, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with socket.create_server(("127.0.0.1", 0)) as server:
        wandb_home.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        wandb_home.setenv("WANDB_API_KEY", KEY)
        wandb_home.setattr(wandb_logger, "_CONNECT_S", 2.0)
        config = tiny_run(tiny_shards, tmp_path / "run")
        run(replace(config, output=replace(config.output, loggers=("wandb",))))
    assert "continues offline" in caplog.text and not (tmp_path / "run" / "tensorboard").exists()
    (record,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    assert b"loss/prediction" in record.read_bytes()
