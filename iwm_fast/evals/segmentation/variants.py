"""The arms of segmentation: which networks are trained, on what they stand, and how a batch reaches them."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from iwm_fast.config.finetuning import SegmentConfig
from iwm_fast.config.run import RunConfig
from iwm_fast.engines.optimizer import scaled_optimizer
from iwm_fast.evals.finetuning.networks import Encode, frozen, networks, seeded
from iwm_fast.evals.finetuning.run import task_folder
from iwm_fast.evals.finetuning.task import Job
from iwm_fast.evals.finetuning.variants import ArmNetwork, lr_scale, origin_of
from iwm_fast.evals.segmentation.masks import ViewMasks
from iwm_fast.evals.segmentation.network import SegmentInputs, pixel_loss
from iwm_fast.models.heads import PatchHead
from iwm_fast.models.layers import set_drop_path_
from iwm_fast.models.predictor import Predictor
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.runtime.preemption import Preemption
from iwm_fast.world_model import WorldModel

WITH_PREDICTOR = ("predictor", "random_predictor")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all arms are trained and measured with."""

    config: SegmentConfig
    settings: RunConfig
    """See `iwm_fast.evals.finetuning.run.run_config`."""
    model: WorldModel
    rank_info: RankInfo
    preemption: Preemption | None
    train: ShardSet
    val: ShardSet
    num_classes: int

    @property
    def folder(self) -> Path:
        """Where the task keeps its jobs."""
        return task_folder(self.config.run, "segment", self.config.name)

    def masks(self, shards: ShardSet) -> ViewMasks:
        """Start to read maps for views of these samples."""
        return ViewMasks(
            shards,
            size=self.settings.views.size,
            num_classes=self.num_classes,
            ignore_index=self.config.ignore_index,
            num_threads=self.config.runtime.reader_threads,
        )


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to learn the task."""

    name: str
    module: ArmNetwork
    encode: Encode | None
    """The frozen encoder; None where it is trained."""
    origin: dict[str, str | int]
    """What the outcome depends on beside the settings."""

    def inputs(self, batch: Batch, masks: ViewMasks) -> SegmentInputs:
        """Begin to read a batch's maps, and return what the network takes."""
        # first: threads read while the encoder computes
        wait = masks.begin(batch)
        return SegmentInputs(
            view=batch.source_view if self.encode is None else None,
            tokens=None if self.encode is None else self.encode(batch.source_view),
            action=torch.zeros_like(batch.action),
            everything=batch.context,
            wait_for_masks=wait,
        )

    def job(self, bench: Bench, masks: ViewMasks) -> Job:
        """Return what is to be trained, on batches whose maps these threads read."""
        config = bench.config
        scales = functools.partial(lr_scale, arm=self.name, task=config, model=bench.model)

        def loss(scores: Float[Tensor, "B N K"], inputs: SegmentInputs) -> Float[Tensor, ""]:
            return pixel_loss(scores, inputs.wait_for_masks(), config.ignore_index)

        return Job(
            name=self.name,
            module=self.module,
            prepare=functools.partial(self.inputs, masks=masks),
            loss=loss,
            optimizer=scaled_optimizer(self.module, bench.settings.optim, scales),
            origin=self.origin,
        )


def build_arm(name: str, bench: Bench) -> Arm:
    """Build an arm's network from the run's teacher and predictor; the same on every rank."""
    config, model, rank_info = bench.config, bench.model, bench.rank_info
    student = networks(model, config, rank_info)
    if name == "random_predictor":
        student.predictor = networks(model, config, rank_info, is_new=True).predictor
    if name == "untrained_head":
        student.encoder = networks(model, config, rank_info, is_new=True).encoder
    with seeded(config.seed):
        head = PatchHead(student.encoder.dim, bench.num_classes)
    # runs without one have been refused
    predictor = student.predictor if name in WITH_PREDICTOR else None
    assert predictor is None or isinstance(predictor, Predictor)
    is_trained = name == "encoder"
    module = ArmNetwork(head, predictor=predictor, encoder=student.encoder if is_trained else None)
    set_drop_path_(module, config.tune.drop_path)
    origin = origin_of(model.step, student.encoder, student.predictor) | {
        "num_classes": bench.num_classes,
        "ignore_index": config.ignore_index,
    }
    encode = None if is_trained else frozen(student.encoder, rank_info)
    return Arm(name=name, module=module, encode=encode, origin=origin)
