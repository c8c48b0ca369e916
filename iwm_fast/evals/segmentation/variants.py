"""The arms of segmentation: which networks are trained, on what they stand, and how a batch reaches them."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from iwm_fast.config.finetuning import SegmentConfig
from iwm_fast.config.run import RunConfig
from iwm_fast.evals.finetuning.run import task_folder
from iwm_fast.evals.finetuning.task import Job
from iwm_fast.evals.finetuning.variants import Parts, build_parts, origin_of
from iwm_fast.evals.segmentation.masks import ViewMasks
from iwm_fast.evals.segmentation.network import SegmentInputs, pixel_loss
from iwm_fast.models.heads import PatchHead
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.runtime.preemption import Preemption
from iwm_fast.world_model import WorldModel


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

    parts: Parts

    def inputs(self, batch: Batch, masks: ViewMasks) -> SegmentInputs:
        """Begin to read a batch's maps, and return what the network takes."""
        # first: threads read while the encoder computes
        wait, encode = masks.begin(batch), self.parts.encode
        return SegmentInputs(
            view=batch.source_view if encode is None else None,
            tokens=None if encode is None else encode(batch.source_view),
            action=torch.zeros_like(batch.action),
            everything=batch.context,
            wait_for_masks=wait,
        )

    def job(self, bench: Bench, masks: ViewMasks) -> Job:
        """Return what is to be trained, on batches whose maps these threads read."""
        config, student = bench.config, self.parts.student
        origin = origin_of(bench.model.step, student.encoder, student.predictor)

        def loss(scores: Float[Tensor, "B N K"], inputs: SegmentInputs) -> Float[Tensor, ""]:
            return pixel_loss(scores, inputs.wait_for_masks(), config.ignore_index)

        return Job(
            name=self.parts.name,
            module=self.parts.module,
            prepare=functools.partial(self.inputs, masks=masks),
            loss=loss,
            optimizer=self.parts.optimizer(bench.settings.optim),
            origin=origin | {"num_classes": bench.num_classes, "ignore_index": config.ignore_index},
        )


def build_arm(name: str, bench: Bench) -> Arm:
    """Build an arm's network from the run's teacher and predictor; the same on every rank."""
    head = functools.partial(PatchHead, num_classes=bench.num_classes)
    return Arm(parts=build_parts(name, bench.model, bench.config, bench.rank_info, head))
