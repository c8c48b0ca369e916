"""Pictures of what predictions look like and what they retrieve from banks of jittered images, and plots of many.

No image is selected by its result: the images shown are colourful and differ from each other, those of the plots are
evenly spaced over the validation set. Each is queried for the first candidate of its bank, and the sweeps use the first
image. Crop and flip entries of the action are not swept.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from iwm_fast.config.evaluation import ImagineConfig
from iwm_fast.evals.datasets import clean_images, evenly_spaced, require_readable, validation_shards
from iwm_fast.evals.results import name_with_choices
from iwm_fast.evals.retrieval.bank import draw_bank, encode_bank, open_world_model
from iwm_fast.evals.retrieval.choice import choose_shown
from iwm_fast.evals.retrieval.imagined import find_decoder
from iwm_fast.evals.retrieval.recovery import measure_recovery, rank_histogram, recovery_plots
from iwm_fast.evals.retrieval.sweeps import (
    BankedImage,
    RetrievalCase,
    make_sections,
    retrieve_clean,
    retrieve_version,
    sweep,
    swept_entries,
    trained_flags,
)
from iwm_fast.models.pixel_decoder import PixelDecoder
from iwm_fast.monitoring.evaluation_progress import track_progress
from iwm_fast.rendering.charts import Plot, save_plots
from iwm_fast.rendering.image_grid import ImageGrid, require_writable, save_image_grids
from iwm_fast.rendering.imagine_page import write_imagine_page
from iwm_fast.runtime.distributed import single_process
from iwm_fast.world_model import WorldModel

Images = Iterable[tuple[UInt8[Tensor, "H W 3"], int]]
"""Pixels of clean images, and the number of each, which seeds its bank."""


def imagine(config: ImagineConfig) -> tuple[Path, ...]:
    """Write a sheet, the sweeps of the run's action entries, if any, plots, and a page with all; return their files.

    If the checkpoint has a pixel decoder, predictions are also shown as pictures. With `config.image`, that image
    replaces the validation images, and there are no plots.

    Raises:
        FileNotFoundError, CheckpointError, ShardError: if the run, its shards or the image cannot be used.
        ValueError: if the run's predictor is the identity, the image is none, or the pictures cannot be written.
    """
    own_name = f"imagine_{Path(config.image).stem}.png" if config.image else "imagine.png"
    path = Path(config.picture or Path(config.run) / own_name)
    require_writable(path)
    model = open_world_model(config.run, single_process(config.device).device, config.checkpoint)
    if not config.picture:
        path = path.with_stem(name_with_choices(path.stem, config, model.step))
    decoder = find_decoder(config.run, model)
    plots: list[Plot] = []
    if config.image:
        (own,) = _with_banks(zip(model.crop_images([config.image]), [0], strict=True), model, config)
        sheet, sweeps = _draw_own_image(own, model, decoder, config)
    else:
        shards = validation_shards(model, config.data)
        plotted = evenly_spaced(shards.num_samples, config.num_plotted)
        require_readable((shards, plotted))
        shown = choose_shown(model, shards, config.num_images)
        images = (
            track_progress(clean_images(model, shards, samples), len(samples), "images queried")
            for samples in (shown, plotted)
        )
        shown_images, plotted_images = (_with_banks(of, model, config) for of in images)
        sheet, sweeps = _draw_images(shown_images, model, decoder, config)
        recovery = measure_recovery(plotted_images, model, config.bank)
        plots = [rank_histogram(recovery), *recovery_plots(recovery, model.config.views, config.bank)]
    title = (
        f"Step {model.step}, seed {config.seed}; {config.bank_size} jittered versions of each image "
        f"({config.bank} strengths) to choose from"
    )
    return tuple(_write(path, sheet, sweeps, plots, title, run=Path(config.run).resolve().name))


def _write(
    path: Path, sheet: list[ImageGrid], sweeps: list[ImageGrid], plots: list[Plot], title: str, *, run: str
) -> Iterator[Path]:
    """Write all pictures and the page, and yield their files."""
    save_image_grids(path, sheet, title)
    yield path
    if sweeps:
        sweeps_path = path.with_name(f"{path.stem}_sweeps.png")
        save_image_grids(sweeps_path, sweeps, title, panel_inches=1.35)
        yield sweeps_path
    if plots:
        plots_path = path.with_name(f"{path.stem}_plots.png")
        save_plots(plots_path, plots, title)
        yield plots_path
    page = path.with_suffix(".html")
    write_imagine_page(page, [*sheet, *sweeps], plots, title, run=run)
    yield page


def _draw_images(
    images: Iterable[BankedImage], model: WorldModel, decoder: PixelDecoder | None, config: ImagineConfig
) -> tuple[list[ImageGrid], list[ImageGrid]]:
    """Return the sections of the sheet and those of the sweeps."""
    views = model.config.views
    first_cases: list[RetrievalCase] = []
    sweeps: list[ImageGrid] = []
    clean_cases: defaultdict[str, list[RetrievalCase]] = defaultdict(list)
    # One image at a time, because the target tokens of a bank are large.
    for image in images:
        if not first_cases:
            sweeps = _sweep_all(image, model, decoder, config)
        first_cases.append(retrieve_version(image, 0, model, decoder))
        for flag in trained_flags(views):
            clean_cases[flag].append(retrieve_clean(flag, image, model, decoder))
    for flag, cases in clean_cases.items():
        sweeps += make_sections(f"{getattr(views, flag).undone}, the images of the sheet", cases)
    return make_sections("The first version of each image's bank", first_cases), sweeps


def _draw_own_image(
    image: BankedImage, model: WorldModel, decoder: PixelDecoder | None, config: ImagineConfig
) -> tuple[list[ImageGrid], list[ImageGrid]]:
    """Return the sections of the sheet, with several versions of one image, and those of the sweeps."""
    views = model.config.views
    versions = range(min(config.num_images, len(image.bank)))
    sheet = make_sections(
        "The first versions of the image's bank",
        [retrieve_version(image, number, model, decoder) for number in versions],
    )
    undone = [
        grid
        for flag in trained_flags(views)
        for grid in make_sections(getattr(views, flag).undone, [retrieve_clean(flag, image, model, decoder)])
    ]
    return sheet, [*_sweep_all(image, model, decoder, config), *undone]


def _sweep_all(
    image: BankedImage, model: WorldModel, decoder: PixelDecoder | None, config: ImagineConfig
) -> list[ImageGrid]:
    entries = swept_entries(model.config.views, config.bank)
    return [sweep(entry, image, config.steps, model, strengths=config.bank, decoder=decoder) for entry in entries]


def _with_banks(images: Images, model: WorldModel, config: ImagineConfig) -> Iterator[BankedImage]:
    for pixels, number in images:
        bank = draw_bank(pixels, number, config.bank_size, model=model, strengths=config.bank, seed=config.seed)
        yield BankedImage(pixels=pixels, bank=bank, target=encode_bank(model, bank))
