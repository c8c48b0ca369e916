"""Check shards: decode all images and masks, count what they hold, and leave broken samples out of the index.

Broken bytes in the middle of a JPEG are not an error for any of the decoders: they decode to grey or noise, here as in
training.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from iwm_fast.pipelines.annotations.segmentation import NoMaskError, decode_mask_of_size
from iwm_fast.pipelines.config import MAX_PIXELS
from iwm_fast.pipelines.errors import EmptyShardError, ShardError, UndecodableImageError, printable
from iwm_fast.pipelines.image_header import probe
from iwm_fast.pipelines.storage.index_cache import file_version, save_filtered_index
from iwm_fast.pipelines.storage.shard import Shard, Unused, index_shard
from iwm_fast.pipelines.storage.tar_reader import ShardFile
from iwm_fast.pipelines.transforms.image_decoding import decode_image
from iwm_fast.pipelines.worker_processes import worker_pool

# A process takes about as long to start as to decode this much.
_BYTES_PER_PROCESS = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample whose image or mask cannot be decoded, or whose mask differs from its image in size."""

    key: str
    reason: str


@dataclass(kw_only=True)
class ShardReport:
    """Contents and defects of a shard."""

    path: str
    formats: Counter[str] = field(default_factory=Counter)
    """Number of readable images of each format."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Width and height of each readable image, in pixels."""
    num_unlabelled: int = 0
    """Number of samples without a .cls member."""
    num_json: int = 0
    """Number of samples with a .json member."""
    first_without_json: str = ""
    """Key of the first sample without a .json member, empty if all samples have one."""
    num_masks: int = 0
    """Number of samples with a valid segmentation map."""
    invalid_masks: list[BadSample] = field(default_factory=list)
    """Samples whose PNG next to the image holds no class indices. Their images are drawn nevertheless."""
    bad: list[BadSample] = field(default_factory=list)
    """Samples left out of the stored index, so that they are never drawn."""
    unused: dict[str, Unused] = field(default_factory=dict)
    """Members that no sample uses, by kind."""
    refusal: str = ""
    """Reason why no sample of the shard can be used, empty if the shard can be used."""
    holds_no_image: bool = False
    """Whether the reason is that there is no image, so that runs leave the shard out."""


def validate_shards(
    paths: Sequence[str], num_processes: int | None = None, *, image: str = "", max_pixels: int = MAX_PIXELS
) -> Iterator[ShardReport]:
    """Yield the report of each shard in the order of `paths`, and store an index without the bad samples.

    Args:
        paths: paths of the shards, from `find_shards`.
        image: extension of the member that is the image, as in `data.image`; empty: the usual extensions.
        num_processes: number of shards checked at a time; unset: one per core, but at most one per 256 MiB of shards.
        max_pixels: largest number of pixels of an image or a mask; larger ones are bad.

    Raises:
        OSError: if a shard cannot be read, or no index without its bad samples can be stored.
    """
    if num_processes is None:
        size_bytes = sum(_BYTES_PER_PROCESS if "://" in path else os.path.getsize(path) for path in paths)
        num_processes = min(len(os.sched_getaffinity(0)), 1 + size_bytes // _BYTES_PER_PROCESS)
    num_processes = min(num_processes, len(paths))
    check = partial(validate_shard, image=image, max_pixels=max_pixels)
    if num_processes == 1:
        yield from map(check, paths)
        return
    with worker_pool(num_processes) as pool:
        yield from pool.map(check, paths)


def validate_shard(path: str, image: str = "", max_pixels: int = MAX_PIXELS) -> ShardReport:
    """Decode all images and masks of a shard and store an index without the bad samples.

    Raises:
        OSError: if the shard cannot be read, or no index without its bad samples can be stored.
    """
    report = ShardReport(path=path)
    # Taken before reading: if the shard changes during the check, the stored index is outdated at once.
    version = file_version(path)
    try:
        # From the headers, because a stored index may already leave out samples.
        shard = index_shard(path, image)
    except ShardError as error:
        report.refusal, report.holds_no_image = str(error), isinstance(error, EmptyShardError)
        return report
    report.unused = shard.unused
    bad_positions = []
    with ShardFile(path) as file:
        for position, key in enumerate(shard.keys):
            reason = _check_sample(shard, position, file, report, max_pixels)
            if reason:
                bad_positions.append(position)
                report.bad.append(BadSample(key=key, reason=reason))
    report.num_unlabelled = int((shard.label < 0).sum())
    without_json = np.flatnonzero(shard.json_offset == 0)
    report.num_json = len(shard.keys) - len(without_json)
    report.first_without_json = shard.keys[int(without_json[0])] if len(without_json) else ""
    if len(bad_positions) == len(shard.keys):
        problem = f"none of its {len(bad_positions)} samples can be decoded, so that runs leave it out"
        report.refusal = printable(f"{path}: {problem}; write the shard again")
    save_filtered_index(shard, version, bad_positions, image)
    return report


def _check_sample(shard: Shard, position: int, file: ShardFile, report: ShardReport, max_pixels: int) -> str:
    """Return the reason why a sample is bad; if it is good, add it to the report and return an empty string."""
    content = file.read_at(int(shard.image_offset[position]), int(shard.image_size[position]))
    try:
        header = probe(content, max_pixels)
        decode_image(content, max_pixels)
    except UndecodableImageError as error:
        return str(error)
    if shard.mask_offset[position]:
        mask = file.read_at(int(shard.mask_offset[position]), int(shard.mask_size[position]))
        try:
            decode_mask_of_size(mask, header.upright_size, max_pixels)
            report.num_masks += 1
        except NoMaskError as error:
            # The PNG may be another picture instead of a mask, which does not make the image bad.
            report.invalid_masks.append(BadSample(key=shard.keys[position], reason=str(error)))
        except UndecodableImageError as error:
            return str(error)
    report.formats[header.container] += 1
    report.sizes.append((header.width, header.height))
    return ""
