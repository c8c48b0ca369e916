"""Segmentation maps beside batches: read by threads while networks compute, cut as the views are."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from iwm_fast.pipelines.annotations.segmentation import crop_mask, read_mask, read_mask_values, require_masks
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import check
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.reader import FileCache
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime.distributed import broadcast_from_rank_zero


def count_classes(train: ShardSet, val: ShardSet, *, ignore_index: int, num_threads: int) -> int:
    """Return one more than the largest class in the training maps; every map is read once, by rank 0; collective.

    Raises:
        ShardError: if a sample has no map, or a validation map shows a class that no training map has.
        ValueError: if training maps show nothing but `ignore_index`.
    """

    def count() -> int:
        seen: np.ndarray = np.any(read_mask_values(train, num_threads), axis=0)
        seen[ignore_index] = False
        check(bool(seen.any()), "data.train", f"maps of {ignore_index} alone", "show some class besides ignore_index")
        shown = read_mask_values(val, num_threads) & ~seen
        shown[:, ignore_index] = False
        if shown.any():
            sample, value = np.argwhere(shown)[0]
            where = val.where(int(sample))
            remedy = f"training maps hold {np.flatnonzero(seen).tolist()}; leave it out, or name it with ignore_index"
            raise ShardError(f"segmentation map shows class {value}, which no training map has", **where, remedy=remedy)
        return int(np.flatnonzero(seen)[-1]) + 1

    for shards in (train, val):
        require_masks(shards)
    return broadcast_from_rank_zero(count)


class ViewMasks:
    """Reads the maps of one set of shards for batches of it."""

    def __init__(self, shards: ShardSet, *, size: int, num_classes: int, ignore_index: int, num_threads: int) -> None:
        """Start the threads.

        Args:
            shards: what the batches' samples are numbers in.
            size: side of the views in pixels.
            num_classes: maps with larger numbers are refused.
            ignore_index: but for this one.
            num_threads: maps read and decoded at once.
        """
        self._shards, self._size, self._files = shards, size, FileCache()
        self._num_classes, self._ignore_index = num_classes, ignore_index
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="masks")

    def begin(self, batch: Batch) -> Callable[[], UInt8[Tensor, "B H W"]]:
        """Begin to read a batch's maps, and return what waits for them and gives them, on the batch's device.

        The wait raises:
            ShardError: if a map cannot be used, or shows a class that there is not.
        """
        shown = zip(batch.sample.tolist(), batch.crop_window.numpy(), batch.draws.flip.tolist(), strict=True)
        parts = [self._pool.submit(self._read, *one) for one in shown]

        def wait() -> UInt8[Tensor, "B H W"]:
            masks = torch.from_numpy(np.stack([part.result() for part in parts]))
            return masks.to(batch.source_view.device, non_blocking=True)

        return wait

    def _read(self, sample: int, window: np.ndarray, flip: bool) -> UInt8[np.ndarray, "H W"]:
        mask = crop_mask(read_mask(self._shards, self._files, sample), window, flip, self._size)
        known = mask[mask != self._ignore_index]
        if known.size and known.max() >= self._num_classes:
            what = f"segmentation map shows class {known.max()}, and there are classes 0 .. {self._num_classes - 1}"
            remedy = "raise num_classes, or name the value with ignore_index"
            raise ShardError(what, **self._shards.where(sample), remedy=remedy)
        return mask

    def close(self) -> None:
        """Stop the threads and close the files."""
        self._pool.shutdown(cancel_futures=True)
        self._files.close()
