"""Frozen features on the disk: each encoder looks at each image once, whatever is evaluated afterwards.

    <run>/features/<digest>/rows.npy        pooled: float32 (images, D); tokens: float16 (images, N, D)
                            about.json      what the rows follow from
                            manifest.json   size and SHA-256 of both

The digest is that of everything the rows follow from: the encoder's weights, size and heads, the size of the views,
the shards' content, the samples, loader and kind of device. The rows of the checkpoint and the control that were
evaluated last are kept, for every set of images; the folder may be deleted at any time.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from iwm_fast.evals.datasets import Labelled, tensors_digest
from iwm_fast.evals.probing.extraction import DTYPES, Kind, encode_in_order, row_shape
from iwm_fast.monitoring.evaluation_progress import follow
from iwm_fast.pipelines.config import check
from iwm_fast.pipelines.storage.atomic import publish, remove, remove_leftovers, save_json, verify
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.runtime.run_lock import lock_folder
from iwm_fast.training.loaders import EVALUATION_BATCH
from iwm_fast.world_model import WorldModel

log = logging.getLogger(__name__)

FOLDER, ROWS, ABOUT = "features", "rows.npy", "about.json"
# raise it when the same key would give other rows
_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """Rows that an evaluation needs: one encoder's features of some samples."""

    model: WorldModel
    weights: str
    """Digest of the encoder's weights."""
    part: Labelled
    kind: Kind

    @cached_property
    def key(self) -> dict[str, Any]:
        """Everything that the rows follow from."""
        config = self.model.config
        return {
            "format": _FORMAT,
            "weights": self.weights,
            "encoder": asdict(config.model.encoder),
            "size": config.views.size,
            "shards": self.part.shards.content_digest,
            "samples": hashlib.sha256(self.part.samples.astype("<i8").tobytes()).hexdigest(),
            "kind": self.kind,
            "dtype": DTYPES[self.kind].name,
            "loader": config.runtime.loader,
            "device": self.model.device.type,
        }

    @property
    def digest(self) -> str:
        """Name of the rows' folder."""
        return hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all rows."""
        return (len(self.part.samples), *row_shape(self.model, self.kind))

    @property
    def size_gb(self) -> float:
        """Of all rows, on the disk."""
        return math.prod(self.shape) * DTYPES[self.kind].itemsize / 1e9


class FeatureCache:
    """The features that some encoders make of a run's, or an export's, images."""

    def __init__(self, run: str | Path, models: Sequence[WorldModel], rank_info: RankInfo) -> None:
        """Remove what killed processes and other encoders have left; collective."""
        self._folder = Path(run) / FOLDER
        self._rank_info = rank_info
        self._weights = {id(model): tensors_digest(model.encoder.state_dict().values()) for model in models}
        with self._locked():
            distributed.rank_zero_only(self._remove_others)

    def spec(self, model: WorldModel, part: Labelled, kind: Kind) -> FeatureSpec:
        """Return which rows are meant; the model must be one of those that the cache was opened for."""
        return FeatureSpec(model=model, weights=self._weights[id(model)], part=part, kind=kind)

    def require_room(self, specs: Sequence[FeatureSpec], max_gb: float) -> None:
        """Check that rows may take so much room and that the disk has it.

        Raises:
            ValueError: with the room they take, naming the settings that change it.
        """
        size = {self._folder / spec.digest: spec.size_gb for spec in specs}
        whole = sum(size.values())
        check(whole <= max_gb, "max_cache_gb", max_gb,
              f"be at least {whole:.4g}: that much room the features of all images take in {self._folder}; raise it, "
              "or lower max_train_samples")  # fmt: skip
        missing = sum(gb for folder, gb in size.items() if not folder.exists())
        free = shutil.disk_usage(self._folder.parent).free / 1e9
        if missing > free:
            raise ValueError(
                f"{missing:.4g} GB are still to be written in {self._folder} and {free:.4g} GB are free; make room, or "
                "lower max_train_samples"
            )

    def rows(self, model: WorldModel, part: Labelled, kind: Kind) -> Shaped[np.ndarray, "images *rest"]:
        """Return the features of a part's samples, extracted now unless they are there; collective.

        They are mapped from the file on rank 0, read-only; the other ranks get none.

        Raises:
            ShardError: if an image cannot be decoded, with shard and key.
            OSError: if the disk is full.
        """
        spec = self.spec(model, part, kind)
        folder = self._folder / spec.digest
        with self._locked():
            if not distributed.broadcast_from_rank_zero(lambda: is_complete(folder)):
                extract(folder, spec, self._rank_info)
            # still locked, so that nobody removes it before it is mapped
            rows = distributed.rank_zero_only(lambda: np.load(folder / ROWS, mmap_mode="r"))
        return np.empty((0, *spec.shape[1:]), DTYPES[kind]) if rows is None else rows

    def _remove_others(self) -> None:
        remove_leftovers(self._folder)
        kept = set(self._weights.values())
        others = [about.parent for about in self._folder.glob(f"*/{ABOUT}") if _weights_in(about) not in kept]
        for folder in others:
            remove(folder)
        if others:
            log.info("removed the features of other checkpoints from %s, sets of images: %d", self._folder, len(others))

    def _locked(self) -> AbstractContextManager[object]:
        """Keep other evaluations of the run out of the folder until the context ends; rank 0 does it for all."""
        return distributed.rank_zero_only(lambda: lock_folder(self._folder, wait=True)) or nullcontext()


def is_complete(folder: Path) -> bool:
    """Return whether the rows are there as they were extracted; what is damaged is removed."""
    if not folder.exists():
        return False
    try:
        verify(folder, (ROWS, ABOUT))
    except OSError as error:
        log.warning("features in %s are damaged (%s) and are extracted again", folder, error)
        remove(folder)
        return False
    return True


def extract(folder: Path, spec: FeatureSpec, rank_info: RankInfo) -> None:
    """Encode a share of the images on each rank, and publish all rows from rank 0; collective."""
    batch_size = EVALUATION_BATCH * rank_info.world_size
    what = f"batches of {batch_size} images encoded, step {spec.model.step}"
    encoding = encode_in_order(spec.model, spec.part, spec.kind, rank_info)
    batches = follow(encoding, -(-len(spec.part.samples) // batch_size), what, rank_info)

    def write_rows(path: Path) -> None:
        # written, not mapped: a full disk is an error then, and no signal that kills
        with path.open("wb") as file:
            descr = np.lib.format.dtype_to_descr(DTYPES[spec.kind])
            header = {"descr": descr, "fortran_order": False, "shape": spec.shape}
            np.lib.format.write_array_header_2_0(file, header)
            for rows in batches:
                file.write(rows.contiguous().numpy().data)

    if rank_info.rank != 0:
        # each batch is gathered by all ranks
        for _ in batches:
            pass
        return
    publish(folder, {ROWS: write_rows, ABOUT: lambda path: save_json(spec.key, path)})
    log.info(
        "%d images encoded at step %d, %.3g GB in %s, which may be deleted",
        len(spec.part.samples), spec.model.step, spec.size_gb, folder.parent,
    )  # fmt: skip


def _weights_in(about: Path) -> str:
    """Return which encoder made the rows, empty if that cannot be read."""
    try:
        return json.loads(about.read_text(encoding="utf-8"))["weights"]
    except (ValueError, LookupError, TypeError):
        return ""
