"""Compile the kernels a run needs, once per machine, before its ranks start and would each compile them."""

import time

import torch

from iwm_fast.config.run import RunConfig
from iwm_fast.kernels.launch import cache_folder
from iwm_fast.models.student import build_student, choose_ops, compute_dtype
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import check
from iwm_fast.pipelines.sampling.masks import all_patches
from iwm_fast.pipelines.transforms.parameters import identity_draws
from iwm_fast.runtime import distributed
from iwm_fast.training.teacher import Teacher

# one would be as good, but for dimensions of size one that are special to some libraries
NUM_IMAGES = 2


def warm_up(config: RunConfig) -> str:
    """Run one forward and backward pass of the run's networks on noise; return what was done in one sentence.

    Every patch is context and target at once: no batch of the run is longer, so no batch compiles anew.

    Raises:
        ValueError: if the run has nothing to compile.
        RuntimeError: without a GPU, unless kernels are interpreted.
    """
    check(config.runtime.ops == "fused", "runtime.ops", config.runtime.ops, "be fused; nothing else is compiled")
    device = distributed.choose_device(config.runtime.device)
    began = time.perf_counter()
    student = build_student(config, choose_ops(config, device)).to(device)
    batch = noise(config, device)
    prediction = student(batch)
    prediction.predicted_tokens.square().sum().backward()
    Teacher(student.encoder, compute_dtype(config)).encode(batch.target_view, None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return f"kernels of this run are in {cache_folder()} after {time.perf_counter() - began:.1f} s"


def noise(config: RunConfig, device: torch.device) -> Batch:
    """Return a batch without meaning in the shapes of the run, every patch both context and target."""
    size = config.views.size
    patches = all_patches(NUM_IMAGES, config.grid**2).to(device)
    numbers = torch.arange(NUM_IMAGES, device=device)
    return Batch(
        source_view=torch.randn(NUM_IMAGES, 3, size, size, device=device),
        target_view=torch.randn(NUM_IMAGES, 3, size, size, device=device),
        action=torch.randn(NUM_IMAGES, len(config.views.entries), device=device),
        context=patches,
        target=patches,
        crop_window=torch.zeros(NUM_IMAGES, 4, device=device),
        source_window=torch.zeros(NUM_IMAGES, 4, device=device),
        label=numbers,
        sample=numbers,
        scheduled_sample=numbers,
        slot=numbers,
        key=("noise",) * NUM_IMAGES,
        step=0,
        draws=identity_draws(NUM_IMAGES),
    )
