"""What a transformation has to say about itself, so that no other part of the project needs to know it by name.

A transformation is a frozen dataclass with its settings, in a file of its own in `operations`. `Transformation` is what
all of them have; a `PixelOperation` also changes the pixels of a view. `composition` lists them in the order in which
they are applied.

At module level, the file of a transformation imports NumPy only, because the command line imports it to print its help.
Renderers hand `torch` or `nvidia.dali` into its methods.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Float64

Parameters = dict[str, np.ndarray]
"""Random parameters of the pixel operations of one view by name, or entries of actions by name; B values each."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in luma, from ITU-R BT.601."""


class ColorMap(NamedTuple):
    """An affine map of colours for each of B images: matrix times pixel, plus gain times the image's grey mean.

    It keeps grey grey: the rows of a matrix have equal sums.
    """

    matrix: Float64[np.ndarray, "B 3 3"] | Float32[np.ndarray, "B 3 3"]
    """Matrix by which a pixel, a column of red, green and blue, is multiplied."""
    gray_gain: Float32[np.ndarray, "B"]
    """Factor of the image's mean luma, which is added to all channels."""

    @property
    def is_applied(self) -> Bool[np.ndarray, "B"]:
        """Whether the map changes the colours of an image."""
        return (self.matrix != np.eye(3)).any(axis=(1, 2)) | (self.gray_gain != 0)


class Levels(NamedTuple):
    """Black and white in the normalised planes of the CPU renderer, and memory to work in."""

    black: Any
    """(3, 1, 1) float32: value of black by channel."""
    white: Any
    """(3, 1, 1) float32: value of white by channel."""
    scratch: Any
    """(3, S, S) float32: planes that may be overwritten."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One number of the action, which the predictor receives."""

    name: str
    """Its name; the parameter of a view that it describes, if there is one, has the same name."""
    one_means: str
    """What a value of 1 in the vector means, as a sentence without a full stop."""
    scale: float = 1.0
    """Value in natural units that is 1 in the vector, so that values are of order one."""
    undo: str = ""
    """For a flag of the source, which is 0 or 1: words for reversing it. Empty for a number."""
    neutral: float = 0.0
    """Value of the parameter that changes nothing."""
    strength: float = 0.0
    """The parameter is drawn uniformly from [neutral - strength, neutral + strength]."""
    needs_color: bool = False
    """Whether the parameter changes nothing in an image without colours."""

    @property
    def is_flag(self) -> bool:
        """Whether the entry is a flag of the source view."""
        return bool(self.undo)


