"""A cache of frozen features on disk, so that an encoder encodes an image once for all evaluations.

    <run>/features/<digest>/rows.npy        pooled: float32 (images, D); tokens: float16 (images, N, D)
                            about.json      everything that determines the features
                            manifest.json   size and SHA-256 of both files

The digest is that of about.json: weights and architecture of the encoder, its layers, size of the views, content of the
shards, samples, loader and type of device. For all sets of images, the features of the checkpoint and the control that
were evaluated last, at the size of that time, are kept. The folder may be deleted at any time.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

from iwm_fast.evals.datasets import LabelledSamples, tensors_digest
from iwm_fast.evals.probing.extraction import DTYPES, FeatureKind, encode_on_all_ranks, feature_shape
from iwm_fast.monitoring.evaluation_progress import track_progress
from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.storage.atomic import (
    remove_folder,
    remove_unfinished,
    verify_manifest,
    write_folder,
    write_json,
)
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.runtime.run_lock import lock_folder
from iwm_fast.training.loaders import EVALUATION_BATCH_SIZE
from iwm_fast.world_model import WorldModel

log = logging.getLogger(__name__)

FOLDER, FEATURES_FILE, KEY_FILE = "features", "rows.npy", "about.json"
# Increment it when a change of the code changes the features of an unchanged key.
_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """Which features an evaluation needs: the encoder, the samples, and pooled features or tokens."""

    model: WorldModel
    weights_digest: str
    labelled: LabelledSamples
    kind: FeatureKind
    layers: int = 1
    """Number of last layers of the encoder."""

    @cached_property
    def key(self) -> dict[str, Any]:
        """Everything that determines the features."""
        config = self.model.config
        return {
            "format": _FORMAT,
            "weights": self.weights_digest,
            "encoder": asdict(config.model.encoder),
            "size": config.views.size,
            "shards": self.labelled.shards.content_digest,
            "samples": hashlib.sha256(self.labelled.samples.astype("<i8").tobytes()).hexdigest(),
            "kind": self.kind,
            "dtype": DTYPES[self.kind].name,
            # Loaders and devices decode, resize and sum with different rounding.
            "loader": config.runtime.loader,
            "device": self.model.device.type,
            # Only if they are set, so that features which were written before these settings existed are still found.
            **({"layers": self.layers} if self.layers > 1 else {}),
            # The member that is the image (data.image): two members may have equal sizes, which are all that the digest
            # of the shards covers.
            **({"image": self.labelled.shards.image} if self.labelled.shards.image else {}),
        }

    @property
    def digest(self) -> str:
        """Name of the folder of these features."""
        return hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the features of all samples."""
        return (len(self.labelled.samples), *feature_shape(self.model, self.kind, self.layers))

    @property
    def size_gb(self) -> float:
        """Size on disk in GB of 10^9 bytes."""
        return math.prod(self.shape) * DTYPES[self.kind].itemsize / 1e9


