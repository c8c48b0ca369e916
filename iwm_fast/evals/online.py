"""Evaluation during training: a small MRR and k-NN on data.val every `output.evaluate_every` steps.

Rank 0 evaluates temporary networks with the weights of teacher and predictor, while the other ranks wait. The networks,
random states and sample stream of training do not change.
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
from iwm_fast.evals.datasets import LabelledSets, evenly_spaced, label_sets, require_readable
from iwm_fast.evals.probing.knn import knn_accuracy
from iwm_fast.evals.retrieval.mrr import chance_mrr, mean_reciprocal_rank, rank_images
from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.training.loaders import open_named_shards
from iwm_fast.world_model import WorldModel

log = logging.getLogger(__name__)

# Small settings, because training waits: about 400 TFLOP for a ViT-B/16, half a minute of a GPU in float32.
_MRR = MrrConfig(num_images=64, bank_size=64, bank="run", families=("jitter",))
_KNN = KnnConfig(max_train_samples=2000)
_MAX_VAL_SAMPLES = 2000
_PREDICTOR = "predictor."


class OnlineEvaluation:
    """Evaluates a run between two training steps; every rank has one and calls it at the same steps."""

    def __init__(self, config: RunConfig, train: ShardSet, rank_info: RankInfo) -> None:
        """Store the arguments; `train` are the training shards, which contain the neighbours for k-NN."""
        self._config = config
        self._train = train
        self._rank_info = rank_info
        # The identity predictor ignores the action, so its MRR has no meaning.
        self._has_predictor = config.model.predictor.depth > 0

    def prepare(self) -> None:
        """Open data.val and measure the untrained networks, which are the control of all later measurements.

        This reads all images that later measurements use, so that a bad image ends the run before its first step.
        Collective: every rank must call it.

        Raises:
            ValueError: if data.val names no shards.
            FileNotFoundError, ShardError: if shards are missing, damaged, or have labels that data.train lacks.
        """
        self._controls = distributed.broadcast_from_rank_zero(self._open_and_measure)

    def _open_and_measure(self) -> dict[str, float]:
        val = self._config.data.val
        interval = self._config.output.evaluate_every
        require(bool(val), "data.val", val, f"name validation shards when output.evaluate_every is set ({interval})")
        self._val = open_named_shards("data.val", val, self._config.data)
        self._labelled = _label_samples(self._train, self._val)
        self._require_readable()
        controls = {f"{name}_untrained": value for name, value in self._measure(self._new_model()).items()}
        if self._has_predictor:
            controls["eval/mrr_chance"] = chance_mrr(_MRR.bank_size)
        if self._labelled:
            controls["eval/knn_chance"] = self._labelled.chance
        return controls

    def _require_readable(self) -> None:
        selections = [(self._val, evenly_spaced(self._val.num_samples, _MRR.num_images))] if self._has_predictor else []
        if self._labelled:
            selections += [(samples.shards, samples.samples) for samples in (self._labelled.train, self._labelled.val)]
        require_readable(*selections)

    def __call__(self, teacher: dict[str, Tensor], parameters: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
        """Return MRR, k-NN accuracy, their controls and the duration, by name. Collective: every rank must call it.

        Args:
            teacher: weights of the teacher, which is evaluated as the encoder.
            parameters: unsharded float32 weights of the predictor, from `Engine.named_parameters("predictor.")`. Every
                rank consumes them, because each weight is gathered by all ranks.

        Raises:
            Exception: if the evaluation fails on rank 0; only rank 0 raises with a message.
        """
        started = time.perf_counter()
        # A failure to build the networks must reach the other ranks before they gather weights with this one.
        model = distributed.rank_zero_only(lambda: self._new_model(teacher))
        _copy(parameters, dict(model.predictor.named_parameters()) if model else {})
        # The function is called on rank 0 only, where there is a model.
        metrics = distributed.broadcast_from_rank_zero(lambda: self._measure(model) if model else {})
        return {**metrics, **self._controls, "eval/time_s": time.perf_counter() - started}

    def _new_model(self, teacher: dict[str, Tensor] | None = None) -> WorldModel:
        # torch's layers initialise themselves with the global generator, which training must find unchanged.
        with torch.random.fork_rng(devices=[]):
            model = world_model.build_untrained(self._config, self._rank_info.device)
        if teacher is not None:
            model.encoder.load_state_dict(teacher)
        return model

    def _measure(self, model: WorldModel) -> dict[str, float]:
        metrics = {}
        if self._has_predictor:
            samples = evenly_spaced(self._val.num_samples, _MRR.num_images)
            rank = np.stack(list(rank_images([model], self._val, samples, _MRR)))
            metrics["eval/mrr"] = mean_reciprocal_rank(rank)
        if self._labelled:
            metrics["eval/knn"] = knn_accuracy(model, self._labelled, _KNN)
        if self._rank_info.device.type == "cuda":
            # DALI has its own allocator, which cannot use the memory that torch's keeps in its cache.
            torch.cuda.empty_cache()
        return metrics


@torch.no_grad()
def _copy(parameters: Iterable[tuple[str, Tensor]], destination: dict[str, Tensor]) -> None:
    """Copy the predictor's weights into the tensors of the destination, which is empty on ranks other than 0."""
    # Every rank iterates to the end, because iterating gathers sharded weights from all ranks.
    for name, parameter in parameters:
        if name.removeprefix(_PREDICTOR) in destination:
            destination[name.removeprefix(_PREDICTOR)].copy_(parameter)


def _label_samples(train: ShardSet, val: ShardSet) -> LabelledSets | None:
    """Return labelled samples for k-NN; None, with a log line, if some have no label."""
    for name, shards in (("data.train", train), ("data.val", val)):
        if shards.num_unlabelled:
            log.info(
                "output.evaluate_every measures MRR without k-NN, because %d of %d samples of %s have no class number",
                shards.num_unlabelled, shards.num_samples, name,
            )  # fmt: skip
            return None
    return label_sets(train, val, _KNN.data.label, max_train=_KNN.max_train_samples, max_val=_MAX_VAL_SAMPLES)
