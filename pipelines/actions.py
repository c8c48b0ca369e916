"""The photometric transform space: drawing parameters, their matrix form, and the action the predictor is told.

Jitter is one affine colour map per image. Brightness b multiplies; contrast c scales about the image's grey mean g;
saturation s and hue h scale and rotate the chroma plane of YIQ:

    out = b * (c * T x + (1 - c) * g),   T = G + s * (cos(2 pi h) * (I - G) + sin(2 pi h) * R)

with G the projection on grey and R a quarter turn of chroma. T keeps the grey mean, so the four commute up to the one
clamp at the end, and four numbers describe a view whatever their order. Hue therefore differs from torchvision's HSV
hue, which changes luma. Grayscale is the same map with s = 0: T = G. Neutral parameters give T = I exactly, and so
bit-equal uint8 pixels.

Geometry is shared by both views unless `views.source_crop` or `views.source_flip_probability` say otherwise; then the
action also tells where in the target view the source view lies, and whether it is mirrored.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32

from pipelines.config import CROP_ENTRIES, FLIP_ENTRY, RandAugmentConfig, ViewConfig
from pipelines.draws import uniforms

LUMA = (0.299, 0.587, 0.114)
# NTSC chroma axes; each row sums to zero, so grey has no chroma
_CHROMA = np.array([[0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_GRAY = np.outer(np.ones(3), LUMA)
_FROM_CHROMA = np.linalg.inv(np.vstack([LUMA, _CHROMA]))[:, 1:]
# from red over yellow to green, as hue is counted elsewhere
_QUARTER_TURN = _FROM_CHROMA @ np.array([[0.0, 1.0], [-1.0, 0.0]]) @ _CHROMA

JITTER = ("brightness", "contrast", "saturation", "hue")
_NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}


@dataclass(frozen=True, kw_only=True)
class Photometry:
    """Parameters of one view, for B images."""

    brightness: Float32[np.ndarray, "B"]
    """Factor."""
    contrast: Float32[np.ndarray, "B"]
    """Factor about the grey mean."""
    saturation: Float32[np.ndarray, "B"]
    """Factor."""
    hue: Float32[np.ndarray, "B"]
    """Share of a full turn."""
    grayscale: Bool[np.ndarray, "B"]
    blur: Bool[np.ndarray, "B"]
    blur_sigma: Float32[np.ndarray, "B"]
    """Standard deviation in pixels of the view; meaningless where blur is false."""
    solarize: Bool[np.ndarray, "B"]

    def __len__(self) -> int:
        return len(self.brightness)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """All that is drawn for B images before a pixel is seen."""

    crop: Float32[np.ndarray, "B 4"]
    """Width and height over the root of the image's area, then horizontal and vertical place in [0, 1)."""
    flip: Bool[np.ndarray, "B"]
    """Shared horizontal flip."""
    source_crop: Float32[np.ndarray, "B 4"]
    """The source's further crop: width and height as shares of the shared crop's, then place in it as in `crop`."""
    source_flip: Bool[np.ndarray, "B"]
    """Whether the source is mirrored against the target."""
    source: Photometry
    target: Photometry


@dataclass(frozen=True, kw_only=True)
class AugmentDraws:
    """What RandAugment does to B images, n operations each."""

    operation: Int32[np.ndarray, "B n"]
    """Which of the operations."""
    is_negated: Int32[np.ndarray, "B n"]
    """1 where it goes the other way: left instead of right, darker instead of brighter."""


NUM_OPERATIONS = 14
"""Operations of RandAugment; the graph checks that DALI knows as many."""


def draw_augment(config: RandAugmentConfig, seed: int, step: int, slots: np.ndarray) -> AugmentDraws:
    """Draw operations and their directions for the given slots of a step."""
    uniform = uniforms(seed, "rand augment", step, slots, 2 * config.num_operations)
    operation, direction = uniform[:, : config.num_operations], uniform[:, config.num_operations :]
    return AugmentDraws(
        operation=(operation * NUM_OPERATIONS).astype(np.int32), is_negated=(direction < 0.5).astype(np.int32)
    )


