"""What a world model imagines of one image and one change: the pictures and numbers of the page."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from iwm_fast.config.evaluation import PlayConfig
from iwm_fast.evals.retrieval.bank import (
    bank_views,
    diagonal_ranks,
    draw_bank,
    encode_bank,
    mean_squared_distances,
)
from iwm_fast.evals.retrieval.imagined import decode_pixels
from iwm_fast.evals.retrieval.sweeps import BankedImage, format_value, sweep_values, swept_entries, trained_flags
from iwm_fast.models.pixel_decoder import PixelDecoder
from iwm_fast.pipelines.transforms.action import action_vector
from iwm_fast.pipelines.transforms.composition import identity_parameters
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.pipelines.transforms.torch_renderer import render
from iwm_fast.world_model import WorldModel

# Steps of a slider on either side of its middle.
_NUM_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class Control:
    """A slider for the value that the changed image gets, or a switch for an effect that the source image has."""

    name: str
    """Entry of the action."""
    words: str
    """The name of a slider, or what a switch does."""
    low: float = 0.0
    neutral: float = 0.0
    high: float = 1.0
    is_switch: bool = False

    @property
    def step(self) -> float:
        """Smallest difference of two values of the slider; the neutral value is one of them."""
        return (self.high - self.low) / (2 * _NUM_STEPS)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model says of a change."""

    pictures: dict[str, UInt8[np.ndarray, "H W 3"]]
    """source, asked for, retrieved and, if there is a decoder, absolute and difference: the imagined images."""
    captions: dict[str, str]
    """Captions of pictures, and values of sliders with their units."""
    distances: dict[str, float]
    """Mean squared difference to the tokens of the image asked for: of both readouts and of the unchanged source."""


class Player:
    """Answers for any image and change."""

    def __init__(self, model: WorldModel, decoder: PixelDecoder | None, config: PlayConfig) -> None:
        self.model = model
        self.decoder = decoder
        self._config = config

    @property
    def controls(self) -> tuple[Control, ...]:
        """Return sliders and switches for all entries of the action that training varied, crops and flips excepted."""
        views = self.model.config.views
        drawn = bank_views(views, self._config.bank)
        sliders = []
        for name in swept_entries(views, self._config.bank):
            low, neutral, high = (float(value) for value in sweep_values(name, 3, drawn))
            sliders.append(Control(name=name, words=name, low=low, neutral=neutral, high=high))
        switches = [
            Control(name=entry.name, words=entry.undo, is_switch=True)
            for flag in trained_flags(views)
            for entry in getattr(views, flag).entries
        ]
        return (*sliders, *switches)

    def open(self, pixels: UInt8[Tensor, "H W 3"], number: int) -> BankedImage:
        """Prepare an image of the run's size; `number` seeds its bank."""
        config = self._config
        bank = draw_bank(pixels, number, config.bank_size, model=self.model, strengths=config.bank, seed=config.seed)
        return BankedImage(pixels=pixels, bank=bank, target=encode_bank(self.model, bank))

    @torch.no_grad()
    def answer(self, image: BankedImage, values: Mapping[str, float], switched_on: Collection[str]) -> Answer:
        """Return what the model imagines for these values of sliders and these switches that are on.

        Raises:
            ValueError: if a name is not one of the controls, or a value is out of its range.
        """
        self._check(values, switched_on)
        model, views = self.model, self.model.config.views
        neutral = identity_parameters(views, 1)
        source = neutral | {name: np.ones(1, bool) for name in switched_on}
        target = neutral | {name: np.array([value], np.float32) for name, value in values.items()}
        action = torch.from_numpy(action_vector(source, target, views)).to(model.device)
        source_pixels, asked_pixels = (
            render(image.pixels.to(model.device)[None], parameters, views) for parameters in (source, target)
        )
        source_view, asked_view = (
            normalize_view(pixels, model.config.data.normalization) for pixels in (source_pixels, asked_pixels)
        )
        tokens, asked_tokens = model.encode(source_view), model.encode_targets(asked_view)
        absolute = model.predict_from(tokens, action)
        imagined = {"absolute": absolute, "difference": absolute + model.readout_offset(tokens, "difference")}
        candidates = torch.cat([asked_tokens.flatten(1), image.target])
        distance = {
            name: mean_squared_distances(of.flatten(1), candidates)
            for name, of in {**imagined, "source": model.encode_targets(source_view)}.items()
        }
        nearest = int(distance["absolute"].argmin())
        (rank,) = diagonal_ranks(distance["absolute"]).tolist()
        found = asked_pixels[0] if nearest == 0 else image.bank.pixels[nearest - 1]
        shown = {"source": source_pixels[0], "asked for": asked_pixels[0], "retrieved": found}
        pictures = {name: pixels.cpu().numpy() for name, pixels in shown.items()}
        if self.decoder is not None:
            decoded = decode_pixels(self.decoder, torch.cat([*imagined.values()]).flatten(1))
            pictures |= dict(zip(imagined, decoded, strict=True))
        captions = {name: format_value(name, value, views) for name, value in values.items()}
        is_correct = nearest == 0
        captions["retrieved"] = "the image asked for" if is_correct else f"the image asked for is at rank {rank:g}"
        return Answer(
            pictures=pictures,
            captions=captions,
            distances={name: float(row[0, 0]) for name, row in distance.items()},
        )

    def _check(self, values: Mapping[str, float], switched_on: Collection[str]) -> None:
        controls = {control.name: control for control in self.controls}
        for name, value in values.items():
            control = controls.get(name)
            if control is None or control.is_switch:
                raise ValueError(f"sliders are {', '.join(name for name in controls)}, got {name!r}")
            # The ends of the range may be rounded by the page.
            if not control.low - control.step <= value <= control.high + control.step:
                raise ValueError(f"{name} must lie between {control.low:g} and {control.high:g}, got {value:g}")
        unknown = [name for name in switched_on if name not in controls or not controls[name].is_switch]
        if unknown:
            raise ValueError(f"switches must be among those of the page, got {unknown[0]!r}")
