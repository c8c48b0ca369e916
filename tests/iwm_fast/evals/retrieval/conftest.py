"""A model and an image for the tests of retrieval."""

import pytest
import torch

from fixtures.tar_files import photograph
from iwm_fast import world_model


@pytest.fixture
def model(tiny_config):
    return world_model.build_untrained(tiny_config())


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.from_numpy(photograph("coffee.png")[100:116, 100:116].copy())
