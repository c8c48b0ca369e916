"""Look at every sample once: decode image and mask, count what there is, and leave out of the index what is broken.

Broken bytes in the middle of a JPEG are no error to any decoder here: they decode to grey or garbage, as in training.
"""

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

import numpy as np
from PIL import Image, UnidentifiedImageError

from iwm_fast.pipelines.annotations.segmentation import NoMaskError, decode_mask, size_difference, upright_size
from iwm_fast.pipelines.config import IMAGE_FORMATS
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.index_cache import file_version, save_filtered_index
from iwm_fast.pipelines.storage.shard import Shard, index_shard
from iwm_fast.pipelines.storage.tar_reader import ShardFile


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample whose image or mask cannot be decoded, or whose mask is not of its image's size."""

    key: str
    reason: str


@dataclass(kw_only=True)
class ShardReport:
    """What one shard holds."""

    path: str
    formats: Counter[str] = field(default_factory=Counter)
    """Images by format."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Width and height of each readable image, in pixels."""
    num_unlabelled: int = 0
    num_json: int = 0
    """Samples with a .json member."""
    first_without_json: str = ""
    """Key of the first sample that has none; empty if all have one."""
    num_masks: int = 0
    """Samples with a segmentation map that can be used."""
    no_masks: list[BadSample] = field(default_factory=list)
    """Samples with a PNG in a mask's place that holds no class indices; their images are drawn all the same."""
    bad: list[BadSample] = field(default_factory=list)
    """Left out of the kept index, so that they are never drawn."""
    refusal: str = ""
    """Why the shard as a whole cannot be used; empty if it can."""


def validate(paths: Sequence[str], num_processes: int | None = None) -> Iterator[ShardReport]:
    """Yield a report per shard, in their order; several at a time are worked on.

    Args:
        paths: the shards', from `find_shards`.
        num_processes: unset: one per core.

    Raises:
        OSError: if a shard cannot be read, or no index without its bad samples can be kept.
    """
    num_processes = min(num_processes or len(os.sched_getaffinity(0)), len(paths))
    if num_processes == 1:
        yield from map(validate_shard, paths)
        return
    # a forked process would inherit the locks that this one's threads happen to hold
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(validate_shard, paths)


def validate_shard(path: str) -> ShardReport:
    """Decode every image and mask of a shard; keep an index that leaves out the samples that are broken."""
    report, stamp = ShardReport(path=path), file_version(path)
    try:
        # from the headers and not from a kept index, which may lack samples already
        shard = index_shard(path)
    except ShardError as error:
        report.refusal = str(error)
        return report
    bad = []
    with ShardFile(path) as file:
        for position, key in enumerate(shard.keys):
            reason = _look_at(shard, position, file, report)
            if reason:
                bad.append(position)
                report.bad.append(BadSample(key=key, reason=reason))
    report.num_unlabelled = int((shard.label < 0).sum())
    without_json = np.flatnonzero(shard.json_offset == 0)
    report.num_json = len(shard.keys) - len(without_json)
    report.first_without_json = shard.keys[int(without_json[0])] if len(without_json) else ""
    if len(bad) == len(shard.keys):
        report.refusal = f"{path}: none of its {len(bad)} samples can be decoded; write the shard again"
        return report
    save_filtered_index(shard, stamp, bad)
    return report


def _look_at(shard: Shard, position: int, file: ShardFile, report: ShardReport) -> str:
    """Return why the sample cannot be used; if it can, count what it has and return an empty string."""
    content = file.read_at(int(shard.image_offset[position]), int(shard.image_size[position]))
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.format not in IMAGE_FORMATS:
                return f"is {image.format}, accepted are {', '.join(IMAGE_FORMATS)}"
            image.convert("RGB")
            kind, size, turned = str(image.format), image.size, upright_size(content)
    except UnidentifiedImageError:
        return f"is no image, it begins with {content[:16]!r}" if content else "has 0 bytes"
    # Pillow raises whatever its decoders do: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        return f"cannot be decoded: {error or type(error).__name__}"
    if shard.mask_offset[position]:
        mask = file.read_at(int(shard.mask_offset[position]), int(shard.mask_size[position]))
        reason = _look_at_mask(mask, turned, shard.keys[position], report)
        if reason:
            return reason
    report.formats[kind] += 1
    report.sizes.append(size)
    return ""


def _look_at_mask(mask: bytes, image_size: tuple[int, int], key: str, report: ShardReport) -> str:
    try:
        indices = decode_mask(mask)
    except NoMaskError as error:
        # it may be a picture of its own, which is no reason to lose the image
        report.no_masks.append(BadSample(key=key, reason=str(error)))
        return ""
    except Exception as error:
        return f"segmentation map cannot be decoded: {error or type(error).__name__}"
    if indices.shape[::-1] != image_size:
        return size_difference(indices, image_size)
    report.num_masks += 1
    return ""
