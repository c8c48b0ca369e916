"""One set of frozen features on the disk: what it follows from, writing it on many ranks, telling whether it is whole.

<folder>/rows.npy        pooled: float32 (images, D); tokens: float16 (images, N, D)
         checksums.npy   CRC-32 of each block of images, as they were extracted
         about.json      what the rows follow from

Ranks take blocks of images that are the same for any number of ranks, because a row's last bits may depend on who is in
its batch, and write them into one file: the outcome is the same bit for bit. The folder is there whole or not at all.
"""

import hashlib
import json
import logging
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from jaxtyping import Int64, Shaped, UInt32

from iwm_fast.checkpoints.commit import remove, save_json
from iwm_fast.evals.datasets import Labelled
from iwm_fast.evals.probing.extraction import Kind, encoded
from iwm_fast.monitoring.evaluation_progress import follow
from iwm_fast.runtime import distributed
from iwm_fast.runtime.sharding import real, share
from iwm_fast.training.loaders import EVALUATION_BATCH as BLOCK
from iwm_fast.world_model import WorldModel

log = logging.getLogger("iwm_fast")

ROWS, CHECKSUMS, ABOUT = "rows.npy", "checksums.npy", "about.json"
# raise it when the same key would make other rows
_FORMAT = 1
# what `commit.remove_leftovers` clears away
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True, kw_only=True)
class Wanted:
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
            "dtype": self.dtype.name,
            "loader": config.runtime.loader,
            "device": self.model.device.type,
        }

    @property
    def digest(self) -> str:
        """Name of the rows' folder."""
        return hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def dtype(self) -> np.dtype:
        """Of the rows."""
        return np.dtype(np.float32 if self.kind == "pooled" else np.float16)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all rows."""
        num_images, dim = len(self.part.samples), self.model.config.model.encoder.dim
        return (num_images, dim) if self.kind == "pooled" else (num_images, self.model.config.grid**2, dim)

    @property
    def size_bytes(self) -> int:
        """Of all rows."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def num_blocks(self) -> int:
        """Blocks of images that ranks share."""
        return -(-len(self.part.samples) // BLOCK)


def weights_digest(model: WorldModel) -> str:
    """Return the SHA-256 of the encoder's tensors, names and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def is_whole(folder: Path, wanted: Wanted) -> bool:
    """Return whether the rows are there as they were extracted; what is damaged is removed."""
    if not folder.exists():
        return False
    try:
        damage = _damage(folder, wanted)
    except (OSError, ValueError, TypeError) as error:
        damage = str(error)
    if damage:
        log.warning("features in %s are damaged (%s) and are extracted again", folder, damage)
        remove(folder)
    return not damage


def _damage(folder: Path, wanted: Wanted) -> str:
    if json.loads((folder / ABOUT).read_text(encoding="utf-8")) != wanted.key:
        return f"{ABOUT} is of other rows"
    rows, checksums = np.load(folder / ROWS, mmap_mode="r"), np.load(folder / CHECKSUMS)
    if (rows.shape, rows.dtype, len(checksums)) != (wanted.shape, wanted.dtype, wanted.num_blocks):
        return f"{rows.shape} of {rows.dtype} where {wanted.shape} of {wanted.dtype} are expected"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda block: _checksum(rows[block * BLOCK : (block + 1) * BLOCK]), range(wanted.num_blocks))
        wrong = np.flatnonzero(np.fromiter(found, np.uint32) != checksums)
    return f"checksum of block {wrong[0]}" if len(wrong) else ""


def _checksum(rows: Shaped[np.ndarray, "block *rest"]) -> int:
    return zlib.crc32(rows.data)


def extract(folder: Path, wanted: Wanted) -> None:
    """Let each rank write its share of the blocks, and publish the whole; collective."""
    draft = folder.with_name(f"{_UNFINISHED}{folder.name}")
    try:
        distributed.on_rank_zero(lambda: _begin(draft, wanted))
        own = real(share(np.arange(wanted.num_blocks)))
        checksums = _write_blocks(draft / ROWS, wanted, own)
        # nobody publishes before all have written
        parts = distributed.gather_objects((own, checksums))
        distributed.on_rank_zero(lambda: _publish(draft, folder, wanted, parts))
    except BaseException:
        if not dist.is_initialized() or dist.get_rank() == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise


def _begin(draft: Path, wanted: Wanted) -> None:
    draft.mkdir()
    np.lib.format.open_memmap(draft / ROWS, mode="w+", dtype=wanted.dtype, shape=wanted.shape).flush()


def _write_blocks(path: Path, wanted: Wanted, blocks: Int64[np.ndarray, "blocks"]) -> UInt32[np.ndarray, "blocks"]:
    """Write these blocks into the file, and return their checksums."""
    checksums = np.zeros(len(blocks), np.uint32)
    if not len(blocks):
        return checksums
    part, size = wanted.part, wanted.size_bytes // len(wanted.part.samples)
    samples = np.concatenate([part.samples[block * BLOCK : (block + 1) * BLOCK] for block in blocks])
    what = f"batches of {BLOCK} images encoded, step {wanted.model.step}"
    made = encoded(wanted.model, part.shards, samples, wanted.kind)
    begin = _begin_of_rows(path)
    # written, not mapped: a full disk is an error then, and no signal that kills
    with path.open("r+b") as file:
        for number, rows in enumerate(follow(made, len(blocks), what)):
            content = rows.contiguous().numpy()
            file.seek(begin + int(blocks[number]) * BLOCK * size)
            file.write(content.data)
            checksums[number] = _checksum(content)
        file.flush()
        os.fsync(file.fileno())
    return checksums


def _begin_of_rows(path: Path) -> int:
    """Return how many bytes the header takes.

    Raises:
        OSError: if another machine's rank made the file where this one does not see it.
    """
    try:
        return np.load(path, mmap_mode="r").offset
    except FileNotFoundError as error:
        error.add_note("rank 0 has made this file: all ranks must see the run's folder under the same path")
        raise


def _publish(draft: Path, folder: Path, wanted: Wanted, parts: list[tuple[np.ndarray, np.ndarray]]) -> None:
    checksums = np.zeros(wanted.num_blocks, np.uint32)
    for blocks, part in parts:
        checksums[blocks] = part
    np.save(draft / CHECKSUMS, checksums)
    save_json(wanted.key, draft / ABOUT)
    for name in (CHECKSUMS, ABOUT, "."):
        _force_to_disk(draft / name)
    draft.rename(folder)
    _force_to_disk(folder.parent)
    log.info(
        "%d images encoded at step %d, %.3g GB in %s, which may be deleted",
        len(wanted.part.samples), wanted.model.step, wanted.size_bytes / 1e9, folder.parent,
    )  # fmt: skip


def _force_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
