"""What the records of training steps are called: tasks and who does them, for those who measure and those who read."""

STEP, LOADING = "training step", "training step with its loader"

BARE, PLAIN, DDP = "bare loop", "plain engine", "DistributedDataParallel"
ZERO = tuple(f"DeepSpeed ZeRO-{stage}" for stage in range(4))
DEFAULT = ZERO[1]
"""What a run takes if nothing else is said."""
FUSED, COMPILED = ", fused", ", compiled"
"""Endings of names: Triton kernels, torch.compile."""

CACHED, SHARDS = "one cached batch", "shards"
"""Where a loader's batches come from."""

SMALL, BASE = "ViT-S/16 + 6x192", "ViT-B/16 + 18x384"
"""Encoder and predictor: the ones measured on a CPU and on a GPU."""
