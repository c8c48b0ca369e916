"""The photometric transform space: drawing parameters, their matrix form, and the action the predictor is told.

Jitter is one affine colour map per image. Brightness b multiplies; contrast c scales about the image's grey mean g;
saturation s and hue h scale and rotate the chroma plane of YIQ:

    out = b * (c * T x + (1 - c) * g),   T = G + s * (cos(2 pi h) * (I - G) + sin(2 pi h) * R)

with G the projection on grey and R a quarter turn of chroma. T keeps the grey mean, so the four commute up to the one
clamp at the end, and four numbers describe a view whatever their order. Hue therefore differs from torchvision's HSV
hue, which changes luma. Neutral parameters give T = I exactly, and so bit-equal uint8 pixels.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64

from pipelines.config import ViewConfig
from pipelines.draws import uniforms

LUMA = (0.299, 0.587, 0.114)
# NTSC chroma axes; each row sums to zero, so grey has no chroma
_CHROMA = np.array([[0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_GRAY = np.outer(np.ones(3), LUMA)
_FROM_CHROMA = np.linalg.inv(np.vstack([LUMA, _CHROMA]))[:, 1:]
_QUARTER_TURN = _FROM_CHROMA @ np.array([[0.0, -1.0], [1.0, 0.0]]) @ _CHROMA

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
    source: Photometry
    target: Photometry


def neutral_photometry(num_images: int) -> Photometry:
    """Return the parameters that change nothing."""
    jitter = {name: np.full(num_images, value, np.float32) for name, value in _NEUTRAL.items()}
    flags = {name: np.zeros(num_images, bool) for name in ("grayscale", "blur", "solarize")}
    return Photometry(**jitter, **flags, blur_sigma=np.ones(num_images, np.float32))


def clean_draws(num_images: int) -> Draws:
    """Return the draws of evaluation: the largest centred square, nothing changed."""
    crop = np.tile(np.array([1, 1, 0.5, 0.5], np.float32), (num_images, 1))
    neutral = neutral_photometry(num_images)
    return Draws(crop=crop, flip=np.zeros(num_images, bool), source=neutral, target=neutral)


def draw(config: ViewConfig, seed: int, step: int, slots: np.ndarray) -> Draws:
    """Draw crop, flip and both views' photometry for the given slots of a step."""
    return Draws(
        crop=_draw_crop(config, uniforms(seed, "crop", step, slots, 4)),
        flip=uniforms(seed, "flip", step, slots, 1)[:, 0] < config.flip_probability,
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


def _draw_crop(config: ViewConfig, uniform: Float64[np.ndarray, "B 4"]) -> Float32[np.ndarray, "B 4"]:
    low, high = config.crop_scale
    area = low + (high - low) * uniform[:, 0]
    shortest, widest = np.log(config.crop_aspect)
    aspect = np.exp(shortest + (widest - shortest) * uniform[:, 1])
    columns = (np.sqrt(area * aspect), np.sqrt(area / aspect), uniform[:, 2], uniform[:, 3])
    return np.stack(columns, axis=1).astype(np.float32)


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


def color_matrix(photometry: Photometry) -> Float32[np.ndarray, "B 3 3"]:
    """Return b * c * T: the part of the jitter that multiplies a pixel (a column of red, green, blue)."""
    parameters = {name: getattr(photometry, name).astype(np.float64)[:, None, None] for name in JITTER}
    angle = 2 * np.pi * parameters["hue"]
    turned = np.cos(angle) * (np.eye(3) - _GRAY) + np.sin(angle) * _QUARTER_TURN
    matrix = _GRAY + parameters["saturation"] * turned
    return (parameters["brightness"] * parameters["contrast"] * matrix).astype(np.float32)


def gray_gain(photometry: Photometry) -> Float32[np.ndarray, "B"]:
    """Return b * (1 - c): what multiplies the image's grey mean."""
    return photometry.brightness * (1 - photometry.contrast)


def blur_radius(sigma: Float32[np.ndarray, "*B"] | np.float32) -> Float32[np.ndarray, "*B"] | np.float32:
    """Return how many pixels to each side a Gaussian reaches: three standard deviations."""
    return np.ceil(3 * sigma)


def _entry_scale(config: ViewConfig, name: str) -> float:
    # a strength of 0 leaves a difference of 0, whatever it is divided by
    return (getattr(config, name) or 1.0) if name in JITTER else 1.0


def action_vector(source: Photometry, target: Photometry, config: ViewConfig) -> Float32[np.ndarray, "B A"]:
    """Return what the predictor is told: target minus source of the jitter over its strength, flags of the source.

    Zero means that nothing changed. Source: paper section 3 for the entries; scaling to order one is ours.
    """
    columns = []
    for name in config.action_entries:
        if name in JITTER:
            columns.append((getattr(target, name) - getattr(source, name)) / _entry_scale(config, name))
        else:
            columns.append(getattr(source, name).astype(np.float32))
    return np.stack(columns, axis=1).astype(np.float32)


def action_difference(action: Float32[np.ndarray, "B A"], config: ViewConfig) -> dict[str, np.ndarray]:
    """Invert `action_vector`: each entry's name with its change in natural units (factors, turns, flags)."""
    return {name: action[:, column] * _entry_scale(config, name) for column, name in enumerate(config.action_entries)}


def describe_action(action: Float32[np.ndarray, "A"], config: ViewConfig) -> str:
    """Say in words what one action asks for, for pictures and logs."""
    parts = []
    for name, (value,) in action_difference(action[None], config).items():
        if name in JITTER and abs(value) > 5e-3:
            parts.append(f"{name} {value * 360:+.0f}°" if name == "hue" else f"{name} {value:+.2f}")
        elif name not in JITTER and value > 0.5:
            parts.append({"blur": "sharpen", "grayscale": "colour", "solarize": "undo solarize"}[name])
    return ", ".join(parts) or "no change"
