"""Evaluation during training every `output.evaluate_every` steps: MRR, k-NN, probes and effective ranks on data.val.

Each rank processes its share of the images with temporary networks, which get the weights of teacher and predictor.
Rank 0 then trains the probes. The networks, random states and sample stream of training do not change.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from iwm_fast import world_model
from iwm_fast.config.evaluation import MrrConfig
from iwm_fast.config.run import RunConfig
from iwm_fast.evals.datasets import LabelledSets, compute_sharded, evenly_spaced, label_sets, require_readable
from iwm_fast.evals.online_probes import KNN, MIN_PROBE_IMAGES, accuracies, encode_changed_views, encode_images
from iwm_fast.evals.retrieval.bank import trained_family
from iwm_fast.evals.retrieval.mrr import chance_mrr, mean_reciprocal_rank, rank_images
from iwm_fast.monitoring.effective_rank import lidar, rank_me
from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.training.loaders import open_named_shards, open_on_all_ranks
from iwm_fast.world_model import WorldModel

log = logging.getLogger(__name__)

# Small settings, because training waits: about 500 TFLOP for a ViT-B/16, shared by the ranks.
_MRR = MrrConfig(num_images=64, bank_size=64, bank="run")
_MAX_VAL_SAMPLES = 2000
_LIDAR_IMAGES = 256
_PREDICTOR = "predictor."


def measured_metrics(config: RunConfig, train: ShardSet, val: ShardSet) -> tuple[str, ...]:
    """Return the names of the metrics that evaluations of a run measure, without the group eval/."""
    has_labels = not train.num_unlabelled and not val.num_unlabelled
    has_family = trained_family(config.views) is not None
    is_measured = {
        # The identity predictor ignores the action, so its MRR has no meaning.
        "mrr": has_family and config.model.predictor.depth > 0,
        "knn": has_labels,
        "linear": has_labels and train.num_samples >= MIN_PROBE_IMAGES,
        "attentive": has_labels and train.num_samples >= MIN_PROBE_IMAGES,
        "rank_me": True,
        "lidar": has_family,
    }
    return tuple(name for name, is_on in is_measured.items() if is_on)


def require_measured(config: RunConfig, train: ShardSet, val: ShardSet) -> None:
    """Check that evaluations of a run measure the metric of `output.keep_best`.

    Raises:
        ValueError: if they do not.
    """
    metric, measured = config.output.keep_best, measured_metrics(config, train, val)
    require(metric is None or metric in measured, "output.keep_best", metric,
            f"be one of {', '.join(measured)} in this run: knn needs a class number for every sample of data.train and "
            f"data.val, linear and attentive also at least {MIN_PROBE_IMAGES} training images, mrr a predictor, "
            "mrr and lidar a transformation that training applies to both views, such as jitter")  # fmt: skip


class OnlineEvaluation:
    """Evaluates a run between two training steps; every rank has one and calls it at the same steps."""

    def __init__(self, config: RunConfig, train: ShardSet, rank_info: RankInfo) -> None:
        """Store the arguments; `train` are the training shards, from which k-NN and probes learn."""
        self._config = config
        self._train = train
        self._rank_info = rank_info
        # Without a transformation of both views, there is nothing to predict and nothing to tell apart.
        self._family: str = trained_family(config.views) or ""
        self._last_end: float = time.perf_counter()

    def prepare(self) -> None:
        """Open data.val and measure the untrained networks, which are the control of all later measurements.

        This reads all images that later measurements use, so that a bad image ends the run before its first step.
        Collective: every rank must call it.

        Raises:
            ValueError: if data.val names no shards, or the metric of output.keep_best is not measured.
            FileNotFoundError, ShardError: if shards are missing, damaged, or have labels that data.train lacks.
        """
        name = f"data.val = {self._config.data.val!r}"
        # Every machine has its own paths.
        self._val = open_on_all_ranks(name, self._config.data, self._open_val, self._rank_info)
        # On one rank: others would read the same headers and repeat the warnings. The same rank trains the probes.
        self._labelled = distributed.rank_zero_only(self._check_and_label)
        self._train_samples, chance = distributed.broadcast_from_rank_zero(
            lambda: (self._labelled.train.samples, self._labelled.chance) if self._labelled else (None, None)
        )
        self._measured: tuple[str, ...] = measured_metrics(self._config, self._train, self._val)
        untrained = self._measure(distributed.on_every_rank(self._new_model))
        self._controls: dict[str, float] = {f"{name}_untrained": value for name, value in untrained.items()}
        if "mrr" in self._measured:
            self._controls["eval/mrr_chance"] = chance_mrr(_MRR.bank_size)
        if chance is not None:
            # Linear and attentive probe have the same chance.
            self._controls["eval/knn_chance"] = chance
        self._last_end = time.perf_counter()

    def _open_val(self) -> ShardSet:
        pattern, interval = self._config.data.val, self._config.output.evaluate_every
        condition = f"name validation shards when output.evaluate_every is set ({interval})"
        require(bool(pattern), "data.val", pattern, condition)
        return open_named_shards("data.val", pattern, self._config.data)

    def _check_and_label(self) -> LabelledSets | None:
        val = self._val
        require_measured(self._config, self._train, val)
        labelled = _label_samples(self._train, val)
        if not self._family:
            log.info(
                "evaluations measure neither MRR nor LiDAR, because training applies no transformation to both views"
            )
        counts = {"mrr": _MRR.num_images, "rank_me": _MAX_VAL_SAMPLES, "lidar": _LIDAR_IMAGES}
        measured = measured_metrics(self._config, self._train, val)
        selections = [(val, evenly_spaced(val.num_samples, counts[name])) for name in counts if name in measured]
        require_readable(*selections, *([(self._train, labelled.train.samples)] if labelled else []))
        return labelled

    def __call__(self, teacher: dict[str, Tensor], parameters: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
        """Return all metrics, their controls and the cost, by name. Collective: every rank must call it.

        The cost is `eval/time_s`, and `eval/time_share` as the share of the time since the previous evaluation.

        Args:
            teacher: weights of the teacher, which is evaluated as the encoder.
            parameters: unsharded float32 weights of the predictor, from `Engine.named_parameters("predictor.")`. Every
                rank consumes them, because each weight is gathered by all ranks.

        Raises:
            Exception: on the first rank on which the evaluation fails, whatever was raised there.
            PeerFailedError: on the other ranks.
        """
        started = time.perf_counter()
        # A failure to build the networks must reach the other ranks before they gather weights with this one.
        model = distributed.on_every_rank(lambda: self._new_model(teacher))
        _copy(parameters, dict(model.predictor.named_parameters()))
        metrics = self._measure(model)
        ended, previous_end = time.perf_counter(), self._last_end
        self._last_end = ended
        cost = {"eval/time_s": ended - started, "eval/time_share": (ended - started) / (ended - previous_end)}
        return {**metrics, **self._controls, **cost}

    def _new_model(self, teacher: dict[str, Tensor] | None = None) -> WorldModel:
        # torch's layers initialise themselves with the global generator, which training must find unchanged.
        with torch.random.fork_rng(devices=[]):
            model = world_model.build_untrained(self._config, self._rank_info.device)
        if teacher is not None:
            model.encoder.load_state_dict(teacher)
        return model

    def _measure(self, model: WorldModel) -> dict[str, float]:
        val, rank_info, has_probes = self._val, self._rank_info, "attentive" in self._measured
        ranks = versions = train = None
        if "mrr" in self._measured:
            ranks = self._rank_images(model)
        if "lidar" in self._measured:
            samples = evenly_spaced(val.num_samples, _LIDAR_IMAGES)
            versions = encode_changed_views(model, val, samples, rank_info, self._family)
        samples = evenly_spaced(val.num_samples, _MAX_VAL_SAMPLES)
        encoded = encode_images(model, val, samples, rank_info, keep_tokens=has_probes)
        if self._train_samples is not None:
            train = encode_images(model, self._train, self._train_samples, rank_info, keep_tokens=has_probes)

        def summarize() -> dict[str, float]:
            metrics = {"rank_me": float(rank_me(encoded.pooled.to(model.device)))}
            if ranks is not None:
                metrics["mrr"] = mean_reciprocal_rank(ranks)
            if versions is not None:
                metrics["lidar"] = float(lidar(versions))
            if self._labelled and train:
                # New heads initialise themselves with the global generator, too.
                with torch.random.fork_rng(devices=[]):
                    metrics |= accuracies(model, self._labelled, train, encoded)
            return {f"eval/{name}": metrics[name] for name in self._measured}

        metrics = distributed.broadcast_from_rank_zero(summarize)
        if rank_info.device.type == "cuda":
            # DALI has its own allocator, which cannot use the memory that torch's keeps in its cache.
            torch.cuda.empty_cache()
        return metrics

    def _rank_images(self, model: WorldModel) -> Float32[np.ndarray, "images 1 1 M"]:
        config = replace(_MRR, families=(self._family,))

        def rank_share(local: Int64[np.ndarray, "share"]) -> Iterator[Float32[Tensor, "1 1 M"]]:
            return map(torch.from_numpy, rank_images([model], self._val, local, config))

        samples = evenly_spaced(self._val.num_samples, config.num_images)
        return compute_sharded(
            samples, rank_share, (1, 1, config.bank_size), "images ranked", self._rank_info
        ).cpu().numpy()  # fmt: skip


@torch.no_grad()
def _copy(parameters: Iterable[tuple[str, Tensor]], destination: dict[str, Tensor]) -> None:
    """Copy the predictor's weights into the tensors of the destination."""
    for name, parameter in parameters:
        destination[name.removeprefix(_PREDICTOR)].copy_(parameter)


def _label_samples(train: ShardSet, val: ShardSet) -> LabelledSets | None:
    """Return labelled samples for k-NN and probes; None, with a log line, if some have no label."""
    for name, shards in (("data.train", train), ("data.val", val)):
        if shards.num_unlabelled:
            log.info(
                "evaluations measure neither k-NN nor probes, because %d of %d samples of %s have no class number",
                shards.num_unlabelled, shards.num_samples, name,
            )  # fmt: skip
            return None
    return label_sets(train, val, KNN.data.label, max_train=KNN.max_train_samples, max_val=_MAX_VAL_SAMPLES)
