"""Asked-for against recovered parameters, and the ranks of correct answers, over validation images.

The parameters of a recovered change are those of the candidate that the prediction retrieves from the image's bank.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32

from iwm_fast.config.evaluation import READOUTS
from iwm_fast.evals.retrieval.bank import (
    bank_family,
    bank_views,
    diagonal_ranks,
    has_colour,
    make_query,
    query_distances,
)
from iwm_fast.evals.retrieval.mrr import chance_mrr
from iwm_fast.evals.retrieval.sweeps import BankedImage, by_readout, swept_entries
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.rendering.charts import RankHistogram, RecoveryPlot
from iwm_fast.world_model import WorldModel


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What predictions were asked for, and what they retrieved, in natural units; one change per image."""

    entries: tuple[str, ...]
    """Entries of the action that the bank and training vary."""
    asked: Float32[np.ndarray, "images entries"]
    """Parameters of the first candidate of each image's bank."""
    recovered: Float32[np.ndarray, "readouts images entries"]
    """Parameters of the candidate that was retrieved for it."""
    mean_candidate_error: Float32[np.ndarray, "images entries"]
    """Mean distance of the bank's parameters to the asked-for ones: the error of retrieving any candidate."""
    has_colour: Bool[np.ndarray, "images"]
    """Whether the photograph has colours."""
    ranks: Float32[np.ndarray, "readouts images M"]
    """Rank of each candidate of the bank, from 1, when it is asked for."""


def measure_recovery(images: Iterable[BankedImage], model: WorldModel, strengths: str) -> Recovery:
    """Ask for every candidate of each image's bank; `strengths` are those that the banks were drawn with."""
    views = model.config.views
    family = bank_family("", views)
    of_family = {entry.name for entry in getattr(views, family).entries}
    entries = tuple(name for name in swept_entries(views, strengths) if name in of_family)
    measured = []
    for image in images:
        distance = query_distances(model, make_query(image.pixels, image.bank, family, model), image.target, READOUTS)
        parameters = np.stack([image.bank.parameters[name] for name in entries], axis=-1)
        ranks = np.stack([diagonal_ranks(of_readout) for of_readout in distance])
        nearest = distance[:, 0].argmin(dim=1).cpu().numpy()
        error = np.abs(parameters - parameters[0]).mean(axis=0)
        measured.append((parameters[0], parameters[nearest], error, has_colour(image.pixels), ranks))
    asked, recovered, error, coloured, ranks = zip(*measured, strict=True)
    return Recovery(
        entries=entries, asked=np.stack(asked), recovered=np.stack(recovered, axis=1),
        mean_candidate_error=np.stack(error), has_colour=np.array(coloured), ranks=np.stack(ranks, axis=1),
    )  # fmt: skip


def recovery_plots(recovery: Recovery, views: ViewConfig, strengths: str) -> list[RecoveryPlot]:
    """Return a plot for each entry; entries that need colours leave out photographs without them."""
    plots = []
    for column, name in enumerate(recovery.entries):
        entry = bank_views(views, strengths).all_entries[name]
        shown = recovery.has_colour | (not entry.needs_color)
        if not shown.any():
            continue
        asked, recovered = recovery.asked[shown, column], recovery.recovered[:, shown, column]
        errors = by_readout([f"{error:.3f}" for error in np.abs(recovered - asked).mean(axis=1)])
        no_change, guess = np.abs(entry.neutral - asked).mean(), recovery.mean_candidate_error[shown, column].mean()
        images = f"{shown.sum()} images" + (" with colours" if entry.needs_color else "")
        plots.append(
            RecoveryPlot(
                title=name.capitalize(),
                note=f"{images}; mean error: {errors}; no change {no_change:.3f}; any version {guess:.3f}",
                limits=(entry.neutral - entry.strength, entry.neutral + entry.strength),
                no_change=entry.neutral,
                x_label="asked for",
                asked=asked,
                recovered=dict(zip(READOUTS, recovered, strict=True)),
            )
        )
    return plots


def rank_histogram(recovery: Recovery) -> RankHistogram:
    """Return the histogram of the ranks of all candidates of all banks."""
    _, num_images, size = recovery.ranks.shape
    reciprocal = [f"{value:.3f}" for value in (1 / recovery.ranks).mean(axis=(1, 2))]
    return RankHistogram(
        title="Rank of the correct version",
        note=f"{num_images} images, each of {size} versions asked for; mean reciprocal rank: "
        f"{by_readout(reciprocal)}; by chance {chance_mrr(size):.3f}",
        num_candidates=size,
        ranks={readout: ranks.ravel() for readout, ranks in zip(READOUTS, recovery.ranks, strict=True)},
    )
