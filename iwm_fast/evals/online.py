"""Evaluation while a run goes on: a small MRR and k-NN on data.val every `output.evaluate_every` steps.

Rank 0 works with networks of its own, built for the moment from the teacher's and the predictor's weights, while the
other ranks wait; training's networks, random states and sample stream are not touched.
"""

import logging
import time
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from iwm_fast import world_model
from iwm_fast.config.evaluation import KnnConfig, MrrConfig
from iwm_fast.config.run import RunConfig
from iwm_fast.evals.datasets import LabelledSets, label_sets, spread
from iwm_fast.evals.probing.knn import knn_accuracy
from iwm_fast.evals.retrieval.mrr import bank_ranks, chance, mean_reciprocal
from iwm_fast.pipelines.config import check
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.training.loaders import open_named_shards
from iwm_fast.world_model import WorldModel

log = logging.getLogger(__name__)

# some 400 TFLOP for a ViT-B/16: half a minute of a GPU's float32
_MRR = MrrConfig(num_images=64, bank_size=64, bank="run", families=("jitter",))
_KNN = KnnConfig(max_train_samples=2000)
_MAX_VAL_SAMPLES = 2000
_PREDICTOR = "predictor."


class OnlineEvaluation:
    """Measures a run between two steps; every rank has one and calls it at the same steps."""

    def __init__(self, config: RunConfig, train: ShardSet, rank_info: RankInfo) -> None:
        """Take note of what to measure; nothing is opened before `prepare`.

        Args:
            config: the run's settings, with `output.evaluate_every`.
            train: the shards it is trained on: k-NN's neighbours.
            rank_info: this rank.
        """
        self._config, self._train, self._rank_info = config, train, rank_info
        # the identity predictor applies no change, so there is nothing to rank
        self._has_world_model = config.model.predictor.depth > 0

    def prepare(self) -> None:
        """Open data.val and measure the untrained networks; collective.

        That is the control of every later row, and it reads each image that will ever be asked for, so that what is
        wrong with one ends the run before its first step.

        Raises:
            ValueError: if data.val names no shards.
            FileNotFoundError, ShardError: if they are not there, cannot be read, or have labels that data.train lacks.
        """
        self._controls = distributed.broadcast_from_rank_zero(self._open_and_measure)

    def _open_and_measure(self) -> dict[str, float]:
        val = self._config.data.val
        every = self._config.output.evaluate_every
        check(bool(val), "data.val", val, f"name validation shards where output.evaluate_every is set ({every})")
        self._val = open_named_shards("data.val", val)
        self._labelled = _labelled_samples(self._train, self._val)
        controls = {f"{name}_untrained": value for name, value in self._measure(self._new_model()).items()}
        if self._has_world_model:
            controls["eval/mrr_chance"] = chance(_MRR.bank_size)
        if self._labelled:
            controls["eval/knn_chance"] = self._labelled.chance
        return controls

    def __call__(self, teacher: dict[str, Tensor], parameters: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
        """Return MRR and k-NN of the networks as they are, beside their controls; collective.

        Args:
            teacher: the teacher's weights, which are measured as the encoder.
            parameters: the predictor's whole float32 weights, as `Engine.named_parameters("predictor.")` yields them;
                used up on every rank.

        Raises:
            Exception: whatever ended it on rank 0; the other ranks end without a message.
        """
        started = time.perf_counter()
        # an error here is told before the others wait for this rank to gather weights
        model = distributed.rank_zero_only(lambda: self._new_model(teacher))
        _copy(parameters, dict(model.predictor.named_parameters()) if model else {})
        # called on rank 0 only, which has the model
        measured = distributed.broadcast_from_rank_zero(lambda: self._measure(model) if model else {})
        return {**measured, **self._controls, "eval/time_s": time.perf_counter() - started}

    def _new_model(self, teacher: dict[str, Tensor] | None = None) -> WorldModel:
        # torch's layers fill themselves from the global generator before ours are drawn
        with torch.random.fork_rng(devices=[]):
            model = world_model.untrained(self._config, self._rank_info.device)
        if teacher is not None:
            model.encoder.load_state_dict(teacher)
        return model

    def _measure(self, model: WorldModel) -> dict[str, float]:
        measured = {}
        if self._has_world_model:
            samples = spread(self._val.num_samples, _MRR.num_images)
            rank = np.stack(list(bank_ranks([model], self._val, samples, _MRR)))
            measured["eval/mrr"] = mean_reciprocal(rank)
        if self._labelled:
            measured["eval/knn"] = knn_accuracy(model, self._labelled, _KNN)
        if self._rank_info.device.type == "cuda":
            # what training's allocator does not use is there for DALI's
            torch.cuda.empty_cache()
        return measured


@torch.no_grad()
def _copy(parameters: Iterable[tuple[str, Tensor]], own: dict[str, Tensor]) -> None:
    """Overwrite the predictor's weights in place, where there is one; weights that are sharded are gathered for it."""
    for name, parameter in parameters:
        if name.removeprefix(_PREDICTOR) in own:
            own[name.removeprefix(_PREDICTOR)].copy_(parameter)


def _labelled_samples(train: ShardSet, val: ShardSet) -> LabelledSets | None:
    for name, shards in (("data.train", train), ("data.val", val)):
        num_missing = int((shards.labels(np.arange(shards.num_samples)) < 0).sum())
        if num_missing:
            log.info(
                "output.evaluate_every measures MRR without k-NN: %d of %d samples of %s have no .cls",
                num_missing, shards.num_samples, name,
            )  # fmt: skip
            return None
    return label_sets(train, val, _KNN.data.label, max_train=_KNN.max_train_samples, max_val=_MAX_VAL_SAMPLES)