class FeatureCache:
    """Cached features of a run or an export, for the encoders of one evaluation."""

    def __init__(self, run: str | Path, models: Sequence[WorldModel], rank_info: RankInfo) -> None:
        """Delete features of other encoders and of killed processes. Collective: every rank must call it."""
        self._folder = Path(run) / FOLDER
        self._rank_info = rank_info
        self._digests = {id(model): tensors_digest(model.encoder.state_dict().values()) for model in models}
        with self._lock():
            distributed.rank_zero_only(self._remove_stale)

    def spec(self, model: WorldModel, labelled: LabelledSamples, kind: FeatureKind, layers: int = 1) -> FeatureSpec:
        """Return the specification of features; the model must be one of those that the cache was opened for."""
        digest = self._digests[id(model)]
        return FeatureSpec(model=model, weights_digest=digest, labelled=labelled, kind=kind, layers=layers)

    def check_disk_space(self, specs: Sequence[FeatureSpec], max_gb: float) -> None:
        """Check that features fit into `max_gb` and that those to be written fit on the disk.

        Raises:
            ValueError: if they do not, with their size and the settings that change it.
        """
        size_gb = {self._folder / spec.digest: spec.size_gb for spec in specs}
        total = sum(size_gb.values())
        require(total <= max_gb, "max_cache_gb", max_gb,
              f"be at least {total:.4g}, the size of the features of all images in {self._folder}; raise it or lower "
              "max_train_samples")  # fmt: skip
        missing = sum(size for folder, size in size_gb.items() if not folder.exists())
        free = shutil.disk_usage(self._folder.parent).free / 1e9
        if missing > free:
            raise ValueError(
                f"the features need {missing:.4g} GB more in {self._folder}, but {free:.4g} GB are free; free disk "
                "space or lower max_train_samples"
            )

    def rows(
        self, model: WorldModel, labelled: LabelledSamples, kind: FeatureKind, layers: int = 1
    ) -> Shaped[np.ndarray, "images *rest"]:
        """Return the features of labelled samples, which are extracted first if they are not in the cache.

        On rank 0 they are mapped from the file, read-only; on the other ranks the array is empty. Collective: every
        rank must call it.

        Raises:
            ShardError: if an image cannot be decoded, with shard and key.
            OSError: if the disk is full.
        """
        spec = self.spec(model, labelled, kind, layers)
        folder = self._folder / spec.digest
        with self._lock():
            # Rank 0 decides for all ranks, which may see different states of a network file system.
            if not distributed.broadcast_from_rank_zero(lambda: verify_or_remove(folder)):
                write_features(folder, spec, self._rank_info)
            # Mapped before the lock is released, because another evaluation may delete the file, but not the mapping.
            features = distributed.rank_zero_only(lambda: np.load(folder / FEATURES_FILE, mmap_mode="r"))
        return np.empty((0, *spec.shape[1:]), DTYPES[kind]) if features is None else features

    def _remove_stale(self) -> None:
        remove_unfinished(self._folder)
        current = set(self._digests.values())
        stale = [
            path.parent for path in self._folder.glob(f"*/{KEY_FILE}") if _read_weights_digest(path) not in current
        ]
        for folder in stale:
            remove_folder(folder)
        if stale:
            log.info("removed %d sets of features of other checkpoints from %s", len(stale), self._folder)

    def _lock(self) -> AbstractContextManager[object]:
        """Lock the folder against other evaluations until the context ends. Rank 0 holds the lock for all ranks."""
        return distributed.rank_zero_only(lambda: lock_folder(self._folder, wait=True)) or nullcontext()


def verify_or_remove(folder: Path) -> bool:
    """Return whether the folder holds undamaged features; remove it if they are damaged."""
    if not folder.exists():
        return False
    try:
        verify_manifest(folder, (FEATURES_FILE, KEY_FILE))
    except OSError as error:
        log.warning("features in %s are damaged (%s) and are extracted again", folder, error)
        remove_folder(folder)
        return False
    return True


def write_features(folder: Path, spec: FeatureSpec, rank_info: RankInfo) -> None:
    """Encode the images on all ranks and publish their features from rank 0. Collective: every rank must call it.

    Raises:
        FloatingPointError: if a feature is not finite, or too large for its precision; nothing is written.
    """
    batch_size = EVALUATION_BATCH_SIZE * rank_info.world_size
    num_batches = -(-len(spec.labelled.samples) // batch_size)
    description = f"batches of {batch_size} images encoded, step {spec.model.step}"
    features = encode_on_all_ranks(spec.model, spec.labelled, spec.kind, spec.layers, rank_info)
    batches = track_progress(_require_finite(features, spec), num_batches, description, rank_info)

    def write_array(path: Path) -> None:
        # Written as a stream: on a full disk, writing to a mapped file would kill the process by SIGBUS instead of
        # raising an error.
        with path.open("wb") as file:
            descr = np.lib.format.dtype_to_descr(DTYPES[spec.kind])
            header = {"descr": descr, "fortran_order": False, "shape": spec.shape}
            np.lib.format.write_array_header_2_0(file, header)
            for batch in batches:
                file.write(batch.contiguous().numpy().data)

    if rank_info.rank != 0:
        # All ranks iterate, because every batch is gathered from all of them.
        for _ in batches:
            pass
        return
    write_folder(folder, {FEATURES_FILE: write_array, KEY_FILE: lambda path: write_json(spec.key, path)})
    log.info(
        "encoded %d images at step %d; their features take %.3g GB in %s, which may be deleted",
        len(spec.labelled.samples), spec.model.step, spec.size_gb, folder.parent,
    )  # fmt: skip


def _require_finite(batches: Iterator[Tensor], spec: FeatureSpec) -> Iterator[Tensor]:
    for batch in batches:
        if not batch.isfinite().all():
            raise FloatingPointError(
                f"the encoder of step {spec.model.step} has features that are not finite, or not in "
                f"{DTYPES[spec.kind]}: its training has diverged; evaluate an earlier one with checkpoint=STEP"
            )
        yield batch


def _read_weights_digest(path: Path) -> str:
    """Return the digest of the encoder's weights from a key file, empty if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["weights"]
    except (ValueError, LookupError, TypeError):
        return ""
