"""Tests on a GPU: one that leaves it unusable for its process does not fail the others."""

import os
from types import SimpleNamespace

import pytest
import torch

from fixtures.paths import PROJECT


@pytest.mark.parametrize(
    ("num_failed", "is_worker", "is_broken"),
    [(1, True, True), (0, True, True), (1, False, True), (1, True, False)],
)
def test_a_worker_ends_only_after_a_failed_test_that_left_the_gpu_unusable(
    request, monkeypatch, num_failed, is_worker, is_broken
):
    def synchronize():
        if is_broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    conftest = request.config.pluginmanager.get_plugin(str(PROJECT / "tests/conftest.py"))
    statuses = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "synchronize", synchronize)
        patch.setattr(os, "_exit", statuses.append)
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        if is_worker:
            patch.setenv("PYTEST_XDIST_WORKER", "gw0")
        item = SimpleNamespace(session=SimpleNamespace(testsfailed=3))
        protocol = conftest.pytest_runtest_protocol(item)
        next(protocol)
        item.session.testsfailed += num_failed
        with pytest.raises(StopIteration):
            protocol.send(True)
    assert statuses == ([1] if num_failed and is_worker and is_broken else [])
