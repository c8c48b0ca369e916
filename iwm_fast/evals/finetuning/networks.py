"""What tasks that train are put together from: the run's networks on the settings' operations, frozen or new."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from iwm_fast.config.finetuning import TuneTask
from iwm_fast.models.encoder import Encoder
from iwm_fast.models.student import Student, build_student, choose_ops
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.world_model import WorldModel

Encode = Callable[[Float[Tensor, "B 3 H W"]], Float[Tensor, "B N D"]]
"""From normalised images to the tokens of all their patches."""


def networks(model: WorldModel, task: TuneTask, rank_info: RankInfo, arm: str = "") -> Student:
    """Return encoder and predictor of the run on the task's operations, on the CPU and apart from the model's.

    Args:
        model: the run.
        task: settings; its seed gives new weights.
        rank_info: this process.
        arm: random_predictor has a predictor, and untrained_head an encoder, as before training.
    """
    student = _build(model, task, rank_info, model.config.seed)
    student.encoder.load_state_dict(model.encoder.state_dict())
    student.predictor.load_state_dict(model.predictor.state_dict())
    if arm == "random_predictor":
        student.predictor = _build(model, task, rank_info, task.seed).predictor
    if arm == "untrained_head":
        student.encoder = _build(model, task, rank_info, task.seed).encoder
    return student


def _build(model: WorldModel, task: TuneTask, rank_info: RankInfo, seed: int) -> Student:
    config = replace(model.config, runtime=task.runtime, seed=seed)
    return build_student(config, choose_ops(config, rank_info.device))


def frozen(encoder: Encoder, rank_info: RankInfo) -> Encode:
    """Return what gives the tokens of all patches of images; the encoder is moved to the device and kept as it is."""
    encoder.requires_grad_(False).eval().to(rank_info.device)

    def encode(view: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        return encoder(view, None).unflatten(0, (len(view), -1))

    return encode


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch draw new weights that follow from a seed alone, and forget it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
