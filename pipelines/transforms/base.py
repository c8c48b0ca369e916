"""What a transformation has to say about itself, so that no other part of the project needs to know it by name.

A transformation is a frozen dataclass with its settings, in a file of its own in `operations`. `Transformation` is what
all of them have; a `PixelOperation` also changes the pixels of a view. Most of these are a `SourceFlag`, such as
blur, or a `ViewNumber`, such as gamma, which have answers to the questions that all of their kind answer alike.
`composition` lists all transformations in the order in which they are applied.

At module level, the file of a transformation imports NumPy only, because the command line imports it to print its help.
Renderers hand `torch` or `nvidia.dali` into its methods.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64

from iwm_fast.pipelines.transforms.color_map import ColorMap

Parameters = dict[str, np.ndarray]
"""Random parameters of the pixel operations of one view by name, or entries of actions by name; B values each."""


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
    def needs_plain_loader(self) -> bool:
        """Whether the DALI graph cannot apply it."""
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

    def for_bank(self, strengths: str) -> "PixelOperation":
        """Return the settings with which evaluations draw candidates.

        A lower probability than 1 would make several candidates tie, as the unchanged image. `strengths` is "run" for
        those of the run, "default" for the default ones and "strong" for strong ones, where these differ.
        """
        return replace(self, probability=1.0)

    def query_source(self, num_images: int) -> Parameters:
        """Return the parameters of the source from which evaluations predict changed images.

        They leave the image unchanged if the transformation is a forward one, and otherwise destroy all images equally.
        """
        return self.neutral(num_images)

    def target(self, source: Parameters, change: Parameters) -> Parameters:
        """Return the target's parameters, given the source's and entries of the action in natural units."""
        return {
            entry.name: source[entry.name] + change[entry.name]
            for entry in self.entries
            if entry.name in change and not entry.is_flag
        }

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
        raise TypeError(f"{self.name} is not linear")

    def apply(self, torch: Any, pixels: Any, parameters: Parameters) -> Any:
        """Return the changed (B, H, W, 3) uint8 pixels, for images that `is_applied` selects: the reference."""
        raise TypeError(f"{self.name} has no reference of its own: its colour map is applied")

    def dali_values(self, parameters: Parameters, size: int) -> dict[str, np.ndarray]:
        """Return the values of `dali_inputs` for views of `size` x `size` pixels."""
        return {}

    def apply_dali(self, dali: Any, pixels: Any, inputs: dict[str, Any]) -> Any:
        """Return a node for the changed pixels. `dali` is the package; `inputs` has a node for each `dali_inputs`."""
        raise TypeError(f"{self.name} has no DALI graph")

    def apply_planes(self, torch: Any, planes: Any, parameters: dict[str, float], levels: Levels) -> None:
        """Change normalised (3, S, S) float32 planes of one image in place, without rounding."""
        raise TypeError(f"{self.name} is left to the reference")


class SourceFlag(PixelOperation, Protocol):
    """A pixel operation that destroys the source view with a probability; its entry of the action is a flag."""

    family: ClassVar[Literal["forward", "inverse"]] = "inverse"
    num_uniforms: ClassVar[int] = 1
    undo: ClassVar[str]
    """Words for what an action with the flag asks for."""
    one_means: ClassVar[str]
    """What the flag means, as a sentence without a full stop."""

    def draw(self, uniform: Float64[np.ndarray, "B n"], *, is_source: bool) -> Parameters:
        """Draw the flag, which is only set in the source (IWM)."""
        return {self.name: (uniform[:, 0] < self.probability) & is_source}

    def neutral(self, num_images: int) -> Parameters:
        """Return flags that are not set."""
        return {self.name: np.zeros(num_images, bool)}

    def query_source(self, num_images: int) -> Parameters:
        """Return flags that are set."""
        return {self.name: np.ones(num_images, bool)}

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The flag of the source."""
        return (Entry(name=self.name, undo=self.undo, one_means=self.one_means),)

    def spread(self, name: str) -> tuple[float, float, float]:
        """Return the probability of the flag."""
        return self.probability, 0.0, 1.0

    def is_applied(self, parameters: Parameters) -> Bool[np.ndarray, "B"]:
        """Return the flags."""
        return parameters[self.name]


class ViewNumber(PixelOperation, Protocol):
    """A pixel operation of both views with one parameter, uniform in [-strength, strength]; 0 changes nothing."""

    family: ClassVar[Literal["forward", "inverse"]] = "forward"
    num_uniforms: ClassVar[int] = 2
    strength: float

    def draw(self, uniform: Float64[np.ndarray, "B n"], *, is_source: bool) -> Parameters:
        """Draw whether the image is changed, and the parameter."""
        drawn = np.where(uniform[:, 0] < self.probability, self.strength * (2 * uniform[:, 1] - 1), 0)
        return {self.name: drawn.astype(np.float32)}

    def neutral(self, num_images: int) -> Parameters:
        """Return zeros."""
        return {self.name: np.zeros(num_images, np.float32)}

    def spread(self, name: str) -> tuple[float, float, float]:
        """Return the moments of the difference of two parameters, each of which has the variance probability / 3."""
        return 0.0, (2 * self.probability / 3) ** 0.5, 2.0

    def is_applied(self, parameters: Parameters) -> Bool[np.ndarray, "B"]:
        """Return whether the parameter is not 0."""
        return parameters[self.name] != 0
