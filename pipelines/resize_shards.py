"""Write shards again with smaller images: the same names, samples and keys in the same order.

Each shard is written under a temporary name and renamed when it is complete. A record of it, in the folder `.resized`
of the destination, holds the source's size and modification time, so that a resizing that was stopped is continued.
Sources are only read.
"""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

from iwm_fast.pipelines.annotations.segmentation import NoMaskError, decode_mask_of_size
from iwm_fast.pipelines.config import ResizeConfig
from iwm_fast.pipelines.errors import EmptyShardError, ShardError, UndecodableImageError
from iwm_fast.pipelines.image_header import probe
from iwm_fast.pipelines.storage.atomic import lock_folder, replace_file
from iwm_fast.pipelines.storage.index_cache import file_version
from iwm_fast.pipelines.storage.shard import Shard, index_shard, parse_member_name
from iwm_fast.pipelines.storage.tar_reader import HeaderWindow, ShardFile, tar_members
from iwm_fast.pipelines.transforms.smaller_images import shrink_if_larger, shrink_mask, smaller_size
from iwm_fast.pipelines.worker_processes import worker_pool

_RECORDS = ".resized"
_CLASSES = "classes.json"


@dataclass(frozen=True, kw_only=True)
class ResizedShard:
    """What has become of a shard."""

    source: str
    source_version: tuple[int, int]
    """Size in bytes and modification time in ns that the source had."""
    size_bytes: int = 0
    """Size of the new shard; 0 if none was written."""
    num_resized: int = 0
    """Number of images in a smaller size."""
    num_copied: int = 0
    """Number of images whose bytes are the same, because they are small enough."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Key and reason of each sample whose image or segmentation map cannot be decoded."""
    refusal: str = ""
    """Reason why no sample of the source can be used; empty if the shard was written."""
    holds_no_image: bool = False
    """Whether the reason is that there is no image."""
    is_earlier: bool = False
    """Whether an earlier, stopped resizing has written the shard."""


def resize_shards(
    paths: Sequence[str], destination: Path, config: ResizeConfig, num_processes: int | None = None
) -> Iterator[ResizedShard]:
    """Write each shard into a folder, with images whose shorter side has at most `config.shorter` pixels.

    Larger images become JPEGs, whatever their format was and with the same name, and their segmentation maps are
    reduced to their size without interpolation. All other members are copied. Samples that `validate_shards` would
    leave out are left out. Shards that were written already from the same sources are kept.

    Args:
        paths: paths of the shards, from `find_shards`.
        destination: a new or empty folder, or that of a stopped resizing.
        config: size and quality of the images.
        num_processes: number of shards that are resized at a time; unset: one per core.

    Yields:
        The record of each shard, in the order of `paths`.

    Raises:
        ValueError: if two shards have the same name, or shards lie in the destination.
        FileExistsError: if the destination holds other files or shards of other settings, or is in use.
        OSError: if a shard cannot be read or written.
    """
    _check_names(paths, destination)
    records = destination / _RECORDS
    _claim(destination, " ".join(f"{name}={value}" for name, value in asdict(config).items() if value != ""))
    with lock_folder(records):
        for draft in (*destination.glob(".*.draft"), *records.glob(".*.draft")):
            draft.unlink()
        _copy_class_names(paths, destination)
        resize = partial(_resize_unless_done, destination=destination, config=config)
        num_processes = min(num_processes or len(os.sched_getaffinity(0)), len(paths))
        if num_processes == 1:
            yield from map(resize, paths)
            return
        with worker_pool(num_processes) as pool:
            yield from pool.map(resize, paths)


