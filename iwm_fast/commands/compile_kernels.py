"""`iwm warmup`: compile the kernels of a run once per machine, so that its ranks find them in the cache."""

import time

import torch

from iwm_fast.config.run import RunConfig
from iwm_fast.kernels.launch import cache_folder
from iwm_fast.models.student import build_student, choose_ops, compute_dtype
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.sampling.masks import all_patches
from iwm_fast.pipelines.transforms.parameters import identity_draws
from iwm_fast.runtime import distributed
from iwm_fast.training.teacher import Teacher

# Any number above one would do. For sizes that equal 1, Triton and torch.compile build special versions.
NUM_IMAGES = 2


def compile_kernels(config: RunConfig) -> str:
    """Run one forward and backward pass of the run's networks on random images and return a message for the user.

    All patches are both context and target. No batch of the run has longer sequences, so training compiles nothing
    that is not in the cache already.

    Raises:
        ValueError: if `runtime.ops` is not fused, as such a run compiles no kernels.
        RuntimeError: if there is no GPU and the kernels are not interpreted.
    """
    require(
        config.runtime.ops == "fused", "runtime.ops", config.runtime.ops, "be fused, as only fused ops are compiled"
    )
    device = distributed.choose_device(config.runtime.device)
    start = time.perf_counter()
    student = build_student(config, choose_ops(config, device)).to(device)
    batch = random_batch(config, device)
    prediction = student(batch)
    # Any scalar that depends on all outputs compiles the backward kernels.
    prediction.predicted_tokens.square().sum().backward()
    # The teacher runs the encoder without gradients and on the complete grid of patches.
    Teacher(student.encoder, compute_dtype(config)).encode(batch.target_view, None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return f"kernels of this run are in {cache_folder()}; this took {time.perf_counter() - start:.1f} s"


def random_batch(config: RunConfig, device: torch.device) -> Batch:
    """Return a batch of random images and actions in the shapes of the run; all patches are both context and target."""
    size = config.views.size
    patches = all_patches(NUM_IMAGES, config.grid**2).to(device)
    indices = torch.arange(NUM_IMAGES, device=device)
    return Batch(
        source_view=torch.randn(NUM_IMAGES, 3, size, size, device=device),
        target_view=torch.randn(NUM_IMAGES, 3, size, size, device=device),
        action=torch.randn(NUM_IMAGES, len(config.views.entries), device=device),
        context=patches,
        target=patches,
        crop_window=torch.zeros(NUM_IMAGES, 4, device=device),
        source_window=torch.zeros(NUM_IMAGES, 4, device=device),
        label=indices,
        sample=indices,
        scheduled_sample=indices,
        slot=indices,
        key=("noise",) * NUM_IMAGES,
        step=0,
        draws=identity_draws(NUM_IMAGES),
    )
