"""All transformations in the order in which they are applied: their settings, and the random parameters of both views.

A transformation is added by its file in `operations` and one line in `ViewConfig`.

Both views share crop and flip unless `views.crop.source_scale` or `views.flip.source_probability` is set. The action
then also contains the position of the source view in the target view, and whether it is mirrored.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.counter_rng import uniforms
from iwm_fast.pipelines.transforms.base import Entry, Parameters, PixelOperation, Transformation
from iwm_fast.pipelines.transforms.color_map import ColorMap
from iwm_fast.pipelines.transforms.operations.blur import Blur
from iwm_fast.pipelines.transforms.operations.crop import Crop, full_crop
from iwm_fast.pipelines.transforms.operations.flip import Flip
from iwm_fast.pipelines.transforms.operations.gamma import Gamma
from iwm_fast.pipelines.transforms.operations.grayscale import Grayscale
from iwm_fast.pipelines.transforms.operations.jitter import Jitter
from iwm_fast.pipelines.transforms.operations.posterize import Posterize
from iwm_fast.pipelines.transforms.operations.rotation import Rotation
from iwm_fast.pipelines.transforms.operations.solarize import Solarize

# Actions begin with the entries of version 0.1 in its order, so that its networks can be used. Those of further
# transformations follow in the order of `ViewConfig`.
_FIRST_ENTRIES = (
    "brightness", "contrast", "saturation", "hue", "blur", "grayscale", "solarize",
    "crop_x", "crop_y", "crop_width", "crop_height", "flip",
)  # fmt: skip


# Number of columns in the random stream of a view that transformations of version 0.1 share.
_NUM_COLUMNS = 9


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How the two views of a sample are rendered, and which of their parameters form the action."""

    size: int = 224
    """Side of both views in pixels; a multiple of model.encoder.patch_size."""
    crop: Crop = field(default_factory=Crop)
    flip: Flip = field(default_factory=Flip)
    jitter: Jitter = field(default_factory=Jitter)
    grayscale: Grayscale = field(default_factory=Grayscale)
    gamma: Gamma = field(default_factory=Gamma)
    blur: Blur = field(default_factory=Blur)
    solarize: Solarize = field(default_factory=Solarize)
    posterize: Posterize = field(default_factory=Posterize)
    rotation: Rotation = field(default_factory=Rotation)
    action_entries: tuple[str, ...] | None = None
    """Entries of the action that the predictor receives, in this order; omit some for an ablation. Unset: all entries
    of the transformations that are on."""

    # What follows from the settings is computed once, because loaders ask for it for every batch.

    def __post_init__(self) -> None:
        require(8 <= self.size <= 8192, "views.size", self.size, "be between 8 and 8192 pixels")
        for transformation in self.transformations:
            transformation.check(self.size)
        self._check_entries()

    def _check_entries(self) -> None:
        entries = self.action_entries
        if entries is None:
            return
        # An entry that never varies would be an input without any effect.
        unknown = [name for name in entries if name not in self.all_entries]
        accepted = f"name entries of the transformations that are on, which are {', '.join(self.all_entries)}"
        remedy = "crop_* need views.crop.source_scale, flip needs views.flip.source_probability"
        require(not unknown, "views.action_entries", unknown, f"{accepted} ({remedy})")
        is_distinct = len(set(entries)) == len(entries) > 0
        require(is_distinct, "views.action_entries", entries, "be non-empty and name no entry twice")

    @cached_property
    def transformations(self) -> tuple[Transformation, ...]:
        """The transformations that are on, in the order in which they are applied."""
        groups = (getattr(self, item.name) for item in dataclasses.fields(self) if dataclasses.is_dataclass(item.type))
        return tuple(group for group in groups if group.is_on)

    @cached_property
    def operations(self) -> tuple[PixelOperation, ...]:
        """Those of the transformations that change the pixels of a view."""
        return tuple(group for group in self.transformations if isinstance(group, PixelOperation))

    @cached_property
    def steps(self) -> tuple[tuple[PixelOperation, ...], ...]:
        """The pixel operations in order, with neighbouring linear ones together: renderers apply them in one pass.

        An operation whose colour map depends on the grey mean begins a new step, because the mean is that of the pixels
        before the step.
        """
        steps: list[tuple[PixelOperation, ...]] = []
        for operation in self.operations:
            if steps and steps[-1][0].is_linear and operation.is_linear and not operation.has_gray_gain:
                steps[-1] += (operation,)
            else:
                steps.append((operation,))
        return tuple(steps)

    @cached_property
    def all_entries(self) -> dict[str, Entry]:
        """All entries that the action may have, by name, in the order that it has by default."""
        entries = {entry.name: entry for transformation in self.transformations for entry in transformation.entries}
        order = [*(name for name in _FIRST_ENTRIES if name in entries), *entries]
        return {name: entries[name] for name in order}

    @property
    def entries(self) -> tuple[str, ...]:
        """Entries of the action that the predictor receives, in order."""
        return tuple(self.all_entries) if self.action_entries is None else self.action_entries

    @property
    def has_source_geometry(self) -> bool:
        """Whether the source view may be cropped or mirrored relative to the target view."""
        return self.crop.source_scale is not None or self.flip.source_probability > 0


