"""`iwm warmup`: compile the kernels of a run once per machine, so that its ranks find them in the cache."""

import time

import numpy as np
import torch

from iwm_fast.config.run import RunConfig
from iwm_fast.kernels.launch import cache_folder
from iwm_fast.kernels.ops import FUSED
from iwm_fast.models.student import build_student, choose_ops, compute_dtype
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.sampling.masks import ragged_index
from iwm_fast.pipelines.transforms.composition import identity_draws
from iwm_fast.runtime import distributed
from iwm_fast.training.teacher import Teacher

# For sizes that equal 1, Triton and torch.compile build special versions, so at least two.
NUM_IMAGES = 2


def compile_kernels(config: RunConfig) -> str:
    """Run forward and backward passes of the run's networks on random images and return a message for the user.

    The number of visible patches is 1 in one image and all but one in another, so that kernels of all lengths start.
    Training then compiles nothing that is not in the cache already.

    Raises:
        ValueError: if the run uses PyTorch's operations, for which there is nothing to compile.
    """
    device = distributed.choose_device(config.runtime.device)
    ops = choose_ops(config, device)
    require(ops is FUSED, "runtime.ops", config.runtime.ops,
            "select fused operations, as only they are compiled; `iwm check` says why they cannot be used")  # fmt: skip
    start = time.perf_counter()
    student = build_student(config, ops).to(device)
    num_patches = config.grid**2
    # The joint length is that of all patches, or shorter if mask.context_scale leaves patches out.
    for num_targets in ((num_patches - 1, 1), (1, 1))[: 1 if config.mask.context_scale is None else 2]:
        batch = random_batch(config, device, num_context=(1, num_patches - 1), num_targets=num_targets)
        prediction = student(batch)
        # Any scalar that depends on all outputs compiles the backward kernels.
        prediction.predicted_tokens.square().sum().backward()
    # The teacher runs the encoder without gradients and on the complete grid of patches.
    Teacher(student.encoder, compute_dtype(config)).encode(batch.target_view, None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return f"kernels of this run are in {cache_folder()}; this took {time.perf_counter() - start:.1f} s"


def random_batch(
    config: RunConfig, device: torch.device, *, num_context: tuple[int, int], num_targets: tuple[int, int]
) -> Batch:
    """Return a batch of two random images in the shapes of the run, with the numbers of their context and target
    patches: the first and the last ones of the grid.
    """
    size, grid_patch = config.views.size, np.arange(config.grid**2)
    context = grid_patch < np.array(num_context)[:, None]
    target = grid_patch >= config.grid**2 - np.array(num_targets)[:, None]
    number = torch.arange(NUM_IMAGES)
    return Batch(
        source_view=torch.randn(NUM_IMAGES, 3, size, size, device=device),
        target_view=torch.randn(NUM_IMAGES, 3, size, size, device=device),
        action=torch.randn(NUM_IMAGES, len(config.views.entries), device=device),
        context=ragged_index(context, int(context.sum())).to(device),
        target=ragged_index(target, int(target.sum())).to(device),
        crop_window=torch.zeros(NUM_IMAGES, 4),
        source_window=torch.zeros(NUM_IMAGES, 4),
        label=number,
        sample=number,
        scheduled_sample=number,
        slot=number,
        key=("noise",) * NUM_IMAGES,
        step=0,
        draws=identity_draws(config.views, NUM_IMAGES),
    )