@runtime_checkable
class Transformation(Protocol):
    """Settings, random draws, entries of the action and words of one transformation."""

    name: ClassVar[str]
    """Its group of settings in `views`, and its family of evaluations."""

    @property
    def is_on(self) -> bool:
        """Whether it takes part: whether actions have its entries, and logs its parameters."""
        return True

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Its entries of the action."""
        ...

    def check(self, size: int) -> None:
        """Check the settings for views of `size` x `size` pixels.

        Raises:
            ValueError: if they do not fit.
        """

    def change(self, source: Parameters, target: Parameters) -> Parameters:
        """Return its entries of the action in natural units: how the parameters of two views differ."""
        return {
            entry.name: source[entry.name] if entry.is_flag else target[entry.name] - source[entry.name]
            for entry in self.entries
        }

    def describe(self, change: dict[str, float]) -> list[str]:
        """Return what an action asks for, as phrases; `change` has its entries in natural units, or some of them."""
        return [entry.undo for entry in self.entries if entry.is_flag and change.get(entry.name, 0) > 0.5]


@runtime_checkable
class PixelOperation(Transformation, Protocol):
    """A transformation that changes the pixels of a view of the final size.

    It is linear, and then has a `color_map`, which renderers fuse with its neighbours'; or it has `apply` for tensors
    and `apply_dali` for the DALI graph, and optionally `apply_planes`, which makes the CPU renderer faster.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    probability: float
    family: ClassVar[Literal["forward", "inverse"]]
    """How evaluations test it. forward: both views have it, and a changed image is predicted from the clean one.
    inverse: only the source has it, so another version of an image is predicted from the image that it has destroyed.
    """
    num_uniforms: ClassVar[int]
    """Number of uniform random numbers that it needs for an image."""
    first_column: ClassVar[int | None] = None
    """Column of its first number in the random stream of the view. None: it has a stream of its own, so that adding or
    removing it does not change what others draw. The columns are taken by the transformations of version 0.1."""
    has_gray_gain: ClassVar[bool] = False
    """Whether its colour map adds a share of the grey mean; it is then not fused with the operation before it."""
    is_fast_on_cpu: ClassVar[bool] = False
    """Whether it has `apply_planes`."""
    undone: ClassVar[str] = ""
    """Title of figures in which an inverse transformation is undone."""
    dali_inputs: ClassVar[dict[str, tuple[str, int]]] = {}
    """Inputs of its nodes by name: DALI's type and the number of dimensions."""
    dali_device_inputs: ClassVar[tuple[str, ...]] = ()
    """Those inputs that must be on the device of the pixels, because they are operands of arithmetic."""

    @property
    def is_linear(self) -> bool:
        """Whether it is a `color_map`."""
        return False

    @property
    def is_source_only(self) -> bool:
        """Whether it is applied to the source view only."""
        return self.family == "inverse"

    @property
    def is_trained(self) -> bool:
        """Whether training applies it."""
        return self.probability > 0

    def draw(self, uniform: Float64[np.ndarray, "B n"], *, is_source: bool) -> Parameters:
        """Convert uniform random numbers to the parameters of one view."""
        ...

    def compose(self, source: Parameters, target: Parameters) -> Parameters:
        """Return those parameters of the source that depend on the target's; `source` has what `draw` returned."""
        return {}

    def neutral(self, num_images: int) -> Parameters:
        """Return parameters that leave pixels bit-equal."""
        ...

    def for_bank(self, strengths: str, default: "PixelOperation") -> "PixelOperation":
        """Return the settings with which evaluations draw candidates, always with a change.

        Args:
            strengths: "run" for those of the run, "default" for those of `default`, "strong" for strong ones.
            default: the default settings.
        """
        return self

    def destroy(self, num_images: int) -> Parameters:
        """Return the parameters of an inverse transformation with which evaluations destroy all images equally."""
        return {}

    def caption(self, name: str, value: float) -> str:
        """Return the value of a parameter as the caption of a picture."""
        return f"{value:.2f}"

    def spread(self, name: str) -> tuple[float, float, float]:
        """Return mean, standard deviation and largest absolute value of an entry of the action in training.

        The unit is that of the vector. Planning starts its search with them; a flag's mean is its probability.
        """
        ...

    def is_applied(self, parameters: Parameters) -> Bool[np.ndarray, "B"]:
        """Return whether the parameters change an image."""
        ...

    def color_map(self, parameters: Parameters) -> ColorMap:
        """Return the colour map of a linear operation, in float64."""
        raise NotImplementedError

    def apply(self, torch: Any, pixels: Any, parameters: Parameters) -> Any:
        """Return the changed (B, H, W, 3) uint8 pixels, for images that `is_applied` selects: the reference."""
        raise NotImplementedError

    def dali_values(self, parameters: Parameters) -> dict[str, np.ndarray]:
        """Return the values of `dali_inputs`."""
        return {}

    def apply_dali(self, dali: Any, pixels: Any, inputs: dict[str, Any]) -> Any:
        """Return a node for the changed pixels. `dali` is the package; `inputs` has a node for each `dali_inputs`."""
        raise NotImplementedError

    def apply_planes(self, torch: Any, planes: Any, parameters: dict[str, float], levels: Levels) -> None:
        """Change normalised (3, S, S) float32 planes of one image in place, without rounding."""
        raise NotImplementedError
