"""Settings of the data line: which shards, which views, which masks.

Importing this file must stay cheap (no torch): the command line reads it to print its help.
"""

from dataclasses import dataclass
from typing import Literal

Backend = Literal["dali", "torch"]
"""Which loader renders the views: DALI's graph, or the plain twin."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm")

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
"""What every decoder here reads, by Pillow's names, whatever the extension says."""

PHOTOMETRIC_ENTRIES = ("brightness", "contrast", "saturation", "hue", "blur", "grayscale", "solarize")
CROP_ENTRIES = ("crop_x", "crop_y", "crop_width", "crop_height")
FLIP_ENTRY = "flip"
ACTION_ENTRIES = (*PHOTOMETRIC_ENTRIES, *CROP_ENTRIES, FLIP_ENTRY)


def check(is_fine: bool, name: str, value: object, accepted: str) -> None:
    """Raise the one form of `ValueError` that every setting uses.

    Raises:
        ValueError: with name, value and accepted range, if `is_fine` is false.
    """
    if not is_fine:
        raise ValueError(f"{name} must {accepted}, got {value!r}")


def check_range(name: str, value: tuple[float, float], low: float, high: float) -> None:
    """Check that a (low, high) pair is ordered and lies within bounds.

    Raises:
        ValueError: if it is not.
    """
    check(low <= value[0] <= value[1] <= high, name, value, f"satisfy {low:g} <= low <= high <= {high:g}")


def check_label_field(name: str, value: object) -> None:
    """Check that a setting names labels: `cls`, or `json.NAME` for a field of the .json members.

    Raises:
        ValueError: if it does not.
    """
    is_field = isinstance(value, str) and (value == "cls" or (value.startswith("json.") and all(value.split("."))))
    check(is_field, name, value, "be cls or json.NAME")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the samples are and in which locality they are shuffled."""

    train: str = ""
    """Training shards: a path, a brace pattern, a folder, an s3:// address; several joined by '::', or a YAML list."""
    val: str = ""
    """Validation shards, written like data.train; only evaluations read them."""
    shuffle_window: int = 16
    """Shards whose samples are mixed together. Larger mixes better, smaller reads fewer files at a time."""
    max_samples: int | None = None
    """Train on the first so many samples only, for instance to overfit one batch; unset: on all."""
    restart_epoch: bool = False
    """Go on with a run though seed, global batch, shards, views or masks differ: its current epoch begins anew."""

    def __post_init__(self) -> None:
        check(self.shuffle_window >= 1, "data.shuffle_window", self.shuffle_window, "be at least 1")
        check(self.max_samples is None or self.max_samples >= 1, "data.max_samples", self.max_samples,
              "be at least 1 or unset")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How the two views of a sample are made, and which of it the action tells the predictor."""

    size: int = 224
    """Side of both views in pixels; a multiple of model.encoder.patch_size."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Share of the image's area that the shared crop covers."""
    crop_aspect: tuple[float, float] = (0.75, 4 / 3)
    """Width over height of the shared crop, drawn uniformly in its logarithm."""
    flip_probability: float = 0.5
    """Probability of the shared horizontal flip."""
    jitter_probability: float = 0.8
    """Probability that a view is jittered at all, for each view on its own."""
    brightness: float = 0.4
    """Jitter strength s: the brightness factor is uniform in [max(0, 1 - s), 1 + s]."""
    contrast: float = 0.4
    """Jitter strength s of the contrast factor, about the image's grey mean."""
    saturation: float = 0.2
    """Jitter strength s of the saturation factor."""
    hue: float = 0.1
    """Jitter strength h: hue turns by a share of the full circle uniform in [-h, h], at most 0.5 (YIQ rotation)."""
    grayscale_probability: float = 0.2
    """Probability that the source view loses its colours."""
    blur_probability: float = 0.2
    """Probability that the source view is blurred."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation in pixels."""
    solarize_probability: float = 0.2
    """Probability that values of 128 and more of the source view are inverted."""
    source_crop: tuple[float, float] | None = None
    """If given, the source view is a further crop that covers this share of the shared crop; the action tells which."""
    source_flip_probability: float = 0.0
    """Probability that the source view is mirrored against the target view; the action tells."""
    action_entries: tuple[str, ...] | None = None
    """What the predictor is told, in this order; leaving entries out makes an ablation. Unset: brightness, contrast,
    saturation, hue, blur, grayscale, solarize; with views.source_crop also crop_x, crop_y, crop_width, crop_height;
    with views.source_flip_probability also flip."""

    def __post_init__(self) -> None:
        check(self.size >= 8, "views.size", self.size, "be at least 8 pixels")
        check_range("views.crop_scale", self.crop_scale, 1e-3, 1.0)
        check_range("views.crop_aspect", self.crop_aspect, 0.1, 10.0)
        if self.source_crop is not None:
            check_range("views.source_crop", self.source_crop, 1e-3, 1.0)
        for name in ("flip", "source_flip", "jitter", "grayscale", "blur", "solarize"):
            value = getattr(self, f"{name}_probability")
            check(0 <= value <= 1, f"views.{name}_probability", value, "be between 0 and 1")
        for name, limit in (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.5)):
            value = getattr(self, name)
            check(0 <= value <= limit, f"views.{name}", value, f"be between 0 and {limit:g}")
        # the largest kernel reaches 3 sigma to each side and is reflected at the border
        check_range("views.blur_sigma", self.blur_sigma, 0.01, (self.size - 2) / 3)
        self._check_entries()

    def _check_entries(self) -> None:
        given = self.action_entries
        if given is None:
            return
        unknown = [name for name in given if name not in ACTION_ENTRIES]
        check(not unknown, "views.action_entries", unknown, f"name entries of {ACTION_ENTRIES}")
        check(len(set(given)) == len(given) > 0, "views.action_entries", given, "name entries once")
        idle = [name for name in given if name not in self._all_entries]
        remedy = "be left out while views.source_crop is unset (crop_*) or views.source_flip_probability is 0 (flip)"
        check(not idle, "entries of views.action_entries", idle, remedy)

    @property
    def _all_entries(self) -> tuple[str, ...]:
        crop = CROP_ENTRIES if self.source_crop is not None else ()
        return (*PHOTOMETRIC_ENTRIES, *crop, *([FLIP_ENTRY] if self.source_flip_probability > 0 else []))

    @property
    def entries(self) -> tuple[str, ...]:
        """What the predictor is told, in this order."""
        return self._all_entries if self.action_entries is None else self.action_entries

    @property
    def has_source_geometry(self) -> bool:
        """Whether the source view may show another place, or its mirror image, than the target view."""
        return self.source_crop is not None or self.source_flip_probability > 0