FAMILIES = tuple(item.name for item in dataclasses.fields(ViewConfig) if hasattr(item.type, "family"))
"""Names of all pixel operations, on or off, which are also families of evaluations."""


@dataclass(frozen=True, kw_only=True)
class Draws:
    """All random parameters of B images; they are drawn before the images are read and do not depend on them."""

    crop: Float32[np.ndarray, "B 4"]
    """Crop of both views: width and height over the square root of the image's area, then the horizontal and vertical
    position in [0, 1), from the leftmost and topmost crop that fits to the rightmost and bottommost."""
    flip: Bool[np.ndarray, "B"]
    """Whether both views are flipped horizontally."""
    source_crop: Float32[np.ndarray, "B 4"]
    """Further crop of the source view: width and height as fractions of the shared crop's, then the position in it."""
    source_flip: Bool[np.ndarray, "B"]
    """Whether the source view is flipped relative to the target view."""
    source: Parameters
    """Parameters of the source view's pixel operations."""
    target: Parameters
    """Parameters of the target view's pixel operations."""


def draw(views: ViewConfig, seed: int, step: int, slots: np.ndarray) -> Draws:
    """Draw all parameters of both views for these slots of a step."""
    source = draw_view(views, seed, "source", step, slots, is_source=True)
    target = draw_view(views, seed, "target", step, slots, is_source=False)
    for operation in views.operations:
        source |= operation.compose(source, target)
    return Draws(
        crop=views.crop.draw(uniforms(seed, "crop", step, slots, 4)),
        flip=uniforms(seed, "flip", step, slots, 1)[:, 0] < views.flip.probability,
        source_crop=views.crop.draw_source(uniforms(seed, "source crop", step, slots, 4)),
        source_flip=uniforms(seed, "source flip", step, slots, 1)[:, 0] < views.flip.source_probability,
        source=source,
        target=target,
    )


def draw_view(
    views: ViewConfig, seed: int, purpose: str, step: int, slots: np.ndarray, *, is_source: bool
) -> Parameters:
    """Draw the parameters of the pixel operations of one view; `purpose` names the random stream of the view."""
    parameters: Parameters = {}
    columns = uniforms(seed, purpose, step, slots, _NUM_COLUMNS)
    for operation in views.operations:
        first, count = operation.first_column, operation.num_uniforms
        if first is None:
            uniform = uniforms(seed, f"{purpose} {operation.name}", step, slots, count)
        else:
            uniform = columns[:, first : first + count]
        parameters |= operation.draw(uniform, is_source=is_source)
    return parameters


def identity_parameters(views: ViewConfig, num_images: int) -> Parameters:
    """Return neutral parameters of one view, which leave the pixels bit-equal."""
    parameters: Parameters = {}
    for operation in views.operations:
        parameters |= operation.neutral(num_images)
    return parameters


def identity_draws(views: ViewConfig, num_images: int) -> Draws:
    """Return the parameters used in evaluation: the largest centred square with neutral parameters."""
    crop, unflipped = full_crop(num_images), np.zeros(num_images, bool)
    neutral = identity_parameters(views, num_images)
    return Draws(crop=crop, flip=unflipped, source_crop=crop, source_flip=unflipped, source=neutral, target=neutral)


