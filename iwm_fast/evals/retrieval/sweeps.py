"""What a prediction retrieves: the change of a bank member, one entry swept over its range, destruction undone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from iwm_fast.config.evaluation import Family
from iwm_fast.evals.retrieval.bank import (
    Bank,
    ask,
    bank_views,
    distances,
    predicted_map,
    ranks,
    render_bank,
    target_map,
)
from iwm_fast.evals.retrieval.mrr import chance
from iwm_fast.pipelines.config import ViewConfig
from iwm_fast.pipelines.transforms.action import describe_action
from iwm_fast.pipelines.transforms.parameters import JITTER, identity_photometry
from iwm_fast.rendering.image_grid import Panel, Section
from iwm_fast.world_model import WorldModel

FLAGS: tuple[Family, ...] = ("grayscale", "blur", "solarize")
# so many columns fit on a screen
_MOST_COLUMNS = 8


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One untouched image, its bank, and the bank's target tokens."""

    pixels: UInt8[Tensor, "H W 3"]
    bank: Bank
    target: Float[Tensor, "M ND"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question and what its prediction retrieved: a column of a section."""

    panels: tuple[Panel, ...]
    rank: float
    """Place of the right answer among the candidates."""
    num_candidates: int


def swept_entries(views: ViewConfig, strengths: str) -> tuple[str, ...]:
    """Return the jitter entries of the action that training has varied and the bank varies."""
    drawn = bank_views(views, strengths)
    return tuple(name for name in JITTER if name in views.entries and getattr(drawn, name) and getattr(views, name))


def undone_flags(views: ViewConfig) -> tuple[Family, ...]:
    """Return the destructions that the action tells and training has shown."""
    return tuple(name for name in FLAGS if name in views.entries and getattr(views, f"{name}_probability") > 0)


def ask_for_first(scene: Scene, model: WorldModel) -> Case:
    """Ask for the first member of the bank, given the untouched image."""
    question = ask(scene.pixels, scene.bank, "jitter", model)
    words = describe_action(question.action[0].numpy(), model.config.views)
    return _case(question.source, scene.bank.pixels, distances(predicted_map(model, question), scene.target)[:1], words)


def undo(flag: Family, scene: Scene, model: WorldModel) -> Case:
    """Ask for the untouched image, given the destroyed one; it is looked up among its jittered versions."""
    clean = render_bank(scene.pixels, identity_photometry(1), model)
    question = ask(scene.pixels, clean, flag, model)
    target = torch.cat([target_map(model, clean), scene.target])
    candidates = torch.cat([clean.pixels, scene.bank.pixels])
    return _case(question.source, candidates, distances(predicted_map(model, question), target), "")


def _case(
    source: UInt8[Tensor, "H W 3"], candidates: UInt8[Tensor, "M H W 3"], distance: Float[Tensor, "1 M"], words: str
) -> Case:
    """Return source, first candidate (the right answer) and nearest candidate as a column."""
    (rank,) = ranks(distance).tolist()
    images, nearest = candidates.cpu().numpy(), int(distance.argmin())
    panels = (Panel(pixels=source.cpu().numpy()), Panel(pixels=images[0], caption=words))
    caption = "right" if nearest == 0 else f"right one at rank {rank:g}"
    retrieved = Panel(pixels=images[nearest], caption=caption, is_right=nearest == 0)
    return Case(panels=(*panels, retrieved), rank=rank, num_candidates=len(images))


def sections_of(title: str, cases: Sequence[Case]) -> list[Section]:
    """Lay cases out as columns, in several sections if they are many; the first one has the numbers."""
    sections = []
    for first in range(0, len(cases), _MOST_COLUMNS):
        rows = tuple(zip(*(case.panels for case in cases[first : first + _MOST_COLUMNS]), strict=True))
        sections.append(Section(title=title, labels=("source", "asked for", "retrieved"), rows=rows))
        title = ""
    answers = [case.panels[-1] for case in cases]
    numbers = _numbers([case.rank for case in cases], cases[0].num_candidates, answers)
    return [replace(sections[0], numbers=numbers), *sections[1:]]


def _numbers(rank: Sequence[float], num_candidates: int, answers: Sequence[Panel]) -> dict[str, str]:
    right = sum(answer.is_right for answer in answers)
    by_chance = f"{chance(num_candidates):.3f} by chance among {num_candidates} versions"
    reciprocal = (1 / np.array(rank)).mean()
    return {"right": f"{right} of {len(answers)}", "mean reciprocal rank": f"{reciprocal:.3f}, {by_chance}"}


def sweep(entry: str, scene: Scene, steps: int, model: WorldModel, strengths: str) -> Section:
    """Ask for `steps` values of one entry from its lower to its upper end, the others staying as they are."""
    values = sweep_values(entry, steps, bank_views(model.config.views, strengths))
    swept = render_bank(scene.pixels, replace(identity_photometry(steps), **{entry: values}), model)
    target = torch.cat([target_map(model, swept), scene.target])
    distance = distances(predicted_map(model, ask(scene.pixels, swept, "jitter", model)), target)
    images = torch.cat([swept.pixels, scene.bank.pixels]).cpu().numpy()
    value_of = np.concatenate([values, getattr(scene.bank.photometry, entry)])
    nearest, rank = distance.argmin(dim=1).cpu().numpy(), ranks(distance)
    asked, retrieved = [], []
    for step in range(steps):
        asked.append(Panel(pixels=images[step], caption=_words(entry, float(values[step]))))
        found = images[nearest[step]]
        is_right = bool((found == images[step]).all())
        which = _words(entry, float(value_of[nearest[step]])) + (
            " of another version" if nearest[step] >= steps else ""
        )
        caption = "right" if is_right else f"{which}; right one at rank {rank[step]:g}"
        retrieved.append(Panel(pixels=found, caption=caption, is_right=is_right))
    missed = np.abs(value_of[nearest] - values).mean()
    unmoved = np.abs(getattr(identity_photometry(1), entry) - values).mean()
    apart = {"retrieved is off by": f"{missed:.3f} on average, doing nothing by {unmoved:.3f}"}
    return Section(
        title=f"{entry.capitalize()}, the first image, from the lower to the upper end",
        labels=("asked for", "retrieved"),
        rows=(tuple(asked), tuple(retrieved)),
        numbers=_numbers(rank.tolist(), len(images), retrieved) | apart,
    )


def sweep_values(entry: str, steps: int, views: ViewConfig) -> Float32[np.ndarray, "steps"]:
    """Return a parameter's values at equal distances over the range that jitter draws from."""
    middle, strength = getattr(identity_photometry(1), entry)[0], getattr(views, entry)
    # rounded: the middle one must be neutral to the bit
    return np.round(np.linspace(middle - strength, middle + strength, steps), 6).astype(np.float32)


def _words(entry: str, value: float) -> str:
    """Say a parameter's value: a factor, or degrees."""
    if value == float(getattr(identity_photometry(1), entry)[0]):
        return "as it is"
    return f"{value * 360:+.0f}°" if entry == "hue" else f"× {value:.2f}"
