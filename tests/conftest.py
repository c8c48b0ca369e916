"""Shared set-up: one thread, tiny shards, NaN in fresh memory."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill uninitialised tensors with NaN, so that an element never written is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
