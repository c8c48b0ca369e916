"""The images that pictures show: colourful and different ones, so that changes of colour are visible."""

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from iwm_fast.evals.datasets import clean_images, evenly_spaced, require_readable
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.world_model import WorldModel

# This many images are looked at for each one to choose. The more colourful half of them is eligible.
_CANDIDATES_PER_IMAGE = 16
_THUMBNAIL = 4


def choose_shown(model: WorldModel, shards: ShardSet, count: int) -> Int64[np.ndarray, "images"]:
    """Return the numbers of `count` samples that are colourful and differ from each other, in order.

    The choice depends on pixels only, not on what the model predicts. Candidates are evenly spaced over the shards.

    Raises:
        ShardError: if a candidate cannot be decoded.
    """
    samples = evenly_spaced(shards.num_samples, _CANDIDATES_PER_IMAGE * count)
    require_readable((shards, samples))
    if len(samples) <= count:
        return samples
    images = [pixels for pixels, _ in clean_images(model, shards, samples)]
    spread = np.array([float((image.amax(-1) - image.amin(-1)).float().mean()) for image in images])
    eligible = np.argsort(-spread, kind="stable")[: max(count, len(samples) // 2)]
    thumbnails = np.stack([_thumbnail(images[index]) for index in eligible])
    # The most colourful image first, then always the one that is least like those that are chosen.
    chosen, distance = [0], np.full(len(eligible), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, np.square(thumbnails - thumbnails[chosen[-1]]).sum(axis=1))
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
    return np.sort(samples[eligible[chosen]])


def _thumbnail(image: UInt8[Tensor, "H W 3"]) -> Float32[np.ndarray, "colours"]:
    small = functional.adaptive_avg_pool2d(image.permute(2, 0, 1).float(), _THUMBNAIL)
    return small.flatten().cpu().numpy()
