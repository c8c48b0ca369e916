"""Settings of the data pipeline: shards, masks and loading. `transforms.composition` has those of the views.

Importing this file must stay cheap (no torch), because the command line imports it to print its help.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Backend = Literal["dali", "torch"]
"""Which loader renders the views: a DALI graph, or its equivalent in plain PyTorch."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm")

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
"""Accepted formats, by Pillow's names. The format is read from the content, not from the extension."""

MAX_PIXELS = 178_956_970
"""Default of data.max_pixels: Pillow's limit, above which 8 bits and 3 channels take more than half a GiB."""

DEFAULT_QUALITY = 92
"""Quality of JPEGs that are written in a smaller size."""


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel, of pixels in 0..1, with which images are normalised."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""Defaults of data.pixel_mean and data.pixel_std: the statistics of ImageNet, as in I-JEPA and timm."""

INTERNAL = {"internal": True}
"""Metadata of fields that are not settings of their own: neither YAML nor the command line can set them."""

# Characters of a refused value in its message.
_MAX_SHOWN = 200


def require(condition: bool, name: str, value: object, accepted: str) -> None:
    """Check a setting and report an invalid one in the form "NAME must ACCEPTED, got VALUE".

    Raises:
        ValueError: if `condition` is false.
    """
    if not condition:
        shown = repr(value)
        shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
        raise ValueError(f"{name} must {accepted}, got {shown}")


def require_range(name: str, value: tuple[float, float], low: float, high: float) -> None:
    """Check that a setting is a pair (a, b) with low <= a <= b <= high.

    Raises:
        ValueError: if it is not.
    """
    require(low <= value[0] <= value[1] <= high, name, value, f"satisfy {low:g} <= low <= high <= {high:g}")


def require_size(value: int | None) -> None:
    """Check the side of the images that a model is used with, unless it is unset.

    Raises:
        ValueError: if it is out of range.
    """
    require(value is None or 8 <= value <= 8192, "size", value, "be between 8 and 8192 pixels, or unset")


def require_seed(value: int) -> None:
    """Check a seed, which random number generators take as an unsigned number of 63 bits.

    Raises:
        ValueError: if it is negative or too large.
    """
    require(0 <= value < 2**63, "seed", value, "lie in [0, 2^63)")


def require_label_field(name: str, value: object) -> None:
    """Check that a setting names labels: `cls`, or `json.NAME` for a field of the .json members.

    Raises:
        ValueError: if it does not.
    """
    # all() refuses empty names, as in "json..a".
    is_field = isinstance(value, str) and (value == "cls" or (value.startswith("json.") and all(value.split("."))))
    require(is_field, name, value, "be cls or json.NAME")


