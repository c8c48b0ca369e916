"""What a prediction shows: a changed image, one action entry swept over its range, or the clean image.

Each readout's prediction retrieves a candidate from a bank and, if there is a pixel decoder, is also decoded, which is
called imagined.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float32, Shaped, UInt8
from torch import Tensor

from iwm_fast.config.evaluation import READOUTS
from iwm_fast.evals.retrieval.bank import (
    CandidateBank,
    Query,
    bank_family,
    bank_views,
    diagonal_ranks,
    encode_bank,
    make_query,
    mean_squared_distances,
    read_out,
    render_bank,
    source_parameters,
)
from iwm_fast.evals.retrieval.imagined import decode_pixels
from iwm_fast.evals.retrieval.mrr import chance_mrr
from iwm_fast.models.pixel_decoder import PixelDecoder
from iwm_fast.pipelines.transforms.action import describe_action
from iwm_fast.pipelines.transforms.base import PixelOperation
from iwm_fast.pipelines.transforms.composition import ViewConfig, identity_parameters
from iwm_fast.rendering.image_grid import ImageGrid, Panel
from iwm_fast.world_model import WorldModel

# More columns do not fit on a screen.
_MAX_COLUMNS = 8
_RETRIEVED = ("retrieved", "retrieved by difference")
_IMAGINED = ("imagined", "imagined by difference")


@dataclass(frozen=True, kw_only=True)
class BankedImage:
    """A clean image, its bank of jittered versions, and their target tokens."""

    pixels: UInt8[Tensor, "H W 3"]
    bank: CandidateBank
    target: Float[Tensor, "M ND"]


@dataclass(frozen=True, kw_only=True)
class RetrievalCase:
    """A query and what its prediction retrieved; a column of a section."""

    panels: dict[str, Panel]
    """Source, correct answer, what each readout imagines if there is a decoder, and what it retrieves; by row label."""
    ranks: tuple[float, ...]
    """Rank of the correct answer among the candidates for each readout."""
    num_candidates: int


def swept_entries(views: ViewConfig, strengths: str) -> tuple[str, ...]:
    """Return the entries of the action whose parameter both training and the bank vary."""
    drawn = bank_views(views, strengths).all_entries
    return tuple(
        name
        for name, entry in views.all_entries.items()
        if name in views.entries and entry.strength and drawn[name].strength
    )


def trained_flags(views: ViewConfig) -> tuple[str, ...]:
    """Return the destructive transformations that the action encodes and training applies."""
    inverse = [item for item in views.operations if item.family == "inverse" and item.is_trained]
    return tuple(item.name for item in inverse if {entry.name for entry in item.entries} & set(views.entries))


def retrieve_version(image: BankedImage, number: int, model: WorldModel, decoder: PixelDecoder | None) -> RetrievalCase:
    """Predict a candidate of the bank from the clean image, and retrieve it from the bank."""
    query = make_query(image.pixels, image.bank, bank_family("", model.config.views), model)
    query = replace(query, action=query.action[number : number + 1])
    # The correct answer comes first.
    order = torch.arange(len(image.bank)).roll(-number)
    change = describe_action(query.action[0].numpy(), model.config.views)
    return _make_case(query, image.bank.pixels[order], image.target[order], change=change, model=model, decoder=decoder)


def retrieve_clean(flag: str, image: BankedImage, model: WorldModel, decoder: PixelDecoder | None) -> RetrievalCase:
    """Predict the clean image from the destroyed one, and retrieve it from among its jittered versions."""
    clean = render_bank(image.pixels, identity_parameters(model.config.views, 1), model)
    query = make_query(image.pixels, clean, flag, model)
    target = torch.cat([encode_bank(model, clean), image.target])
    candidates = torch.cat([clean.pixels, image.bank.pixels])
    return _make_case(query, candidates, target, change="", model=model, decoder=decoder)


def _make_case(
    query: Query,
    candidates: UInt8[Tensor, "M H W 3"],
    target: Float[Tensor, "M ND"],
    *,
    change: str,
    model: WorldModel,
    decoder: PixelDecoder | None,
) -> RetrievalCase:
    """Return a query of one action as a column; the correct answer is the first candidate."""
    predicted = list(read_out(model, query))
    distance = torch.cat([mean_squared_distances(tokens, target) for tokens in predicted])
    images = candidates.cpu().numpy()
    panels = {"source": Panel(pixels=query.source.cpu().numpy()), "asked for": Panel(pixels=images[0], caption=change)}
    panels |= {label: row[0] for label, row in imagined_rows(predicted, decoder).items()}
    ranks = [float(diagonal_ranks(row[None])[0]) for row in distance]
    for label, nearest, rank in zip(_RETRIEVED, distance.argmin(dim=1).tolist(), ranks, strict=True):
        caption = "correct" if nearest == 0 else f"correct answer at rank {rank:g}"
        panels[label] = Panel(pixels=images[nearest], caption=caption, is_correct=nearest == 0)
    return RetrievalCase(panels=panels, ranks=tuple(ranks), num_candidates=len(images))


def imagined_rows(
    predicted: Sequence[Float[Tensor, "Q ND"]], decoder: PixelDecoder | None
) -> dict[str, tuple[Panel, ...]]:
    """Return the decoded predictions of each readout by row label; none without a decoder."""
    if decoder is None:
        return {}
    rows = (tuple(Panel(pixels=pixels) for pixels in decode_pixels(decoder, tokens)) for tokens in predicted)
    return dict(zip(_IMAGINED, rows, strict=True))


def make_sections(title: str, cases: Sequence[RetrievalCase]) -> list[ImageGrid]:
    """Return the cases as columns of one or more sections; the first section has the title and the numbers of all."""
    sections = []
    for first in range(0, len(cases), _MAX_COLUMNS):
        rows = tuple(zip(*(case.panels.values() for case in cases[first : first + _MAX_COLUMNS]), strict=True))
        sections.append(ImageGrid(title=title, labels=tuple(cases[0].panels), rows=rows))
        title = ""
    retrieved = [[case.panels[label] for case in cases] for label in _RETRIEVED]
    numbers = _summarize(np.array([case.ranks for case in cases]).T, cases[0].num_candidates, retrieved)
    return [replace(sections[0], numbers=numbers), *sections[1:]]


def _summarize(
    ranks: Shaped[np.ndarray, "readouts queries"], num_candidates: int, retrieved: Sequence[Sequence[Panel]]
) -> dict[str, str]:
    num_correct = [f"{sum(panel.is_correct for panel in row)} of {len(row)}" for row in retrieved]
    reciprocal = [f"{value:.3f}" for value in (1 / ranks).mean(axis=1)]
    chance = f"by chance {chance_mrr(num_candidates):.3f} among {num_candidates} versions"
    return {"correct": by_readout(num_correct), "mean reciprocal rank": f"{by_readout(reciprocal)}; {chance}"}


def by_readout(values: Sequence[str]) -> str:
    """Return a number of each readout as text, such as "0.335 by absolute readout; 0.377 by difference readout"."""
    return "; ".join(f"{value} by {readout} readout" for value, readout in zip(values, READOUTS, strict=True))


def sweep(
    entry: str,
    image: BankedImage,
    num_values: int,
    model: WorldModel,
    *,
    strengths: str,
    decoder: PixelDecoder | None = None,
) -> ImageGrid:
    """Predict `num_values` values of a parameter of the target over its range, the other ones being neutral.

    The candidates are the renderings of these values and the bank of the image. Rows are what was asked for, and what
    each readout imagines, if there is a decoder, and retrieves.
    """
    views = model.config.views
    values = sweep_values(entry, num_values, bank_views(views, strengths))
    family = _owner(entry, views).name
    swept = render_bank(image.pixels, source_parameters(family, views, num_values) | {entry: values}, model)
    target = torch.cat([encode_bank(model, swept), image.target])
    query = make_query(image.pixels, swept, family, model)
    predicted = list(read_out(model, query))
    distance = torch.stack([mean_squared_distances(tokens, target) for tokens in predicted])
    images = torch.cat([swept.pixels, image.bank.pixels]).cpu().numpy()
    candidate_values = np.concatenate([values, image.bank.parameters[entry]])
    nearest, ranks = distance.argmin(dim=2).cpu().numpy(), np.stack([diagonal_ranks(rows) for rows in distance])
    requested = [Panel(pixels=images[index], caption=format_value(entry, float(value), views))
                 for index, value in enumerate(values)]  # fmt: skip

    def retrieved(index: int, candidate: int, rank: float) -> Panel:
        # Pixels are compared because clipping and rounding can make two values render the same image.
        is_correct = bool((images[candidate] == images[index]).all())
        value = format_value(entry, float(candidate_values[candidate]), views)
        origin = " of a bank image" if candidate >= num_values else ""
        caption = "correct" if is_correct else f"{value}{origin}; correct answer at rank {rank:g}"
        return Panel(pixels=images[candidate], caption=caption, is_correct=is_correct)

    imagined = imagined_rows(predicted, decoder)
    rows = [
        tuple(map(retrieved, range(num_values), *row)) for row in zip(nearest.tolist(), ranks.tolist(), strict=True)
    ]
    errors = [f"{error:.3f}" for error in np.abs(candidate_values[nearest] - values).mean(axis=1)]
    error_of_no_change = np.abs(views.all_entries[entry].neutral - values).mean()
    return ImageGrid(
        title=f"{entry.capitalize()} of the first image, from the minimum to the maximum",
        labels=("asked for", *imagined, *_RETRIEVED),
        rows=(tuple(requested), *imagined.values(), *rows),
        numbers=_summarize(ranks, len(images), rows)
        | {"mean error of the retrieved value": f"{by_readout(errors)}; of no change {error_of_no_change:.3f}"},
    )


def sweep_values(entry: str, num_values: int, views: ViewConfig) -> Float32[np.ndarray, "num_values"]:
    """Return equally spaced values of a parameter over the range that it is drawn from."""
    middle, strength = views.all_entries[entry].neutral, views.all_entries[entry].strength
    # Without rounding, the middle value could miss the neutral one by a bit and change the image.
    return np.round(np.linspace(middle - strength, middle + strength, num_values), 6).astype(np.float32)


def format_value(name: str, value: float, views: ViewConfig) -> str:
    """Return a parameter's value as a caption."""
    return "unchanged" if value == views.all_entries[name].neutral else _owner(name, views).caption(name, value)


def _owner(name: str, views: ViewConfig) -> PixelOperation:
    """Return the transformation that an entry belongs to."""
    return next(item for item in views.operations if name in {entry.name for entry in item.entries})