def neutral_photometry(num_images: int) -> Photometry:
    """Return the parameters that change nothing."""
    jitter = {name: np.full(num_images, value, np.float32) for name, value in _NEUTRAL.items()}
    flags = {name: np.zeros(num_images, bool) for name in ("grayscale", "blur", "solarize")}
    return Photometry(**jitter, **flags, blur_sigma=np.ones(num_images, np.float32))


def clean_draws(num_images: int) -> Draws:
    """Return the draws of evaluation: the largest centred square, nothing changed."""
    crop, unflipped, neutral = _whole(num_images), np.zeros(num_images, bool), neutral_photometry(num_images)
    return Draws(crop=crop, flip=unflipped, source_crop=crop, source_flip=unflipped, source=neutral, target=neutral)


def _whole(num_images: int) -> Float32[np.ndarray, "B 4"]:
    return np.tile(np.array([1, 1, 0.5, 0.5], np.float32), (num_images, 1))


def draw(config: ViewConfig, seed: int, step: int, slots: np.ndarray) -> Draws:
    """Draw crop, flip and both views' photometry for the given slots of a step."""
    return Draws(
        crop=_draw_crop(config, config.crop_scale, uniforms(seed, "crop", step, slots, 4)),
        flip=uniforms(seed, "flip", step, slots, 1)[:, 0] < config.flip_probability,
        source_crop=_draw_source_crop(config, uniforms(seed, "source crop", step, slots, 4)),
        source_flip=uniforms(seed, "source flip", step, slots, 1)[:, 0] < config.source_flip_probability,
        source=draw_photometry(config, uniforms(seed, "source", step, slots, 9), is_source=True),
        target=draw_photometry(config, uniforms(seed, "target", step, slots, 9), is_source=False),
    )


def draw_photometry(config: ViewConfig, uniform: Float64[np.ndarray, "B 9"], *, is_source: bool) -> Photometry:
    """Turn nine uniforms per image into one view's parameters; only the source is ever destroyed.

    Source: paper section 3 (target: jitter only; source: jitter, grayscale, blur, solarize).
    """
    is_jittered = uniform[:, 0] < config.jitter_probability
    jitter = {}
    for column, name in enumerate(JITTER, start=1):
        strength, middle = getattr(config, name), _NEUTRAL[name]
        drawn = middle + strength * (2 * uniform[:, column] - 1)
        jitter[name] = np.where(is_jittered, drawn, middle).astype(np.float32)
    low, high = config.blur_sigma
    return Photometry(
        **jitter,
        grayscale=(uniform[:, 5] < config.grayscale_probability) & is_source,
        blur=(uniform[:, 6] < config.blur_probability) & is_source,
        blur_sigma=(low + (high - low) * uniform[:, 7]).astype(np.float32),
        solarize=(uniform[:, 8] < config.solarize_probability) & is_source,
    )


def _draw_crop(
    config: ViewConfig, scale: tuple[float, float], uniform: Float64[np.ndarray, "B 4"]
) -> Float32[np.ndarray, "B 4"]:
    low, high = scale
    area = low + (high - low) * uniform[:, 0]
    shortest, widest = np.log(config.crop_aspect)
    aspect = np.exp(shortest + (widest - shortest) * uniform[:, 1])
    columns = (np.sqrt(area * aspect), np.sqrt(area / aspect), uniform[:, 2], uniform[:, 3])
    return np.stack(columns, axis=1).astype(np.float32)


def _draw_source_crop(config: ViewConfig, uniform: Float64[np.ndarray, "B 4"]) -> Float32[np.ndarray, "B 4"]:
    if config.source_crop is None:
        return _whole(len(uniform))
    crop = _draw_crop(config, config.source_crop, uniform)
    # what does not fit into the square is shrunk with its aspect kept, as the shared crop is
    crop[:, :2] /= np.maximum(crop[:, :2].max(axis=1, keepdims=True), 1)
    return crop


