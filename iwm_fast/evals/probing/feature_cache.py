"""Frozen features on the disk: each encoder looks at each image once, whatever is evaluated afterwards.

<run>/features/<digest>/   see feature_files

The digest is that of everything the rows follow from: the encoder's weights, size and heads, the size of the views,
the shards' content, the samples, loader and kind of device. Kept are the rows of the checkpoint and the control that
were evaluated last, for every set of images asked for; the folder may be deleted at any time.
"""

import fcntl
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch.distributed as dist
from jaxtyping import Shaped

from iwm_fast.checkpoints.commit import remove, remove_leftovers
from iwm_fast.evals.datasets import Labelled
from iwm_fast.evals.probing.extraction import Kind
from iwm_fast.evals.probing.feature_files import ABOUT, ROWS, Wanted, extract, is_whole, weights_digest
from iwm_fast.pipelines.config import check
from iwm_fast.runtime import distributed
from iwm_fast.world_model import WorldModel

log = logging.getLogger("iwm_fast")

FOLDER = "features"
_LOCK = ".lock"
_GB = 1e9


class FeatureCache:
    """The features of a run, or an export, that some encoders make."""

    def __init__(self, run: str | Path, models: Sequence[WorldModel]) -> None:
        """Remove what killed processes and other encoders have left; collective."""
        self._folder = Path(run) / FOLDER
        self._weights = {id(model): weights_digest(model) for model in models}
        with self._held():
            distributed.on_rank_zero(self._clear_away)

    def wanted(self, model: WorldModel, part: Labelled, kind: Kind) -> Wanted:
        """Say which rows are meant; the model must be one of those that the cache was opened for."""
        return Wanted(model=model, weights=self._weights[id(model)], part=part, kind=kind)

    def require_room(self, wanted: Sequence[Wanted], max_gb: float) -> None:
        """Check that rows may take so much room and that the disk has it; collective.

        Raises:
            ValueError: with the room they take, naming the settings that change it.
        """
        distributed.on_rank_zero(lambda: self._check_room(wanted, max_gb))

    def _check_room(self, wanted: Sequence[Wanted], max_gb: float) -> None:
        size = {one.digest: one.size_bytes for one in wanted}
        whole, missing = (
            sum(size[digest] for digest in size if wants_all or not (self._folder / digest).exists()) / _GB
            for wants_all in (True, False)
        )
        place, less = f"in {self._folder}", "or lower max_train_samples"
        accepted = f"be at least {whole:.4g}: that much room the features of all images take {place}; raise it, {less}"
        check(whole <= max_gb, "max_cache_gb", max_gb, accepted)
        free = shutil.disk_usage(self._folder.parent).free / _GB
        left = f"{missing:.4g} GB are still to be written {place} and {free:.4g} GB are free"
        accepted = f"be met by the disk: {left}; make room, {less}"
        check(missing <= free, "max_cache_gb", max_gb, accepted)

    def rows(self, model: WorldModel, part: Labelled, kind: Kind) -> Shaped[np.ndarray, "images *rest"]:
        """Return the features of a part's samples, extracted now unless they are there; collective.

        They are mapped from the file on rank 0, read-only; the other ranks get none.

        Raises:
            ShardError: if an image cannot be decoded, with shard and key.
            OSError: if the disk is full, or the ranks do not share the folder.
        """
        wanted = self.wanted(model, part, kind)
        folder = self._folder / wanted.digest
        with self._held():
            if not distributed.on_rank_zero(lambda: is_whole(folder, wanted)):
                extract(folder, wanted)
            # still held, so that nobody clears it away before it is mapped
            if _is_first():
                return np.load(folder / ROWS, mmap_mode="r")
        return np.empty((0, *wanted.shape[1:]), wanted.dtype)

    def _clear_away(self) -> None:
        remove_leftovers(self._folder)
        kept = set(self._weights.values())
        others = [about.parent for about in self._folder.glob(f"*/{ABOUT}") if _weights_in(about) not in kept]
        for folder in others:
            remove(folder)
        if others:
            log.info("removed the features of other checkpoints from %s, sets of images: %d", self._folder, len(others))

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Keep other evaluations of the run out of the folder; rank 0 does it for all."""
        locks: list[IO[str]] = []
        distributed.on_rank_zero(lambda: locks.append(_lock(self._folder)))
        try:
            yield
        finally:
            for lock in locks:
                lock.close()


def _lock(folder: Path) -> IO[str]:
    """Wait until nobody else holds the folder, and return what holds it until it is closed."""
    folder.mkdir(exist_ok=True)
    file = (folder / _LOCK).open("a", encoding="ascii")
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another evaluation, which writes into %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        # some shared file systems know no locks
        log.warning("%s cannot be locked (%s): evaluate this run once at a time", folder, error)
    return file


def _weights_in(about: Path) -> str:
    """Return which encoder made the rows, empty if that cannot be read."""
    try:
        return json.loads(about.read_text(encoding="utf-8"))["weights"]
    except (ValueError, LookupError, TypeError):
        return ""


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
