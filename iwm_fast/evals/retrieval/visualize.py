"""Pictures of what predictions retrieve from banks of jittered images, and plots over many images.

No image is selected by its result: the images are evenly spaced over the validation set, each is queried for the first
candidate of its bank, and the sweeps use the first image. Crop and flip entries of the action are not swept.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from iwm_fast.config.evaluation import ImagineConfig
from iwm_fast.evals.datasets import clean_images, evenly_spaced, require_readable, validation_shards
from iwm_fast.evals.results import name_with_choices
from iwm_fast.evals.retrieval.bank import draw_bank, encode_bank, open_world_model
from iwm_fast.evals.retrieval.recovery import measure_recovery, rank_histogram, recovery_plots
from iwm_fast.evals.retrieval.sweeps import (
    BankedImage,
    RetrievalCase,
    make_sections,
    retrieve_clean,
    retrieve_first,
    sweep,
    swept_entries,
    trained_flags,
)
from iwm_fast.monitoring.evaluation_progress import track_progress
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.rendering.charts import save_plots
from iwm_fast.rendering.image_grid import ImageGrid, require_writable, save_image_grids
from iwm_fast.rendering.imagine_page import write_imagine_page
from iwm_fast.runtime.distributed import single_process
from iwm_fast.world_model import WorldModel


def imagine(config: ImagineConfig) -> tuple[Path, ...]:
    """Write a sheet, the sweeps of the run's action entries, if any, plots, and a page with all; return their files.

    Raises:
        FileNotFoundError, CheckpointError, ShardError: if the run or its shards cannot be used.
        ValueError: if the run's predictor is the identity, or the pictures cannot be written.
    """
    path = Path(config.picture or Path(config.run) / "imagine.png")
    require_writable(path)
    model = open_world_model(config.run, single_process(config.device).device, config.checkpoint)
    if not config.picture:
        path = path.with_stem(name_with_choices(path.stem, config, model.step))
    shards = validation_shards(model, config.data)
    selections = [evenly_spaced(shards.num_samples, count) for count in (config.num_images, config.num_plotted)]
    require_readable(*((shards, samples) for samples in selections))
    shown, plotted = (_banked_images(model, shards, samples, config) for samples in selections)
    sheet, sweeps = _draw_sections(model, shown, config)
    title = (
        f"Step {model.step}, seed {config.seed}; {config.bank_size} jittered versions of each image "
        f"({config.bank} strengths) to choose from"
    )
    save_image_grids(path, sheet, title)
    written = [path]
    if sweeps:
        written.append(path.with_name(f"{path.stem}_sweeps.png"))
        save_image_grids(written[-1], sweeps, title, panel_inches=1.35)
    recovery = measure_recovery(plotted, model, config.bank)
    plots = [rank_histogram(recovery), *recovery_plots(recovery, model.config.views, config.bank)]
    written.append(path.with_name(f"{path.stem}_plots.png"))
    save_plots(written[-1], plots, title)
    written.append(path.with_suffix(".html"))
    write_imagine_page(written[-1], [*sheet, *sweeps], plots, title, run=Path(config.run).resolve().name)
    return tuple(written)


def _draw_sections(
    model: WorldModel, images: Iterable[BankedImage], config: ImagineConfig
) -> tuple[list[ImageGrid], list[ImageGrid]]:
    """Return the sections of the sheet and those of the sweeps."""
    views = model.config.views
    first_cases: list[RetrievalCase] = []
    sweeps: list[ImageGrid] = []
    clean_cases: defaultdict[str, list[RetrievalCase]] = defaultdict(list)
    # One image at a time, because the target tokens of a bank are large.
    for image in images:
        if not first_cases:
            entries = swept_entries(views, config.bank)
            sweeps = [sweep(entry, image, config.steps, model, config.bank) for entry in entries]
        first_cases.append(retrieve_first(image, model))
        for flag in trained_flags(views):
            clean_cases[flag].append(retrieve_clean(flag, image, model))
    for flag, cases in clean_cases.items():
        sweeps += make_sections(f"{getattr(views, flag).undone}, the images of the sheet", cases)
    return make_sections("The first version of each image's bank", first_cases), sweeps


def _banked_images(
    model: WorldModel, shards: ShardSet, samples: Int64[np.ndarray, "images"], config: ImagineConfig
) -> Iterator[BankedImage]:
    for pixels, sample in track_progress(clean_images(model, shards, samples), len(samples), "images queried"):
        bank = draw_bank(pixels, sample, config.bank_size, model=model, strengths=config.bank, seed=config.seed)
        yield BankedImage(pixels=pixels, bank=bank, target=encode_bank(model, bank))