def crop_window(crop: Float32[np.ndarray, "B 4"], shape: np.ndarray) -> Float32[np.ndarray, "B 4"]:
    """Return top, left, height, width in pixels of images with the given (B, 2) heights and widths.

    A crop that does not fit is shrunk with its aspect kept, instead of being drawn again as torchvision does: so the
    window is a function of one draw. The DALI graph has the same arithmetic, in the same order, in float32.
    """
    height, width = shape[:, 0].astype(np.float32), shape[:, 1].astype(np.float32)
    root = np.sqrt(height * width)
    asked_width, asked_height = crop[:, 0] * root, crop[:, 1] * root
    fit = np.minimum(np.minimum(width / asked_width, height / asked_height), np.float32(1))
    crop_height = np.clip(np.floor(asked_height * fit + np.float32(0.5)), 1, height)
    crop_width = np.clip(np.floor(asked_width * fit + np.float32(0.5)), 1, width)
    left = np.minimum(np.floor(crop[:, 2] * (width - crop_width + np.float32(1))), width - crop_width)
    top = np.minimum(np.floor(crop[:, 3] * (height - crop_height + np.float32(1))), height - crop_height)
    return np.stack((top, left, crop_height, crop_width), axis=1).astype(np.float32)


def source_window(
    source_crop: Float32[np.ndarray, "B 4"], window: Float32[np.ndarray, "B 4"]
) -> Float32[np.ndarray, "B 4"]:
    """Return top, left, height, width of the source's further crop in the stored image, given the shared window.

    The DALI graph has the same arithmetic, in the same order, in float32.
    """
    top, left, height, width = window.T
    inner_width = np.clip(np.floor(source_crop[:, 0] * width + np.float32(0.5)), 1, width)
    inner_height = np.clip(np.floor(source_crop[:, 1] * height + np.float32(0.5)), 1, height)
    inner_left = np.minimum(np.floor(source_crop[:, 2] * (width - inner_width + np.float32(1))), width - inner_width)
    inner_top = np.minimum(np.floor(source_crop[:, 3] * (height - inner_height + np.float32(1))), height - inner_height)
    return np.stack((top + inner_top, left + inner_left, inner_height, inner_width), axis=1).astype(np.float32)


def source_geometry(
    draws: Draws, window: Float32[np.ndarray, "B 4"], source_window: Float32[np.ndarray, "B 4"]
) -> Float32[np.ndarray, "B 5"]:
    """Return where the source view lies in the target view: centre x and y, log width and log height, mirrored.

    The centre is counted from the target's, in its widths and heights, to the right and down; windows are pixels of
    the stored image. All five are 0 where both views show the same.
    """
    top, left, height, width = window.T.astype(np.float64)
    inner_top, inner_left, inner_height, inner_width = source_window.T.astype(np.float64)
    right = (inner_left + inner_width / 2 - left - width / 2) / width
    down = (inner_top + inner_height / 2 - top - height / 2) / height
    size = (np.log(inner_width / width), np.log(inner_height / height))
    # windows lie in the stored image, the target view may be its mirror image
    return np.stack((np.where(draws.flip, -right, right), down, *size, draws.source_flip), axis=1).astype(np.float32)


def color_matrix(photometry: Photometry) -> Float32[np.ndarray, "B 3 3"]:
    """Return b * c * T: the part of jitter and grayscale that multiplies a pixel (a column of red, green, blue)."""
    parameters = {name: getattr(photometry, name).astype(np.float64)[:, None, None] for name in JITTER}
    angle = 2 * np.pi * parameters["hue"]
    turned = np.cos(angle) * (np.eye(3) - _GRAY) + np.sin(angle) * _QUARTER_TURN
    saturation = np.where(photometry.grayscale[:, None, None], 0.0, parameters["saturation"])
    matrix = _GRAY + saturation * turned
    return (parameters["brightness"] * parameters["contrast"] * matrix).astype(np.float32)


