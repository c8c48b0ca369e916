"""Replaces images that cannot be decoded with other samples of the same global batch.

DALI fails on a complete batch if one of its images is bad, and the decoder of a GPU may accept a truncated file
without an error. Every encoded image is therefore checked before decoding: do its first and last bytes mark the
beginning and the end of its format? This takes microseconds. Only images that fail the check are decoded by Pillow,
which decides whether they are bad. If the DALI graph fails nevertheless, Pillow decodes all images of that batch.
"""

import logging
import math
from dataclasses import replace

import numpy as np
from jaxtyping import UInt8
from PIL import UnidentifiedImageError

from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.sampling.batch_plan import BatchPlan, EvaluationPlan, Request
from iwm_fast.pipelines.storage.reader import Reader
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.torch_renderer import UNDECODABLE, decode_image

log = logging.getLogger(__name__)

EncodedImage = UInt8[np.ndarray, "_"]
_Loaded = tuple[Request, list[EncodedImage]]

_JPEG, _PNG, _WEBP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"
# The type of PNG's last chunk, which is empty, and its checksum.
_PNG_END = b"IEND\xaeB`\x82"
_JPEG_END = b"\xff\xd9"
# Cameras and editors append a few bytes after JPEG's end marker. The value is a choice: an image with a longer tail
# only costs an extra decoding by Pillow.
_JPEG_TAIL = 64


class BadSampleReplacer:
    """Replaces samples that cannot be decoded, logs each of them once, and limits their number."""

    def __init__(self, plan: BatchPlan, shards: ShardSet, reader: Reader, max_bad_samples: float) -> None:
        """Set the limit on different bad samples: a count if it is 1 or more, else a fraction of all samples.

        Raises:
            ValueError: if the limit is negative.
        """
        require(max_bad_samples >= 0, "runtime.max_bad_samples", max_bad_samples, "be at least 0")
        self._plan = plan
        self._shards = shards
        self._reader = reader
        self._max_bad_samples = max_bad_samples
        self._limit = max_bad_samples if max_bad_samples >= 1 else max_bad_samples * shards.num_samples
        self._reason_of: dict[int, str] = {}

    def replace_incomplete(self, request: Request, encoded: list[EncodedImage]) -> _Loaded:
        """Replace the bad samples among those that look incomplete, before a batch is decoded.

        Raises:
            ShardError: with shard and key, if there are too many bad samples or none can replace one.
        """
        # A bad image may look complete. It comes again in every epoch: once known, it is replaced before it is decoded.
        is_known = [int(sample) in self._reason_of for sample in request.samples]
        suspects = [image for image, content in enumerate(encoded) if is_known[image] or not looks_complete(content)]
        return self._replace(request, encoded, suspects) if suspects else (request, encoded)

    def replace_undecodable(self, request: Request, encoded: list[EncodedImage]) -> _Loaded:
        """Decode all images of a batch that could not be rendered, and replace the bad samples.

        Raises:
            ShardError: with shard and key, if there are too many bad samples or none can replace one.
            RuntimeError: if every image can be decoded, so that the batch failed for another reason.
        """
        new_request, images = self._replace(request, encoded, list(range(len(encoded))))
        if new_request is request:
            raise RuntimeError(
                f"a batch of step {request.step} cannot be rendered though each of its images can be decoded; "
                "set runtime.loader=torch to find out whether DALI is the cause"
            )
        return new_request, images

    def _replace(self, request: Request, encoded: list[EncodedImage], suspects: list[int]) -> _Loaded:
        samples, images = request.samples.copy(), list(encoded)
        for image in suspects:
            reason = self._reason(int(samples[image]), images[image])
            if reason:
                samples[image], images[image] = self._substitute(request, image, reason)
        is_same = (samples == request.samples).all()
        return (request, encoded) if is_same else (replace(request, samples=samples), images)

    def _substitute(self, request: Request, image: int, reason: str) -> tuple[int, EncodedImage]:
        """Return number and bytes of the first fallback sample that can be decoded.

        The candidates depend on the global batch alone, so the choice is the same for any number of ranks.
        """
        bad_sample = int(request.samples[image])
        candidates = self._plan.fallback_samples(request, image)
        if len(candidates):
            self._count(bad_sample, reason, request.step)
        for candidate in candidates:
            (content,) = self._reader.read(np.array([candidate]))
            if not self._reason(int(candidate), content):
                return int(candidate), content
        what = f"cannot decode the image, drawn at step {request.step} ({reason}), and no other sample can replace it"
        raise self._error(bad_sample, what, "or write its shard again")

    def _reason(self, sample: int, content: EncodedImage) -> str:
        """Return why an image cannot be decoded; empty if it can."""
        if sample in self._reason_of:
            return self._reason_of[sample]
        try:
            decode_image(content)
        except UnidentifiedImageError:
            # Pillow's message shows the repr of a BytesIO object, which helps no user.
            return f"not an image, begins with {content[:16].tobytes()!r}" if len(content) else "0 bytes"
        except UNDECODABLE as error:
            return str(error) or type(error).__name__
        return ""

    def _count(self, sample: int, reason: str, step: int) -> None:
        """Record a bad sample and log it, unless it is recorded already.

        Raises:
            ShardError: if it exceeds the limit.
        """
        if sample in self._reason_of:
            return
        self._reason_of[sample] = reason
        count = len(self._reason_of)
        if count > self._limit:
            limit = f"runtime.max_bad_samples = {self._max_bad_samples:g} allows {math.floor(self._limit)} per rank"
            what = f"cannot decode the image, drawn at step {step} ({reason}); it is bad sample {count} and {limit}"
            raise self._error(sample, what, "or raise that limit")
        address = self._shards.address(sample)
        if isinstance(self._plan, EvaluationPlan):
            log.warning("cannot decode %s (%s); it is left out, bad samples so far: %d", address, reason, count)
            return
        message = "step %d: cannot decode %s (%s); another sample of the batch replaces it, bad samples so far: %d"
        log.warning(message, step, address, reason, count)

    def _error(self, sample: int, what: str, alternative: str) -> ShardError:
        remedy = f"run `iwm shards check` to find all such samples and leave them out, {alternative}"
        return ShardError(what, **self._shards.shard_and_key(sample), remedy=remedy)


def looks_complete(content: EncodedImage) -> bool:
    """Return whether the bytes begin and end as a JPEG, PNG or WebP file does; False for all other formats."""
    head, tail = content[:12].tobytes(), content[-_JPEG_TAIL:].tobytes()
    if head.startswith(_JPEG):
        return _JPEG_END in tail
    if head.startswith(_PNG):
        return _PNG_END in tail
    if head.startswith(_WEBP):
        # RIFF stores the size of what follows the first 8 bytes.
        return len(content) >= int.from_bytes(head[4:8], "little") + 8
    return False
