"""The world model at work, as pictures: a change is asked for, its prediction is looked up in a bank of images.

Nothing is picked by hand: images are spread evenly over the validation set, each asks for the first version of its
bank, and the sweeps are those of the first image. Where in the image the source lies (crop, flip) is not swept.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from iwm_fast.config.evaluation import ImagineConfig
from iwm_fast.evals.datasets import clean_images, spread, validation_shards
from iwm_fast.evals.results import name_with_step
from iwm_fast.evals.retrieval.bank import draw_bank, open_world_model, target_map
from iwm_fast.evals.retrieval.sweeps import (
    Case,
    Scene,
    ask_for_first,
    sections_of,
    sweep,
    swept_entries,
    undo,
    undone_flags,
)
from iwm_fast.monitoring.evaluation_progress import follow
from iwm_fast.rendering.image_grid import Section, require_writable, save_sections
from iwm_fast.rendering.imagine_page import write_page
from iwm_fast.runtime.distributed import single_process
from iwm_fast.world_model import WorldModel

_UNDONE = {"grayscale": "Colours given back", "blur": "Blur undone", "solarize": "Solarize undone"}


def imagine(config: ImagineConfig) -> tuple[Path, ...]:
    """Draw what the predictions retrieve and return the files: sheet, sweeps, and a page with both.

    Raises:
        FileNotFoundError, CheckpointError, ShardError: if the run or its shards cannot be used.
        ValueError: if the run's predictor is the identity, or the pictures cannot be written.
    """
    path = Path(config.picture or Path(config.run) / "imagine.png")
    require_writable(path)
    model = open_world_model(config.run, single_process(config.device).device, config.checkpoint)
    if not config.picture:
        path = path.with_stem(name_with_step(path.stem, config.checkpoint, model.step))
    sheet, sweeps = _sections(model, config)
    title = (
        f"Step {model.step}, seed {config.seed}; {config.bank_size} jittered versions of each image "
        f"({config.bank} strengths) to choose from"
    )
    save_sections(path, sheet, title)
    written = [path]
    if sweeps:
        written.append(path.with_name(f"{path.stem}_sweeps.png"))
        save_sections(written[-1], sweeps, title, panel_inches=1.35)
    written.append(path.with_suffix(".html"))
    write_page(written[-1], [*sheet, *sweeps], title, Path(config.run).resolve().name)
    return tuple(written)


def _sections(model: WorldModel, config: ImagineConfig) -> tuple[list[Section], list[Section]]:
    """Return the sheet's sections and those of the sweeps; of each image only what is drawn is kept."""
    views = model.config.views
    asked: list[Case] = []
    sweeps: list[Section] = []
    undone: defaultdict[str, list[Case]] = defaultdict(list)
    for scene in _scenes(model, config):
        if not asked:
            entries = swept_entries(views, config.bank)
            sweeps = [sweep(entry, scene, config.steps, model, config.bank) for entry in entries]
        asked.append(ask_for_first(scene, model))
        for flag in undone_flags(views):
            undone[flag].append(undo(flag, scene, model))
    for flag, cases in undone.items():
        sweeps += sections_of(f"{_UNDONE[flag]}, the images of the sheet", cases)
    return sections_of("The first version of each image's bank", asked), sweeps


def _scenes(model: WorldModel, config: ImagineConfig) -> Iterator[Scene]:
    shards = validation_shards(model, config.data)
    samples = spread(shards.num_samples, config.num_images)
    for pixels, sample in follow(clean_images(model, shards, samples), len(samples), "images asked about"):
        bank = draw_bank(pixels, sample, config.bank_size, model=model, strengths=config.bank, seed=config.seed)
        yield Scene(pixels=pixels, bank=bank, target=target_map(model, bank))
