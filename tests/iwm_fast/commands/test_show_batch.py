"""`iwm show` draws the first images of training, and renders no others."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from fixtures.tiny_pretraining import tiny_run
from iwm_fast.commands import show_batch as module
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.runtime.distributed import single_process
from iwm_fast.training.loaders import open_training_shards, training_loader


@pytest.mark.parametrize("global_batch_size", [2, 7, 13, 16])
def test_the_first_images_of_a_batch_are_drawn(tiny_shards, tmp_path, monkeypatch, global_batch_size):
    config = tiny_run(tiny_shards, tmp_path)
    config = replace(config, optim=replace(config.optim, global_batch_size=global_batch_size))
    with closing(training_loader(config, open_training_shards(config.data), single_process("cpu"))) as loader:
        batch = next(loader)
    rows = []
    monkeypatch.setattr(module, "save_image_grid", lambda path, labels, panels, title: rows.extend(panels))
    module.show_batch(config)
    sources, visible, targets, _ = rows
    count = min(global_batch_size, 8)
    assert [panel.caption for panel in sources] == list(batch.key[:count])
    for panels, view in ((sources, batch.source_view), (targets, batch.target_view)):
        expected = denormalize_view(view[:count], config.data.normalization)
        assert torch.equal(torch.from_numpy(np.stack([panel.pixels for panel in panels])), expected)
    lengths = torch.diff(batch.context.offsets)[:count].tolist()
    assert [panel.caption for panel in visible] == [f"{length} of 16 patches" for length in lengths]
