"""Images that cannot be decoded: found before or behind the decoder, replaced by others of the same global batch.

DALI gives up a whole batch for one bad image, and a GPU's decoder may take a file that was cut off for whole. So every
encoded image is looked at first: does it end as its format says? That costs microseconds. Only what does not is
decoded by Pillow, which decides. What still makes the graph fail is found the same way afterwards.
"""

import logging
import math
from dataclasses import replace

import numpy as np
from jaxtyping import UInt8
from PIL import UnidentifiedImageError

from iwm_fast.pipelines.config import check
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.sampling.batch_plan import BatchPlan, Request
from iwm_fast.pipelines.storage.reader import Reader
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.torch_renderer import UNDECODABLE, decode_image

log = logging.getLogger(__name__)

Encoded = UInt8[np.ndarray, "_"]

_JPEG, _PNG, _WEBP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"
# the last chunk and its checksum
_PNG_END = b"IEND\xaeB`\x82"
# cameras and editors write a little behind the end of a JPEG
_JPEG_TAIL = 64


class BadSampleReplacer:
    """Puts other samples in the place of those that cannot be decoded, and counts them."""

    def __init__(self, plan: BatchPlan, shards: ShardSet, reader: Reader, most: float) -> None:
        """Take how many different bad samples are accepted: a count from 1 on, a share of the samples below 1.

        Raises:
            ValueError: if it is negative.
        """
        check(most >= 0, "runtime.max_bad_samples", most, "be at least 0")
        self._plan, self._shards, self._reader = plan, shards, reader
        self._setting, self._most = most, most if most >= 1 else most * shards.num_samples
        self._reason_of: dict[int, str] = {}

    def screen(self, request: Request, encoded: list[Encoded]) -> tuple[Request, list[Encoded]]:
        """Return request and images without those that are visibly cut off, or no image at all.

        Raises:
            ShardError: with shard and key, if too many samples are bad or nothing can stand in for one.
        """
        is_known = [int(sample) in self._reason_of for sample in request.samples]
        suspects = [image for image, content in enumerate(encoded) if is_known[image] or not looks_complete(content)]
        return self._replace(request, encoded, suspects) if suspects else (request, encoded)

    def search(self, request: Request, encoded: list[Encoded]) -> tuple[Request, list[Encoded]]:
        """Do the same by decoding every image, for a batch that could not be rendered.

        Raises:
            ShardError: as `screen`.
            RuntimeError: if every image can be decoded, so that something else is wrong.
        """
        found, images = self._replace(request, encoded, list(range(len(encoded))))
        if found is request:
            raise RuntimeError(
                f"a batch of step {request.step} cannot be rendered though each of its images can be decoded; "
                "runtime.loader=torch shows whether it is the graph"
            )
        return found, images

    def _replace(self, request: Request, encoded: list[Encoded], suspects: list[int]) -> tuple[Request, list[Encoded]]:
        samples, images = request.samples.copy(), list(encoded)
        for image in suspects:
            reason = self._reason(int(samples[image]), images[image])
            if reason:
                samples[image], images[image] = self._substitute(request, image, reason)
        is_same = (samples == request.samples).all()
        return (request, encoded) if is_same else (replace(request, samples=samples), images)

    def _substitute(self, request: Request, image: int, reason: str) -> tuple[int, Encoded]:
        bad = int(request.samples[image])
        candidates = self._plan.fallback_samples(request, image)
        if len(candidates):
            self._count(bad, reason, request.step)
        for sample in candidates:
            (content,) = self._reader.read(np.array([sample]))
            if not self._reason(int(sample), content):
                return int(sample), content
        what = f"cannot decode the image, drawn at step {request.step} ({reason}), and none may stand in for it"
        raise self._error(bad, what, "or write it again")

    def _reason(self, sample: int, content: Encoded) -> str:
        """Return why an image cannot be decoded, empty if it can."""
        if sample in self._reason_of:
            return self._reason_of[sample]
        try:
            decode_image(content)
        except UnidentifiedImageError:
            # its own message names a Python object
            return f"no image, begins with {content[:16].tobytes()!r}" if len(content) else "0 bytes"
        except UNDECODABLE as error:
            return str(error) or type(error).__name__
        return ""

    def _count(self, sample: int, reason: str, step: int) -> None:
        """Remember a bad sample, and say so the first time."""
        if sample in self._reason_of:
            return
        self._reason_of[sample] = reason
        count = len(self._reason_of)
        if count > self._most:
            limit = f"runtime.max_bad_samples = {self._setting:g} allows {math.floor(self._most)} per rank"
            what = f"cannot decode the image, drawn at step {step} ({reason}); it is bad sample {count} and {limit}"
            raise self._error(sample, what, "or raise that limit")
        log.warning(
            "step %d: cannot decode %s (%s); another sample of the batch stands in for it, bad samples so far: %d",
            step, self._shards.address(sample), reason, count,
        )  # fmt: skip

    def _error(self, sample: int, what: str, also: str) -> ShardError:
        remedy = f"let `iwm shards check` find all such samples and leave them out, {also}"
        return ShardError(what, **self._shards.where(sample), remedy=remedy)


def looks_complete(content: Encoded) -> bool:
    """Return whether the bytes begin and end as a JPEG, PNG or WebP does; other formats have no end to look for."""
    head, tail = content[:12].tobytes(), content[-_JPEG_TAIL:].tobytes()
    if head.startswith(_JPEG):
        return b"\xff\xd9" in tail
    if head.startswith(_PNG):
        return _PNG_END in tail
    if head.startswith(_WEBP):
        return len(content) >= int.from_bytes(head[4:8], "little") + 8
    return False
