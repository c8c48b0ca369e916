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

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32

from iwm_fast.pipelines.config import RandAugmentConfig, ViewConfig
from iwm_fast.pipelines.counter_rng import uniforms

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


def identity_photometry(num_images: int) -> Photometry:
    """Return the parameters that change nothing."""
    jitter = {name: np.full(num_images, value, np.float32) for name, value in _NEUTRAL.items()}
    flags = {name: np.zeros(num_images, bool) for name in ("grayscale", "blur", "solarize")}
    return Photometry(**jitter, **flags, blur_sigma=np.ones(num_images, np.float32))


def identity_draws(num_images: int) -> Draws:
    """Return the draws of evaluation: the largest centred square, nothing changed."""
    crop, unflipped, neutral = _whole(num_images), np.zeros(num_images, bool), identity_photometry(num_images)
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
