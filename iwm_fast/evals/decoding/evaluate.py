"""`iwm decode`: trains a pixel decoder of the teacher's tokens, and measures how well it shows validation images.

It is trained on both views of the run's own stream, with the crops and the jitter that the encoder was trained on. Two
controls are trained alike: a linear map from each token to its patch, and a decoder of an untrained encoder's tokens.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from iwm_fast import world_model
from iwm_fast.checkpoints.pixel_decoder import save_pixel_decoder
from iwm_fast.config.finetuning import DecodeConfig
from iwm_fast.evals.datasets import evenly_spaced, require_readable
from iwm_fast.evals.decoding.image_quality import psnr, ssim
from iwm_fast.evals.decoding.training import DECODER, LINEAR, UNTRAINED, DecoderArm, build_arm
from iwm_fast.evals.finetuning.run import (
    FinetuneContext,
    TrainedVariant,
    free_memory,
    map_validation_images,
    open_context,
    split_global_batch,
    train_job,
)
from iwm_fast.evals.results import Result, Row, mean_row, save_result
from iwm_fast.evals.retrieval.bank import bank_views
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.transforms.composition import draw_view
from iwm_fast.pipelines.transforms.normalization import denormalize_view, normalize_view, to_unit_range
from iwm_fast.pipelines.transforms.torch_renderer import render
from iwm_fast.rendering.image_grid import Panel, save_image_grid
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero, single_process
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.runtime.preemption import Preemption

log = logging.getLogger(__name__)

VIEWS = ("clean", "changed")
METRICS = {"psnr_db": psnr, "ssim": ssim}
_NUM_SHOWN = 8

Context = FinetuneContext[DecodeConfig]


def evaluate_decode(
    config: DecodeConfig, rank_info: RankInfo | None = None, preemption: Preemption | None = None
) -> Result:
    """Train or resume the decoders, save the first one beside the run, and save and return what was measured.

    Collective: every rank must call it.

    Raises:
        ValueError: if the run, shards or batch sizes do not fit.
        FileNotFoundError, CheckpointError: if run or shards cannot be read, or a decoder has other settings.
        ShardError: if a validation image cannot be decoded.
        PreemptedError: if a rank was asked to stop; calling this again resumes.
    """
    rank_info = rank_info or single_process(config.runtime.device)
    with same_error_on_all_ranks():
        split_global_batch(config, rank_info.world_size)
        model = world_model.load(config.run, rank_info.device, checkpoint=config.checkpoint)
        context = open_context("decode", config, model, rank_info, preemption)
    samples = evenly_spaced(context.val.num_samples, config.num_images)
    broadcast_from_rank_zero(lambda: require_readable((context.val, samples)))
    shown = samples[evenly_spaced(len(samples), _NUM_SHOWN)]
    normalization = context.model_config.data.normalization
    pictures = {"image": _draw(lambda view: to_unit_range(view, normalization), context, shown)}
    trained: dict[str, TrainedVariant] = {}
    for name in (DECODER, LINEAR, UNTRAINED) if config.controls else (DECODER,):
        arm = build_arm(name, model, context)
        stats = train_job(arm.job, context)
        trained[name] = TrainedVariant(per_image=_measure(arm, context, samples), stats=stats)
        pictures[name] = _draw(arm.decode_view, context, shown)
        if name == DECODER:
            path = broadcast_from_rank_zero(lambda arm=arm: save_pixel_decoder(config.run, arm.decoder))
            log.info("the decoder is in %s", path)
        free_memory(rank_info.device)
    steps = {name: variant.stats.steps for name, variant in trained.items()}
    result = context.make_result("decode", _rows(trained, context), {"steps": steps})
    broadcast_from_rank_zero(lambda: _save(result, pictures, context))
    return result


def render_views(batch: Batch, context: Context) -> Float[Tensor, "B views 3 H W"]:
    """Return normalised views of validation images: as they are, and jittered with the strengths of the run.

    The jitter is a function of the seed and the number of the sample.
    """
    config, clean = context.model_config, batch.source_view
    views = bank_views(config.views, "run")
    parameters = draw_view(views, context.settings.seed, "decode", 0, batch.sample.numpy(), is_source=False)
    pixels = render(denormalize_view(clean, config.data.normalization), parameters, views)
    changed = normalize_view(pixels, config.data.normalization)
    return torch.stack([clean, changed], dim=1)


def _measure(
    arm: DecoderArm, context: Context, samples: Int64[np.ndarray, "images"]
) -> Float32[np.ndarray, "images views metrics"]:
    """Return PSNR and SSIM of each image. Collective: every rank must call it."""

    def measure(batch: Batch) -> Float[Tensor, "B views metrics"]:
        views = render_views(batch, context)
        truth = to_unit_range(views.flatten(0, 1), context.model_config.data.normalization)
        decoded = arm.decode_view(views.flatten(0, 1))
        values = torch.stack([metric(decoded, truth) for metric in METRICS.values()], dim=1)
        return values.unflatten(0, views.shape[:2])

    return map_validation_images(measure, context, samples).numpy()


def _draw(
    decode: Callable[[Float[Tensor, "B 3 H W"]], Float[Tensor, "B 3 H W"]],
    context: Context,
    samples: Int64[np.ndarray, "images"],
) -> UInt8[np.ndarray, "images views H W 3"]:
    """Return the pixels of decoded images; `decode` maps normalised ones to colours from 0 to 1.

    Collective: every rank must call it.
    """

    def draw(batch: Batch) -> UInt8[Tensor, "B views H W 3"]:
        views = render_views(batch, context)
        pixels = (decode(views.flatten(0, 1)).clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).unflatten(0, views.shape[:2])

    return map_validation_images(draw, context, samples).numpy()


def _rows(trained: dict[str, TrainedVariant], context: Context) -> list[Row]:
    """Return a row for each metric, view and decoder; the control of the decoder is that of an untrained encoder."""
    rows = []
    for number, metric in enumerate(METRICS):
        for place, view in enumerate(VIEWS):
            values = {name: variant.per_image[:, place, number] for name, variant in trained.items()}
            for name, variant in trained.items():
                control = values.get(UNTRAINED) if name == DECODER else None
                options = {"control": control, "control_name": "untrained encoder", **variant.stats.columns()}
                rows.append(mean_row(f"{name}, {view}", metric, values[name], context.settings.seed, **options))
    return rows


def _save(result: Result, pictures: dict[str, UInt8[np.ndarray, "images views H W 3"]], context: Context) -> Path:
    """Save the result, and a figure with each image above what the decoders make of it; return the figure's path."""
    save_result(context.settings.run, result)
    labels, rows = [], []
    for place, view in enumerate(VIEWS):
        for name, pixels in pictures.items():
            quality = "" if name == "image" else f", {result.value(f'{name}, {view}', 'psnr_db'):.1f} dB"
            labels.append(f"{view} {name}{quality}".replace("_", " "))
            rows.append([Panel(pixels=image) for image in pixels[:, place]])
    path = context.folder.with_name(f"{result.name}.png")
    save_image_grid(path, labels, rows, f"{result.name}, step {result.step}: validation images and decoded tokens")
    return path
