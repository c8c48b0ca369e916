"""The images that pictures show: colourful and different ones, so that changes of colour are visible."""

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from iwm_fast.evals.datasets import clean_images, evenly_spaced, require_readable
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.world_model import WorldModel

# This many images are looked at for each one to choose.
_CANDIDATES_PER_IMAGE = 16


def choose_shown(model: WorldModel, shards: ShardSet, count: int) -> Int64[np.ndarray, "images"]:
    """Return the sorted numbers of `count` samples that are colourful and differ from each other.

    The choice depends on colours and on the encoder's features, not on what the model predicts. Candidates are evenly
    spaced over the shards.

    Raises:
        ShardError: if a candidate cannot be decoded.
    """
    samples = evenly_spaced(shards.num_samples, _CANDIDATES_PER_IMAGE * count)
    require_readable((shards, samples))
    if len(samples) <= count:
        return samples
    measured = [(colourfulness(pixels), _feature(pixels, model)) for pixels, _ in clean_images(model, shards, samples)]
    colours, features = (np.stack(values) for values in zip(*measured, strict=True))
    # The most colourful image first, then always a colourful one that is unlike those that are chosen.
    chosen, distance = [int(colours.argmax())], np.full(len(samples), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, 1 - features @ features[chosen[-1]])
        score = colours * distance
        score[chosen] = -1
        chosen.append(int(score.argmax()))
    return np.sort(samples[chosen])


def colourfulness(image: UInt8[Tensor, "H W 3"]) -> float:
    """Return how colourful an image is: 0 for grey, above 80 for several saturated colours.

    Source: Hasler and Suesstrunk 2003, "Measuring colourfulness in natural images".
    """
    red, green, blue = image.double().unbind(dim=-1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue]).flatten(1)
    spread, mean = opponents.std(dim=1, correction=0).norm(), opponents.mean(dim=1).norm()
    return float(spread + 0.3 * mean)


def _feature(image: UInt8[Tensor, "H W 3"], model: WorldModel) -> Float32[np.ndarray, "D"]:
    view = normalize_view(image[None].to(model.device), model.config.data.normalization)
    return functional.normalize(model.encode(view).mean(dim=1), dim=1)[0].cpu().numpy()
