"""Segmentation maps of batches, read by threads while the networks compute and cropped like the views."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from iwm_fast.pipelines.annotations.segmentation import crop_mask, read_mask, read_mask_values, require_masks
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.reader import FileCache
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime.distributed import broadcast_from_rank_zero


def count_classes(train: ShardSet, val: ShardSet, *, ignore_index: int, num_threads: int) -> int:
    """Return one more than the largest class in the training maps. Collective: every rank must call it.

    Raises:
        ShardError: if a sample has no map, or a validation map contains a class that no training map contains.
        ValueError: if training maps contain only `ignore_index`.
    """

    # Only rank 0 counts, because all maps have to be read.
    def count() -> int:
        in_train: np.ndarray = np.any(read_mask_values(train, num_threads), axis=0)
        in_train[ignore_index] = False
        if not in_train.any():
            raise ValueError(f"maps of data.train contain no class besides ignore_index, which is {ignore_index}")
        only_in_val = read_mask_values(val, num_threads) & ~in_train
        only_in_val[:, ignore_index] = False
        if only_in_val.any():
            sample, value = np.argwhere(only_in_val)[0]
            problem = f"segmentation map contains class {value}, which no training map contains"
            classes = np.flatnonzero(in_train).tolist()
            remedy = f"training maps contain {classes}; remove the sample, or set ignore_index={value}"
            raise ShardError(problem, **val.shard_and_key(int(sample)), remedy=remedy)
        return int(np.flatnonzero(in_train)[-1]) + 1

    for shards in (train, val):
        require_masks(shards)
    return broadcast_from_rank_zero(count)


class MaskReader:
    """Reads the segmentation maps of batches from the shards that the batches come from."""

    def __init__(self, shards: ShardSet, *, size: int, num_classes: int, ignore_index: int, num_threads: int) -> None:
        """Start the threads.

        Args:
            shards: shards that the sample numbers of the batches refer to.
            size: side of the views in pixels.
            num_classes: number of classes; maps with larger values are refused.
            ignore_index: value of pixels without a class, which may be larger.
            num_threads: number of maps that are read and decoded at a time.
        """
        self._shards: ShardSet = shards
        self._size: int = size
        self._num_classes: int = num_classes
        self._ignore_index: int = ignore_index
        self._files = FileCache()
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="masks")

    def prefetch(self, batch: Batch) -> Callable[[], UInt8[Tensor, "B H W"]]:
        """Start to read a batch's maps and return a function that waits for them and moves them to its device.

        Raises:
            ShardError: by the returned function, if a map cannot be used or contains an undefined class.
        """
        views = zip(batch.sample.tolist(), batch.crop_window.numpy(), batch.draws.flip.tolist(), strict=True)
        pending = [self._pool.submit(self._read, *view) for view in views]

        def wait() -> UInt8[Tensor, "B H W"]:
            masks = torch.from_numpy(np.stack([mask.result() for mask in pending]))
            return masks.to(batch.source_view.device, non_blocking=True)

        return wait

    def _read(self, sample: int, window: np.ndarray, flip: bool) -> UInt8[np.ndarray, "H W"]:
        mask = crop_mask(read_mask(self._shards, self._files, sample), window, flip, self._size)
        classes = mask[mask != self._ignore_index]
        if classes.size and classes.max() >= self._num_classes:
            problem = f"segmentation map contains class {classes.max()}, but num_classes is {self._num_classes}"
            remedy = "increase num_classes, or set ignore_index to this value"
            raise ShardError(problem, **self._shards.shard_and_key(sample), remedy=remedy)
        return mask

    def close(self) -> None:
        """Stop the threads and close the files."""
        # Maps may be pending whose batches are not used, for example after an error.
        self._pool.shutdown(cancel_futures=True)
        self._files.close()