def gray_gain(photometry: Photometry) -> Float32[np.ndarray, "B"]:
    """Return b * (1 - c): what multiplies the image's grey mean."""
    return photometry.brightness * (1 - photometry.contrast)


def blur_radius(sigma: Float32[np.ndarray, "*B"] | np.float32) -> Float32[np.ndarray, "*B"] | np.float32:
    """Return how many pixels to each side a Gaussian reaches: three standard deviations."""
    return np.ceil(3 * sigma)


def _entry_scale(config: ViewConfig, name: str) -> float:
    if name in JITTER:
        # a strength of 0 leaves a difference of 0, whatever it is divided by
        return getattr(config, name) or 1.0
    if name in CROP_ENTRIES and config.source_crop is not None:
        smallest = config.source_crop[0] ** 0.5
        return ((1 - smallest) / 2 if name in ("crop_x", "crop_y") else -math.log(smallest)) or 1.0
    return 1.0


def action_vector(
    source: Photometry,
    target: Photometry,
    config: ViewConfig,
    geometry: Float32[np.ndarray, "B 5"] | None = None,
) -> Float32[np.ndarray, "B A"]:
    """Return what the predictor is told: target minus source of the jitter over its strength, flags of the source.

    `geometry` comes from `source_geometry`; without it both views show the same place. Zero means that nothing changed.
    Source: paper section 3 for the photometric entries; scaling to order one and the crop's entries are ours.
    """
    place = dict(
        zip((*CROP_ENTRIES, FLIP_ENTRY), (np.zeros((len(source), 5)) if geometry is None else geometry).T, strict=True)
    )
    columns = []
    for name in config.entries:
        if name in JITTER:
            columns.append((getattr(target, name) - getattr(source, name)) / _entry_scale(config, name))
        elif name in place:
            columns.append(place[name] / _entry_scale(config, name))
        else:
            columns.append(getattr(source, name).astype(np.float32))
    return np.stack(columns, axis=1).astype(np.float32)


def action_difference(action: Float32[np.ndarray, "B A"], config: ViewConfig) -> dict[str, np.ndarray]:
    """Invert `action_vector`: each entry's name with its change in natural units (factors, turns, shares, flags)."""
    return {name: action[:, column] * _entry_scale(config, name) for column, name in enumerate(config.entries)}


def action_of(change: dict[str, float], config: ViewConfig) -> Float32[np.ndarray, "1 A"]:
    """Return the action of a change in natural units; what is not named does not change."""
    row = [change.get(name, 0.0) / _entry_scale(config, name) for name in config.entries]
    return np.array([row], np.float32)


def describe_action(action: Float32[np.ndarray, "A"], config: ViewConfig) -> str:
    """Say in words what one action asks for, for pictures and logs."""
    change = {name: float(value) for name, (value,) in action_difference(action[None], config).items()}
    parts = [_describe_jitter(name, change[name]) for name in JITTER if abs(change.get(name, 0)) > 5e-3]
    undo = {"blur": "sharpen", "grayscale": "colour", "solarize": "undo solarize", FLIP_ENTRY: "mirror"}
    parts += [words for name, words in undo.items() if change.get(name, 0) > 0.5]
    if any(abs(change.get(name, 0)) > 5e-3 for name in CROP_ENTRIES):
        x, y, width, height = (change.get(name, 0.0) for name in CROP_ENTRIES)
        parts.append(f"from a crop of {math.exp(width):.2f} x {math.exp(height):.2f} at {x:+.2f}, {y:+.2f}")
    return ", ".join(parts) or "no change"


def _describe_jitter(name: str, value: float) -> str:
    return f"{name} {value * 360:+.0f}°" if name == "hue" else f"{name} {value:+.2f}"
