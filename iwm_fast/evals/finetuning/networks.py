"""The networks that finetuning starts from: the run's encoder and predictor, or new ones."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from iwm_fast import world_model
from iwm_fast.config.finetuning import TrainedSettings, TuneTaskConfig
from iwm_fast.models.encoder import Encoder
from iwm_fast.models.student import Student, build_student, choose_ops
from iwm_fast.pipelines.batch import RaggedIndex
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.world_model import WorldModel

Encode = Callable[..., Float[Tensor, "*rows D"]]
"""Maps normalised images to the tokens of all their patches, (B, N, D); if an index of visible patches is given, too,
to the tokens of these, packed, (C, D)."""


def load_model(settings: TuneTaskConfig, rank_info: RankInfo) -> WorldModel:
    """Load the chosen checkpoint of a run or an export, with its teacher or its student as the encoder."""
    checkpoint, encoder = settings.checkpoint, settings.tune.encoder
    return world_model.load(settings.run, rank_info.device, checkpoint, size=settings.size, encoder=encoder)


def build_networks(model: WorldModel, settings: TrainedSettings, rank_info: RankInfo, variant: str = "") -> Student:
    """Build copies of the run's encoder and predictor on the CPU, with the kernels that `settings.runtime` selects.

    The variant "random_predictor" has a new predictor, "untrained_head" and "untrained_encoder" a new encoder, by the
    seed of the settings.
    """
    student = _build_student(model, settings, rank_info, model.config.seed)
    student.encoder.load_state_dict(model.encoder.state_dict())
    student.predictor.load_state_dict(model.predictor.state_dict())
    if variant == "random_predictor":
        student.predictor = _build_student(model, settings, rank_info, settings.seed).predictor
    if variant in ("untrained_head", "untrained_encoder"):
        student.encoder = _build_student(model, settings, rank_info, settings.seed).encoder
    return student


def _build_student(model: WorldModel, settings: TrainedSettings, rank_info: RankInfo, seed: int) -> Student:
    config = replace(model.config, runtime=settings.runtime, seed=seed)
    # All patches are both context and targets; action tokens and the token of a task may follow.
    num_tokens = 2 * config.grid**2 + len(config.views.entries) + 1
    return build_student(config, choose_ops(config, rank_info.device, num_predictor_tokens=num_tokens))


def freeze_encoder(encoder: Encoder, rank_info: RankInfo) -> Encode:
    """Freeze an encoder, move it to the device and return a function that encodes images with it."""
    encoder.requires_grad_(False).eval().to(rank_info.device)

    def encode(view: Float[Tensor, "B 3 H W"], context: RaggedIndex | None = None) -> Float[Tensor, "*rows D"]:
        # Without an index, the encoder returns the tokens of all patches, packed image after image.
        tokens = encoder(view, context)
        return tokens.unflatten(0, (len(view), -1)) if context is None else tokens

    return encode


@contextmanager
def seeded_init(seed: int) -> Iterator[None]:
    """Seed the CPU's generator for weights initialised inside the context, and restore its state afterwards."""
    # New weights are drawn on the CPU. torch.manual_seed would also seed the generators of GPUs, which must not change.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
