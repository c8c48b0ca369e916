"""The global batch: its division among ranks and micro-batches, and its size relative to the data."""

from iwm_fast.config.run import RunConfig
from iwm_fast.pipelines.config import require


def describe_large_batch(group: str, global_batch_size: int, num_samples: int) -> str:
    """Return a warning if a batch has more images than there are training samples, else an empty text."""
    if global_batch_size <= num_samples:
        return ""
    return (
        f"{group}.global_batch_size = {global_batch_size:,} exceeds the {num_samples:,} training samples, so an epoch "
        "is less than one step and a batch repeats images; set it to a fraction of the samples"
    )


def accumulation_steps(config: RunConfig, world_size: int) -> tuple[int, int]:
    """Return (micro-batch size per rank, micro-batches per optimiser step) of a run.

    Raises:
        ValueError: if the global batch is not divisible by ranks and micro-batch size.
    """
    return split_batch("optim", config.optim.global_batch_size, config.runtime.micro_batch_size, world_size)


def split_batch(group: str, global_batch_size: int, micro_batch_size: int | None, world_size: int) -> tuple[int, int]:
    """Return (micro-batch size per rank, micro-batches per optimiser step).

    Args:
        group: group of the setting global_batch_size, for messages.
        global_batch_size: images per optimiser step over all ranks.
        micro_batch_size: images per rank and forward pass; None for the complete share of a rank.
        world_size: number of ranks.

    Raises:
        ValueError: if the global batch is not divisible by ranks and micro-batch size.
    """
    name = f"{group}.global_batch_size"
    require(global_batch_size % world_size == 0, name, global_batch_size, f"be a multiple of the {world_size} ranks")
    micro = micro_batch_size or global_batch_size // world_size
    equation = f"satisfy micro_batch_size * {world_size} ranks * accumulation = {name} = {global_batch_size}"
    require(global_batch_size % (micro * world_size) == 0, "runtime.micro_batch_size", micro, equation)
    return micro, global_batch_size // (micro * world_size)