def _check_names(paths: Sequence[str], destination: Path) -> None:
    name, count = Counter(_name(path) for path in paths).most_common(1)[0]
    if count > 1:
        first, second, *_ = (path for path in paths if _name(path) == name)
        raise ValueError(f"shards must have different names, because they keep them: {first} and {second}")
    inside = [path for path in paths if "://" not in path and Path(path).resolve().parent == destination.resolve()]
    if inside:
        raise ValueError(f"the folder to write to must be another one than that of the shards, got {destination}")


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _claim(destination: Path, settings: str) -> None:
    """Record the settings in a new folder, or check that an existing one was written with the same."""
    path = destination / _RECORDS / "settings.txt"
    if not path.exists() and destination.exists() and any(name.name != _RECORDS for name in destination.iterdir()):
        problem = f"{destination} is not empty, and was not written by `iwm shards resize`"
        raise FileExistsError(f"{problem}; nothing is overwritten: choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        replace_file(path, lambda draft: draft.write_text(settings))
    earlier = path.read_text()
    if earlier != settings:
        problem = f"{destination} was written with {earlier}, not {settings}"
        raise FileExistsError(f"{problem}; repeat these settings to continue, or choose another folder")


def _copy_class_names(paths: Sequence[str], destination: Path) -> None:
    """Copy `classes.json`, which names the class numbers, from the folders of the shards."""
    contents = {}
    for folder in dict.fromkeys((*(path.rpartition("/")[0] or "." for path in paths), str(destination))):
        try:
            with ShardFile(f"{folder}/{_CLASSES}") as file:
                contents.setdefault(file.read_at(0, file.size_bytes), folder)
        # A store may refuse access to a missing object.
        except (FileNotFoundError, PermissionError):
            continue
    if len(contents) > 1:
        first, second, *_ = contents.values()
        problem = f"{_CLASSES} of {first} and of {second} name the classes differently"
        raise ValueError(f"{problem}; resize the shards of each folder into a folder of its own")
    if contents:
        replace_file(destination / _CLASSES, lambda draft: draft.write_bytes(next(iter(contents))))


def _resize_unless_done(path: str, destination: Path, config: ResizeConfig) -> ResizedShard:
    output, record_path = destination / _name(path), destination / _RECORDS / f"{_name(path)}.json"
    # Taken before the shard is read: if it changes meanwhile, the record is outdated at once.
    version = tuple(file_version(path))
    done = _read_record(record_path)
    if done and done.source_version == version and output.is_file() and output.stat().st_size == done.size_bytes:
        return done
    try:
        shard = index_shard(path, config.image)
        writing = _ShardWriting(shard, config)
        replace_file(output, writing.write)
    except ShardError as error:
        # What an earlier version of the source gave; the shard is reported as left out.
        output.unlink(missing_ok=True)
        record_path.unlink(missing_ok=True)
        is_empty = isinstance(error, EmptyShardError)
        return ResizedShard(source=path, source_version=version, refusal=str(error), holds_no_image=is_empty)
    record = ResizedShard(
        source=path,
        source_version=version,
        size_bytes=output.stat().st_size,
        num_resized=writing.num_resized,
        num_copied=writing.num_copied,
        left_out=tuple(writing.left_out.items()),
    )
    replace_file(record_path, lambda draft: draft.write_text(json.dumps(asdict(record))))
    return record


def _read_record(path: Path) -> ResizedShard | None:
    """Return the record of a shard that was written before, None if there is none that can be read."""
    try:
        content = json.loads(path.read_text())
        version, left_out = tuple(content.pop("source_version")), tuple(map(tuple, content.pop("left_out")))
        return ResizedShard(**content | {"is_earlier": True}, source_version=version, left_out=left_out)
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None


class _ShardWriting:
    """Writes one shard again, and counts its images."""

    def __init__(self, shard: Shard, config: ResizeConfig) -> None:
        self.num_resized: int = 0
        self.num_copied: int = 0
        self.left_out: dict[str, str] = {}
        self._shard = shard
        self._config = config
        self._position_of = {key: position for position, key in enumerate(shard.keys)}

    def write(self, path: Path) -> None:
        """Write the new shard; equal sources give equal bytes.

        Raises:
            EmptyShardError: if no image can be decoded.
        """
        key, replaced = "", {}
        with ShardFile(self._shard.path) as file, tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            for member in tar_members(HeaderWindow(file)):
                # Hidden files and metadata may lie between the members of a sample.
                member_key = (parse_member_name(member.name) or (key,))[0]
                if member_key != key:
                    key, replaced = member_key, self._replacements(member_key, file.read_at)
                if not member.is_file or (key in self.left_out and parse_member_name(member.name)):
                    continue
                content = replaced.get(member.offset)
                if content is None:
                    content = file.read_at(member.offset, member.size)
                header = tarfile.TarInfo(member.name)
                header.size = len(content)
                archive.addfile(header, BytesIO(content))
        if not self.num_resized + self.num_copied:
            problem = f"none of its {len(self.left_out)} samples can be decoded"
            raise EmptyShardError(problem, shard=self._shard.path, remedy="write the shard again")

    def _replacements(self, key: str, read_at: Callable[[int, int], bytes]) -> dict[int, bytes]:
        """Return the new content of a sample's image and segmentation map, by the offset of the old one."""
        position = self._position_of.get(key)
        if position is None:
            return {}
        try:
            replaced = self._shrink(position, read_at)
        except UndecodableImageError as error:
            self.left_out[key] = str(error)
            return {}
        self.num_resized += bool(replaced)
        self.num_copied += not replaced
        return replaced

    def _shrink(self, position: int, read_at: Callable[[int, int], bytes]) -> dict[int, bytes]:
        """Decode the image and the map of a sample; return their smaller versions, none if they stay as they are."""
        shard, config = self._shard, self._config
        image_offset, mask_offset = int(shard.image_offset[position]), int(shard.mask_offset[position])
        encoded = read_at(image_offset, int(shard.image_size[position]))
        header = probe(encoded, config.max_pixels)
        mask = read_at(mask_offset, int(shard.mask_size[position])) if mask_offset else b""
        try:
            has_mask = bool(mask_offset) and decode_mask_of_size(mask, header.upright_size, config.max_pixels).size > 0
        except NoMaskError:
            has_mask = False
        smaller = shrink_if_larger(encoded, header, config.shorter, config.quality)
        size = smaller_size(header.upright_size, config.shorter)
        if smaller is None or size is None:
            return {}
        return {image_offset: smaller} | ({mask_offset: shrink_mask(mask, size)} if has_mask else {})
