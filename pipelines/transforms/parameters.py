"""Random parameters of the transformations, and the colour map that jitter and grayscale parameters define.

Colour jitter is one affine colour map per image. Brightness b scales the pixels, contrast c scales them about the
image's grey mean g, and saturation s and hue h scale and rotate the chroma plane of the YIQ colour space:

    out = b * (c * T x + (1 - c) * g),   T = G + s * (cos(2 pi h) * (I - G) + sin(2 pi h) * R)

G is the projection on grey and R rotates the chroma by 90 degrees. T keeps the grey mean, so the four operations
commute except for the clamp at the end, and four numbers describe a view without an order. Hue therefore differs from
torchvision's HSV hue, which changes luma. Grayscale is the same map with s = 0, hence T = G. Neutral parameters give
T = I exactly, and leave uint8 pixels bit-equal.

Both views share crop and flip unless `views.source_crop` or `views.source_flip_probability` is set. The action then
also contains the position of the source view in the target view, and whether it is mirrored.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32

from iwm_fast.pipelines.config import RandAugmentConfig, ViewConfig
from iwm_fast.pipelines.counter_rng import uniforms

# Weights of red, green and blue in luma, from ITU-R BT.601.
LUMA = (0.299, 0.587, 0.114)
# The I and Q axes of NTSC's YIQ. Each row sums to zero, so grey has no chroma.
_CHROMA = np.array([[0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_GRAY = np.outer(np.ones(3), LUMA)
_FROM_CHROMA = np.linalg.inv(np.vstack([LUMA, _CHROMA]))[:, 1:]
# Positive angles turn red to yellow and green, the direction of hue in HSV.
_QUARTER_TURN = _FROM_CHROMA @ np.array([[0.0, 1.0], [-1.0, 0.0]]) @ _CHROMA

JITTER = ("brightness", "contrast", "saturation", "hue")
_NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}


@dataclass(frozen=True, kw_only=True)
class Photometry:
    """Parameters of the photometric transformations of one view, for B images."""

    brightness: Float32[np.ndarray, "B"]
    """Factor of all pixels; 1 is neutral."""
    contrast: Float32[np.ndarray, "B"]
    """Factor of the distance to the image's grey mean; 1 is neutral."""
    saturation: Float32[np.ndarray, "B"]
    """Factor of the chroma; 1 is neutral."""
    hue: Float32[np.ndarray, "B"]
    """Rotation of the chroma as a fraction of a full turn; 0 is neutral."""
    grayscale: Bool[np.ndarray, "B"]
    """Whether the colours are removed."""
    blur: Bool[np.ndarray, "B"]
    """Whether a Gaussian blur is applied."""
    blur_sigma: Float32[np.ndarray, "B"]
    """Standard deviation of the blur in pixels of the view; has no effect where `blur` is false."""
    solarize: Bool[np.ndarray, "B"]
    """Whether values of 128 and above are inverted."""

    def __len__(self) -> int:
        return len(self.brightness)


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
    source: Photometry
    """Parameters of the source view."""
    target: Photometry
    """Parameters of the target view."""


@dataclass(frozen=True, kw_only=True)
class AugmentDraws:
    """Random parameters of RandAugment for B images, with n operations for each of them."""

    operation: Int32[np.ndarray, "B n"]
    """Number of the operation in DALI's suite, 0 to 13."""
    is_negated: Int32[np.ndarray, "B n"]
    """1 to reverse the operation, for example left instead of right or darker instead of brighter, else 0."""


NUM_OPERATIONS = 14
"""Number of RandAugment operations; building the graph fails if DALI's suite has another number."""


def draw_augment(config: RandAugmentConfig, seed: int, step: int, slots: np.ndarray) -> AugmentDraws:
    """Draw operations and their directions for these slots of a step."""
    uniform = uniforms(seed, "rand augment", step, slots, 2 * config.num_operations)
    operation, direction = uniform[:, : config.num_operations], uniform[:, config.num_operations :]
    return AugmentDraws(
        operation=(operation * NUM_OPERATIONS).astype(np.int32), is_negated=(direction < 0.5).astype(np.int32)
    )


def identity_photometry(num_images: int) -> Photometry:
    """Return neutral parameters, which leave the pixels bit-equal."""
    jitter = {name: np.full(num_images, value, np.float32) for name, value in _NEUTRAL.items()}
    flags = {name: np.zeros(num_images, bool) for name in ("grayscale", "blur", "solarize")}
    return Photometry(**jitter, **flags, blur_sigma=np.ones(num_images, np.float32))


