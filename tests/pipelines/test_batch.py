"""Copies of a batch's tensors to the training device."""

import pytest
import torch

from iwm_fast.pipelines.batch import to_device


def test_a_tensor_that_is_on_the_device_is_not_copied():
    tensor = torch.arange(3)
    assert to_device(tensor, torch.device("cpu")) is tensor


def test_the_host_does_not_wait_for_copies_to_a_gpu(monkeypatch):
    steps, tensor = [], torch.arange(3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: steps.append("pin") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *place, **options: steps.append((place, options)) or self)
    assert to_device(tensor, torch.device("cuda", 1)) is tensor
    assert steps == ["pin", ((torch.device("cuda", 1),), {"non_blocking": True})]


@pytest.mark.gpu
def test_copies_to_a_gpu_are_equal():
    device, tensor = torch.device("cuda", 0), torch.arange(100_000)
    copy = to_device(tensor, device)
    assert copy.device == device and torch.equal(copy.cpu(), tensor)
    assert to_device(copy, device) is copy
