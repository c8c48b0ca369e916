"""Where a job stands: its newest checkpoint, if that is of the same job."""

import logging
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.checkpoint import Checkpoint
from iwm_fast.checkpoints.commit import CheckpointError, set_aside
from iwm_fast.config.finetuning import TuneTask
from iwm_fast.config.fingerprint import fingerprint
from iwm_fast.config.loading import to_tree
from iwm_fast.config.run import RunConfig
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime import distributed
from iwm_fast.training.task import Job, Tuned

log = logging.getLogger("iwm_fast")

# of the run's settings; what else its fingerprint has does not matter here or comes from tune and augment
_OF_THE_RUN = ("seed", "data.", "views.", "model.")


@dataclass
class Standing:
    """How far a job has come: what its checkpoints keep beside the weights."""

    step: int = 0
    """Optimiser steps attempted; drives the data."""
    applied_steps: int = 0
    """Those that changed the weights; drives the learning rate."""
    run_id: str = ""
    """The same however often the job goes on."""
    time_s: float = 0.0
    """What all steps took."""
    timed_steps: int = 0
    """Steps but for the first after each start, which fills caches."""
    timed_s: float = 0.0
    """What those took."""

    @property
    def counters(self) -> dict[str, Any]:
        """What a checkpoint has no other place for."""
        return {name: value for name, value in asdict(self).items() if "time" in name}

    def tuned(self, num_tuned: int, global_batch_size: int) -> Tuned:
        """Return what training has taken."""
        speed = self.timed_steps * global_batch_size / self.timed_s if self.timed_s else None
        return Tuned(num_tuned=num_tuned, images_per_s=speed, time_s=self.time_s, steps=self.step)


def job_fingerprint(job: Job, task: TuneTask, config: RunConfig, shards: ShardSet) -> dict[str, Any]:
    """Return what decides the outcome of a job, flat; samples by content instead of by path."""
    run = fingerprint(config, shards.content_digest)
    kept = {name: value for name, value in run.items() if name.startswith(_OF_THE_RUN)}
    groups = {name: to_tree(getattr(task, name)) for name in ("tune", "augment")}
    of_the_task = {f"{group}.{name}": value for group, tree in groups.items() for name, value in tree.items()}
    return kept | of_the_task | {"data.label": task.data.label} | job.origin


def find_standing(folder: Path, identity: dict[str, Any]) -> tuple[Standing, Checkpoint | None]:
    """Return where the job in a folder stands, and the checkpoint that says so; collective.

    What is damaged is moved aside, so that its step can be written again.

    Raises:
        CheckpointError: if the folder's job is another one, or no checkpoint is whole.
    """
    found: list[Checkpoint] = []

    def decide() -> tuple[Path | None, str]:
        saved, refused = checkpoints.read_newest(folder)
        if saved is None:
            return None, uuid.uuid4().hex[:12]
        _require_same_job(saved, identity, folder)
        for damaged, reason in refused.items():
            log.warning("%s; going on from step %d. It is %s now", reason, saved.step, set_aside(damaged))
        found.append(saved)
        return saved.folder, saved.run_id

    newest, run_id = distributed.on_rank_zero(decide)
    if newest is None:
        return Standing(run_id=run_id), None
    # rank 0 has it already
    saved = found[0] if found else checkpoints.read(newest)
    standing = Standing(step=saved.step, applied_steps=saved.applied_steps, run_id=run_id, **saved.counters)
    return standing, saved


def _require_same_job(saved: Checkpoint, identity: dict[str, Any], folder: Path) -> None:
    old = saved.fingerprint
    names = sorted(name for name in old.keys() | identity.keys() if old.get(name) != identity.get(name))
    if names:
        rows = "\n".join(f"  {name}: {old.get(name)} -> {identity.get(name)}" for name in names)
        raise CheckpointError(
            f"{folder} was trained with other settings (saved -> now):\n{rows}\n"
            "set them back, give name=OTHER to keep both, or delete that folder to train anew"
        )