def identity_draws(num_images: int) -> Draws:
    """Return the parameters used in evaluation: the largest centred square with neutral parameters."""
    crop, unflipped, neutral = _full_crop(num_images), np.zeros(num_images, bool), identity_photometry(num_images)
    return Draws(crop=crop, flip=unflipped, source_crop=crop, source_flip=unflipped, source=neutral, target=neutral)


def _full_crop(num_images: int) -> Float32[np.ndarray, "B 4"]:
    # A square with the image's area does not fit into an oblong image; `geometry.crop_window` shrinks it to fit.
    return np.tile(np.array([1, 1, 0.5, 0.5], np.float32), (num_images, 1))


def draw(config: ViewConfig, seed: int, step: int, slots: np.ndarray) -> Draws:
    """Draw crop, flip and the photometric parameters of both views for these slots of a step."""
    return Draws(
        crop=_draw_crop(config, config.crop_scale, uniforms(seed, "crop", step, slots, 4)),
        flip=uniforms(seed, "flip", step, slots, 1)[:, 0] < config.flip_probability,
        source_crop=_draw_source_crop(config, uniforms(seed, "source crop", step, slots, 4)),
        source_flip=uniforms(seed, "source flip", step, slots, 1)[:, 0] < config.source_flip_probability,
        source=draw_photometry(config, uniforms(seed, "source", step, slots, 9), is_source=True),
        target=draw_photometry(config, uniforms(seed, "target", step, slots, 9), is_source=False),
    )


def draw_photometry(config: ViewConfig, uniform: Float64[np.ndarray, "B 9"], *, is_source: bool) -> Photometry:
    """Convert nine uniform numbers per image to the parameters of one view.

    Both views are jittered; grayscale, blur and solarize are applied only to the source view (paper section 3).
    """
    is_jittered = uniform[:, 0] < config.jitter_probability
    jitter = {}
    for column, name in enumerate(JITTER, start=1):
        strength, neutral = getattr(config, name), _NEUTRAL[name]
        drawn = neutral + strength * (2 * uniform[:, column] - 1)
        jitter[name] = np.where(is_jittered, drawn, neutral).astype(np.float32)
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
    # Uniform in the logarithm, as in torchvision's RandomResizedCrop, so that wide and tall crops are equally likely.
    min_log_aspect, max_log_aspect = np.log(config.crop_aspect)
    aspect = np.exp(min_log_aspect + (max_log_aspect - min_log_aspect) * uniform[:, 1])
    columns = (np.sqrt(area * aspect), np.sqrt(area / aspect), uniform[:, 2], uniform[:, 3])
    return np.stack(columns, axis=1).astype(np.float32)


def _draw_source_crop(config: ViewConfig, uniform: Float64[np.ndarray, "B 4"]) -> Float32[np.ndarray, "B 4"]:
    if config.source_crop is None:
        return _full_crop(len(uniform))
    crop = _draw_crop(config, config.source_crop, uniform)
    # A crop that does not fit into the shared crop is shrunk and keeps its aspect, like the shared crop in the image.
    crop[:, :2] /= np.maximum(crop[:, :2].max(axis=1, keepdims=True), 1)
    return crop


def color_matrix(photometry: Photometry) -> Float32[np.ndarray, "B 3 3"]:
    """Return b * c * T, the matrix by which jitter and grayscale multiply a pixel (a column of red, green, blue)."""
    parameters = {name: getattr(photometry, name).astype(np.float64)[:, None, None] for name in JITTER}
    angle = 2 * np.pi * parameters["hue"]
    turned = np.cos(angle) * (np.eye(3) - _GRAY) + np.sin(angle) * _QUARTER_TURN
    saturation = np.where(photometry.grayscale[:, None, None], 0.0, parameters["saturation"])
    matrix = _GRAY + saturation * turned
    return (parameters["brightness"] * parameters["contrast"] * matrix).astype(np.float32)


def gray_gain(photometry: Photometry) -> Float32[np.ndarray, "B"]:
    """Return b * (1 - c), the factor of the image's grey mean that jitter adds to every pixel."""
    return photometry.brightness * (1 - photometry.contrast)


def blur_radius(sigma: Float32[np.ndarray, "*B"] | np.float32) -> Float32[np.ndarray, "*B"] | np.float32:
    """Return the radius of a Gaussian kernel in pixels: three standard deviations, rounded up."""
    return np.ceil(3 * sigma)