def fused_color_map(step: tuple[PixelOperation, ...], parameters: Parameters) -> ColorMap:
    """Return the colour maps of a step's linear operations as one map, in float32."""
    matrix, gain = step[0].color_map(parameters)
    for operation in step[1:]:
        if operation.is_applied(parameters).any():
            outer = operation.color_map(parameters).matrix
            matrix = outer @ matrix
            # The map keeps grey grey, and each row says by which factor.
            gain = gain * outer[:, 0].sum(axis=1)
    return ColorMap(matrix.astype(np.float32), gain.astype(np.float32))


_LAYOUT_OF_0_1 = {
    "crop_scale": "crop.scale",
    "crop_aspect": "crop.aspect",
    "flip_probability": "flip.probability",
    "jitter_probability": "jitter.probability",
    "brightness": "jitter.brightness",
    "contrast": "jitter.contrast",
    "saturation": "jitter.saturation",
    "hue": "jitter.hue",
    "grayscale_probability": "grayscale.probability",
    "blur_probability": "blur.probability",
    "blur_sigma": "blur.sigma",
    "solarize_probability": "solarize.probability",
    "source_crop": "crop.source_scale",
    "source_flip_probability": "flip.source_probability",
}
# Settings that version 0.1 did not have, with the values that correspond to what it did.
_NEW_SINCE_0_1 = {"jitter": {"encoding": "difference", "source": "independent", "model": "linear"}}
RENAMED = {f"views.{old}": f"views.{new}" for old, new in _LAYOUT_OF_0_1.items()}
"""Settings of version 0.1 with their present names."""


def upgraded_views(views: Any) -> Any:
    """Return saved settings of views with the present names, if version 0.1 has written them; others unchanged.

    A file that it has written lists all settings.
    """
    if not isinstance(views, dict) or not views.keys() >= _LAYOUT_OF_0_1.keys():
        return views
    upgraded: dict[str, Any] = {group: dict(values) for group, values in _NEW_SINCE_0_1.items()}
    for name, value in views.items():
        group, _, leaf = _LAYOUT_OF_0_1.get(name, name).rpartition(".")
        (upgraded.setdefault(group, {}) if group else upgraded)[leaf] = value
    return upgraded


def implied_settings(views: ViewConfig) -> set[str]:
    """Return the dotted names of settings whose values correspond to what was done before they existed.

    These are the settings of a transformation that is off, as long as none of them has been set, and those that
    transformations have gained since version 0.1. A fingerprint has None for them, which equals a missing entry, so
    that runs that began without them can be resumed.
    """
    groups = {item.name: getattr(views, item.name) for item in dataclasses.fields(views)}
    off = {name: group for name, group in groups.items() if dataclasses.is_dataclass(group) and not group.is_on}
    unset = {name: vars(group) for name, group in off.items() if group == type(group)()}
    gained = {
        name: [key for key, value in values.items() if getattr(groups[name], key) == value]
        for name, values in _NEW_SINCE_0_1.items()
    }
    return {f"views.{name}.{key}" for part in (unset, gained) for name, keys in part.items() for key in keys}


def views_from_json(content: dict[str, Any], views_class: type[ViewConfig] = ViewConfig) -> ViewConfig:
    """Return settings that were saved as JSON, where tuples have become lists, by this or an earlier version.

    Raises:
        ValueError: if there is a setting that this version does not know.
    """
    kinds: dict[str, Any] = {item.name: item.type for item in dataclasses.fields(views_class)}
    values = {}
    for name, value in upgraded_views(content).items():
        is_group = isinstance(value, dict)
        known = {item.name for item in dataclasses.fields(kinds[name])} if is_group and name in kinds else set()
        is_known = name in kinds and (not is_group or value.keys() <= known)
        require(is_known, f"views.{name}", value, "be known to this version; use the version that wrote it")
        values[name] = kinds[name](**with_tuples(value)) if is_group else value
    return views_class(**with_tuples(values))


def with_tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """Restore the tuples of settings, which JSON stores as lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