@dataclass(frozen=True, kw_only=True)
class RandAugmentConfig:
    """How an image is changed for finetuning, where nobody has to know what was done. Source: arXiv 1909.13719."""

    num_operations: int = 2
    """Operations applied one after the other, each drawn from 14."""
    magnitude: int = 9
    """Strength of all of them, 0 to 30."""

    def __post_init__(self) -> None:
        check(1 <= self.num_operations <= 14, "num_operations", self.num_operations, "be between 1 and 14")
        check(0 <= self.magnitude <= 30, "magnitude", self.magnitude, "be between 0 and 30")


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which patches of the source view are hidden and have to be predicted."""

    num_target_blocks: int = 4
    """Rectangles whose union is predicted."""
    block_scale: tuple[float, float] = (0.15, 0.2)
    """Share of the patch grid that one rectangle covers."""
    block_aspect: tuple[float, float] = (0.75, 1.5)
    """Height over width of a rectangle."""
    context_scale: tuple[float, float] | None = None
    """If given, the context is further cut to one rectangle with this share of the grid (I-JEPA: [0.85, 1.0])."""

    def __post_init__(self) -> None:
        check(self.num_target_blocks >= 1, "mask.num_target_blocks", self.num_target_blocks, "be at least 1")
        low, high = self.block_scale
        check(0 < low <= high < 1, "mask.block_scale", self.block_scale, "satisfy 0 < low <= high < 1")
        check_range("mask.block_aspect", self.block_aspect, 0.1, 10.0)
        if self.context_scale is not None:
            check_range("mask.context_scale", self.context_scale, 0.01, 1.0)


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How batches are made; none of it changes what is in them. RuntimeConfig explains and checks these settings."""

    loader: Backend = "dali"
    reader_threads: int
    loader_threads: int
    prefetch: int
    read_ahead: int = 2
    max_bad_samples: float = 0.0
    hw_decoder_load: float | None = None
    decoder_preallocate: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """How an image folder becomes shards."""

    samples_per_shard: int = 1000
    """Images of one tar."""
    classes: str = ""
    """A classes.json written for other shards (train), whose class numbers are to be used (val); unset: by name."""

    def __post_init__(self) -> None:
        check(self.samples_per_shard >= 1, "samples_per_shard", self.samples_per_shard, "be at least 1")


PACK_DEFAULTS = PackConfig()