def require_image_extension(name: str, value: str) -> None:
    """Check that a setting is empty or the extension of an image in a sample, such as `jpg` or `left.jpg`.

    Raises:
        ValueError: if it is not.
    """
    is_extension = "/" not in value and value.lower().rpartition(".")[2] in IMAGE_EXTENSIONS and value[0] != "."
    accepted = f"be unset or what follows the first dot of a name, such as left.jpg, ending in {IMAGE_EXTENSIONS}"
    require(not value or is_extension, name, value, accepted)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of the sources of samples that are mixed."""

    name: str
    """Name in log rows and messages."""
    shards: str
    """Its shards, written like those of a run without a mixture."""
    weight: float
    """Share of the samples that it gives, relative to the weights of the other sources."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which samples are read, and how far apart they are shuffled."""

    train: str = ""
    """Training shards: a path, a brace pattern, a folder, or an s3://, gs://, hf:// or https:// address; several as
    'A::B' or a YAML list. A YAML list of {name, shards, weight} mixes sources in the ratio of their weights."""
    mixture: tuple[SourceConfig, ...] = field(default=(), metadata=INTERNAL)
    """The sources that `train` names, in this order; empty if it is not a mixture."""
    val: str = ""
    """Validation shards, written like data.train; only evaluations read them."""
    image: str = ""
    """Member of each sample that is its image, as the part of the file name after the first dot, such as left.jpg.
    Unset: the member with a usual extension, such as .jpg or .png."""
    shuffle_window: int = 16
    """Number of shards whose samples are mixed. More shards mix better; fewer shards need fewer open files."""
    max_pixels: int = MAX_PIXELS
    """Largest number of pixels of an image. A larger one counts as bad, before it takes memory."""
    pixel_mean: tuple[float, float, float] = IMAGENET.mean
    """Mean of red, green and blue, of pixels in 0..1, which is subtracted from the networks' input."""
    pixel_std: tuple[float, float, float] = IMAGENET.std
    """Standard deviation of red, green and blue, of pixels in 0..1, which the networks' input is divided by."""
    max_samples: int | None = None
    """Number of samples to train on, the first ones, for instance to overfit a single batch. Unset: all samples."""
    restart_epoch: bool = False
    """Resume a run even if seed, global batch size, shards, views or masks have changed; its current epoch restarts."""

    def __post_init__(self) -> None:
        self._check_mixture()
        require_image_extension("data.image", self.image)
        require(self.shuffle_window >= 1, "data.shuffle_window", self.shuffle_window, "be at least 1")
        require(self.max_pixels >= 1, "data.max_pixels", self.max_pixels, "be at least 1")
        limit = self.max_samples
        require(limit is None or limit >= 1, "data.max_samples", limit, "be at least 1 or unset")
        require(all(0 <= value <= 1 for value in self.pixel_mean), "data.pixel_mean", self.pixel_mean,
                "lie between 0 and 1: divide a mean of 0..255 by 255")  # fmt: skip
        require(all(1e-3 <= value <= 1 for value in self.pixel_std), "data.pixel_std", self.pixel_std,
                "lie between 0.001 and 1: divide a deviation of 0..255 by 255")  # fmt: skip

    @property
    def normalization(self) -> Normalization:
        """Mean and standard deviation with which images are normalised."""
        return Normalization(self.pixel_mean, self.pixel_std)

    def _check_mixture(self) -> None:
        if not self.mixture:
            return
        names = [source.name for source in self.mixture]
        for name in names:
            is_name = bool(re.fullmatch(r"[A-Za-z0-9_-]+", name)) and names.count(name) == 1
            accepted = "be a name of letters, digits, '-' and '_' that no other source has"
            require(is_name, "name of a source in data.train", name, accepted)
        for source in self.mixture:
            accepted = "be above 0 and finite; leave out a source that is not to be drawn"
            weight = f"weight of source {source.name!r} in data.train"
            require(0 < source.weight < math.inf, weight, source.weight, accepted)
            require(
                bool(source.shards), f"shards of source {source.name!r} in data.train", source.shards, "name shards"
            )
        accepted = "be unset if data.train is a mixture: 'the first samples' would be those of its first source"
        require(self.max_samples is None, "data.max_samples", self.max_samples, accepted)
        train = "::".join(source.shards for source in self.mixture)
        require(self.train in ("", train), "data.train", self.train, "name the shards of data.mixture if that is set")
        object.__setattr__(self, "train", train)


