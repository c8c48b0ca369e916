"""Set-up of all tests: one thread, tiny shards of real photographs, NaN in uninitialised memory."""

# ruff: noqa: E402

import gc
import getpass
import importlib.metadata
import importlib.util
import os
import signal
import tempfile
import threading

# cuBLAS reads it when CUDA starts. Without it, products are refused as not deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Nothing that the following imports create is garbage.
gc.disable()

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Triton reads it when kernels are imported. Without a GPU they are interpreted, with one they are compiled.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Not kernels: the hook would wrap the functions that Triton and torch.library read.
CHECKED = (
    "cli", "train", "evaluate", "world_model", "checkpoints", "commands", "config", "engines", "evals", "lab", "models",
    "monitoring", "pipelines", "rendering", "runtime", "training",
)  # fmt: skip
if importlib.util.find_spec("beartype"):
    from fixtures.type_checks import check_types

    check_types([f"iwm_fast.{name}" for name in CHECKED])

from fixtures.tar_files import TinyShards, encode, photograph, write_tar

torch.set_num_threads(1)

# Shells start background jobs with SIGINT ignored, and nohup ignores SIGHUP. Programs that tests start would inherit
# this and ignore these signals, too; a handler is not inherited.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(_number, lambda *_: None)

# Machines are shared, so a slow example is no failure. `make test` draws the same examples every time, so that a change
# is judged on itself; `make test-all` selects the profile "random" and looks for new ones.
hypothesis.settings.register_profile("random", deadline=None, print_blob=True)
hypothesis.settings.register_profile("repeatable", hypothesis.settings.get_profile("random"), derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _temporary_files(tmp_path_factory):
    """Direct temporary files, also of programs that tests start and end, to a folder that pytest removes."""
    # Where torch keeps what it has compiled, also for the next session.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")
    folder = tmp_path_factory.mktemp("temporary", numbered=False)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    # Shard indexes that cannot be written next to their shards must not end up in the user's cache.
    os.environ["IWM_CACHE"] = str(folder / "cache")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill uninitialised tensors with NaN, so that tests notice an element that is never written."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


# tryfirst, so that it runs before pytest-xdist reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        # Tests that launch processes may share a long run within their module, so one worker takes the module.
        if item.get_closest_marker("multi_rank") or item.get_closest_marker("launcher"):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))
    if torch.cuda.is_available():
        return
    reasons = {"gpu": "needs an NVIDIA GPU"}
    numpy_version = tuple(map(int, np.__version__.split(".")[:2]))
    if importlib.metadata.version("triton").startswith("3.6.") and numpy_version >= (2, 4):
        reasons["fused"] = "triton 3.6 cannot interpret loops under numpy >= 2.4; install triton >= 3.9 or numpy 2.3"
    for item in items:
        for keyword, reason in reasons.items():
            if keyword in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """End a worker of pytest-xdist whose GPU is unusable after a failed test: every later test would fail."""
    num_failed = item.session.testsfailed
    result = yield
    # The outcome has been sent, but not that the test is complete, so that pytest-xdist blames no other test.
    has_failed = item.session.testsfailed > num_failed
    if has_failed and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return result


def pytest_collection_finish():
    # Collections no longer look at what has been imported, which would take them half a second each.
    gc.freeze()
    gc.enable()


def pytest_sessionfinish():
    # Some libraries report objects that are not collected before they end.
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory) -> TinyShards:
    """Write three shards of 48 labelled crops of photographs, once for all tests."""
    folder = tmp_path_factory.mktemp("tiny")
    photographs = [photograph(name) for name in ("astronaut.png", "coffee.png", "chelsea.png")]
    generator = np.random.default_rng(0)
    number = 0
    for shard, count in enumerate((20, 17, 11)):
        members = []
        for _ in range(count):
            label = number % 3
            height, width = generator.integers(40, 90, 2)
            top, left = generator.integers(0, 200, 2)
            crop = photographs[label][top : top + height, left : left + width]
            members += [(f"{number:04}.jpg", encode(crop)), (f"{number:04}.cls", str(label).encode())]
            number += 1
        write_tar(folder / f"tiny-{shard:06}.tar", members)
    return TinyShards(pattern=str(folder / "tiny-{000000..000002}.tar"), folder=folder)
