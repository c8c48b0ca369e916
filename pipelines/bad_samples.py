"""Replaces images that cannot be decoded with other samples of the same global batch.

Whether an image is bad does not depend on the loader: it is bad if `probe` refuses its header or Pillow cannot decode
its pixels (`iwm_fast.pipelines.transforms.image_decoding`). The loader prepares images as they are read, and an image
that it cannot prepare arrives here as the error.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import UInt8

from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.errors import ShardError, UndecodableImageError
from iwm_fast.pipelines.sampling.batch_plan import BatchPlan, EvaluationPlan, Request
from iwm_fast.pipelines.storage.reader import Prepare, Reader
from iwm_fast.pipelines.storage.shard_set import ShardSet

log = logging.getLogger(__name__)

# With a share as the limit, a rank accepts as many, or that share of all samples if that is less: the share of the few
# images that one of many ranks draws would be exceeded by chance.
_MIN_LIMIT = 10


def error_as_value(prepare: Callable[[UInt8[np.ndarray, "_"]], Any]) -> Prepare:
    """Return a function that prepares an image and returns the error if it is undecodable.

    A reader's request fails as a whole if one of its threads raises.
    """

    def attempt(encoded: UInt8[np.ndarray, "_"]) -> Any:
        try:
            return prepare(encoded)
        except UndecodableImageError as error:
            return error

    return attempt


class BadSampleReplacer:
    """Replaces samples that cannot be decoded, logs each of them once, and limits their number."""

    def __init__(
        self, plan: BatchPlan, shards: ShardSet, reader: Reader, max_bad_samples: float, prepare_candidate: Prepare
    ) -> None:
        """Set the limit on different bad samples: a count if it is 1 or more, else a fraction of the images drawn.

        The fraction is of the images that this rank draws in an epoch, or has drawn so far if these are more.

        `prepare_candidate` prepares a sample that is to replace a bad one. It must decode the image, or return the
        error.

        Raises:
            ValueError: if the limit is negative.
        """
        require(max_bad_samples >= 0, "runtime.max_bad_samples", max_bad_samples, "be at least 0")
        self._plan = plan
        self._shards = shards
        self._reader = reader
        self._max_bad_samples = max_bad_samples
        self._prepare_candidate = prepare_candidate
        self._reason_of: dict[int, str] = {}
        # Candidates that could not be decoded. They count only once they are drawn themselves.
        self._failed_candidates: set[int] = set()
        self._num_drawn = 0

    def replace(self, request: Request, images: list[Any]) -> tuple[Request, list[Any]]:
        """Replace the samples whose prepared image is an error, and those that were found to be bad before.

        Raises:
            ShardError: with shard and key, if there are too many bad samples or none can replace one.
        """
        self._num_drawn += len(images)
        # A bad image may have a good header. It comes again in every epoch, and is replaced before it is decoded.
        bad = [
            image
            for image, prepared in enumerate(images)
            if isinstance(prepared, UndecodableImageError) or int(request.samples[image]) in self._reason_of
        ]
        if not bad:
            return request, images
        samples, images = request.samples.copy(), list(images)
        for image in bad:
            samples[image], images[image] = self._substitute(request, image, images[image])
        return replace(request, samples=samples), images

    def _substitute(self, request: Request, image: int, problem: Any) -> tuple[int, Any]:
        """Return the number of the first fallback sample that can be decoded, and its prepared image.

        The candidates depend on the global batch alone, so the choice is the same for any number of ranks.
        """
        bad_sample = int(request.samples[image])
        reason = self._reason_of.get(bad_sample) or str(problem)
        candidates = self._plan.fallback_samples(request, image)
        if len(candidates):
            self._count(bad_sample, reason, request.step)
        for candidate in candidates:
            if int(candidate) in self._reason_of or int(candidate) in self._failed_candidates:
                continue
            (prepared,) = self._reader.read(np.array([candidate]), self._prepare_candidate)
            if not isinstance(prepared, UndecodableImageError):
                return int(candidate), prepared
            self._failed_candidates.add(int(candidate))
        what = f"cannot decode the image, drawn at step {request.step} ({reason}), and no other sample can replace it"
        raise self._error(bad_sample, what, "or write its shard again")

    def _count(self, sample: int, reason: str, step: int) -> None:
        """Record a bad sample and log it, unless it is recorded already.

        Raises:
            ShardError: if it exceeds the limit.
        """
        if sample in self._reason_of:
            return
        self._reason_of[sample] = reason
        count, allowed = len(self._reason_of), self._limit()
        if count > allowed:
            limit = f"runtime.max_bad_samples = {self._max_bad_samples:g} allows {math.floor(allowed)} per rank"
            what = f"cannot decode the image, drawn at step {step} ({reason}); it is bad sample {count} and {limit}"
            raise self._error(sample, what, "or raise that limit")
        address = self._shards.address(sample)
        if isinstance(self._plan, EvaluationPlan):
            log.warning("cannot decode %s (%s); it is left out, bad samples so far: %d", address, reason, count)
            return
        message = "step %d: cannot decode %s (%s); another sample of the batch replaces it, bad samples so far: %d"
        log.warning(message, step, address, reason, count)

    def _limit(self) -> float:
        """Return the largest number of different bad samples that this rank may have drawn by now."""
        if self._max_bad_samples >= 1:
            return self._max_bad_samples
        num_samples = self._shards.num_samples
        # Samples are reassigned to ranks in each epoch, so over many epochs every rank draws all bad samples.
        num_drawn = max(self._num_drawn, num_samples / self._plan.world_size)
        return min(max(self._max_bad_samples * num_drawn, _MIN_LIMIT), self._max_bad_samples * num_samples)

    def _error(self, sample: int, what: str, alternative: str) -> ShardError:
        remedy = f"run `iwm shards check` to find all such samples and leave them out, {alternative}"
        return ShardError(what, **self._shards.shard_and_key(sample), remedy=remedy)