@dataclass(frozen=True, kw_only=True)
class RandAugmentConfig:
    """RandAugment for finetuning, where no model needs the parameters. Source: arXiv 1909.13719."""

    num_operations: int = 2
    """Number of operations applied one after the other, each drawn from 14."""
    magnitude: int = 9
    """Strength of all operations, from 0 to 30."""

    def __post_init__(self) -> None:
        for name, low, high in (("num_operations", 1, 14), ("magnitude", 0, 30)):
            value = getattr(self, name)
            require(low <= value <= high, f"augment.operations.{name}", value, f"be between {low} and {high}")


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which patches of the source view are hidden and must be predicted."""

    num_target_blocks: int = 4
    """Number of rectangles of patches whose union is predicted."""
    block_scale: tuple[float, float] = (0.15, 0.2)
    """Range of the share of the patch grid that a rectangle covers."""
    block_aspect: tuple[float, float] = (0.75, 1.5)
    """Range of a rectangle's aspect ratio (height / width)."""
    context_scale: tuple[float, float] | None = None
    """If set, the context is limited to a rectangle with this share of the grid (I-JEPA uses [0.85, 1.0])."""

    def __post_init__(self) -> None:
        count = self.num_target_blocks
        require(1 <= count <= 1000, "mask.num_target_blocks", count, "be between 1 and 1000")
        # A block that covers the complete grid would leave no patch for the context.
        low, high = self.block_scale
        require(0 < low <= high < 1, "mask.block_scale", self.block_scale, "satisfy 0 < low <= high < 1")
        require_range("mask.block_aspect", self.block_aspect, 0.1, 10.0)
        if self.context_scale is not None:
            require_range("mask.context_scale", self.context_scale, 0.01, 1.0)


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How batches are loaded, without any effect on their content. RuntimeConfig explains and checks these settings."""

    loader: Backend = "dali"
    reader_threads: int
    loader_threads: int
    prefetch: int
    read_ahead: int = 2
    max_bad_samples: float = 0.0
    decode: Literal["gpu", "cpu"] = "gpu"
    hw_decoder_load: float | None = None
    decoder_preallocate: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """How an image folder is packed into shards."""

    samples_per_shard: int = 1000
    """Number of images in each tar file."""
    classes: str = ""
    """A classes.json whose class numbers are used, so that val matches train. Unset: classes are numbered by name."""
    labels: str = ""
    """CSV table with a header and one line for each image to pack: its path in the image folder in the column file, its
    class in the column class, if there are classes, and any other columns, which become fields of the .json members.
    Unset: all images are packed, and their classes are the subfolders."""
    maps: str = ""
    """Folder of segmentation maps, which become .seg.png members: the map of IMAGE_FOLDER/NAME.jpg is maps/NAME.png, of
    the same size. Unset: no maps."""
    val_share: float = 0.0
    """Share of each class's images that goes to FOLDER/val, the rest to FOLDER/train. 0: all images go to FOLDER."""
    max_pixels: int = MAX_PIXELS
    """Largest number of pixels of an image, like data.max_pixels of the runs that will read the shards."""
    leave_out_bad: bool = False
    """Whether to leave out files that cannot be packed, with a warning. false: nothing is packed if there are any."""

    shorter: int | None = None
    """Length in pixels that the shorter side of a larger image gets; the image becomes a JPEG. Unset: the bytes of all
    images stay as they are."""
    quality: int | None = None
    """Quality of these JPEGs, from 1 to 100. Unset: 92."""

    def __post_init__(self) -> None:
        if self.shorter is not None:
            _check_smaller_images(self.shorter, self.jpeg_quality)
        require(self.shorter is not None or self.quality is None, "quality", self.quality, "be unset without shorter=")
        require(not (self.maps and self.shorter), "shorter", self.shorter,
                "be unset with maps=; make images and maps smaller with `iwm shards resize` afterwards")  # fmt: skip
        require(0 <= self.val_share < 1, "val_share", self.val_share, "be at least 0 and below 1")
        require(self.max_pixels >= 1, "max_pixels", self.max_pixels, "be at least 1")
        require(self.samples_per_shard >= 1, "samples_per_shard", self.samples_per_shard, "be at least 1")

    @property
    def jpeg_quality(self) -> int:
        """Quality of the JPEGs that are written, with its default."""
        return DEFAULT_QUALITY if self.quality is None else self.quality


PACK_DEFAULTS = PackConfig()


@dataclass(frozen=True, kw_only=True)
class ResizeConfig:
    """How the images of shards are written again in a smaller size."""

    shorter: int = 384
    """Length in pixels that the shorter side of a larger image gets. Images that are no larger stay as they are."""
    quality: int = DEFAULT_QUALITY
    """Quality of the smaller JPEGs, from 1 to 100."""
    image: str = ""
    """Member of each sample that is its image, like data.image of the runs that will read the shards."""
    max_pixels: int = MAX_PIXELS
    """Largest number of pixels of an image or a segmentation map; larger ones are left out, like undecodable ones."""

    def __post_init__(self) -> None:
        _check_smaller_images(self.shorter, self.quality)
        require_image_extension("image", self.image)
        require(self.max_pixels >= 1, "max_pixels", self.max_pixels, "be at least 1")


def _check_smaller_images(shorter: int, quality: int) -> None:
    require(8 <= shorter <= 65500, "shorter", shorter, "be between 8 and 65500 pixels")
    require(1 <= quality <= 100, "quality", quality, "be between 1 and 100")
