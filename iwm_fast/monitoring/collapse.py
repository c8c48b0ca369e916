"""Monitors of representation collapse, in which the loss decreases although the targets become constant."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from iwm_fast.monitoring.effective_rank import rank_me
from iwm_fast.pipelines.batch import RaggedIndex

# With fewer images, statistics between images mean little; the effective rank, for example, is at most their number.
MIN_IMAGES = 8

# Accepted ranges. The limits lie between the values of trials with 64 images of 64 patches (encoder of depth 4, width
# 192). Untrained and healthily trained: std 0.54-0.89, cosine 0.08-0.88, rank 5.4-8.1. Collapsed (lr 1e-2, no EMA): std
# 0.045-0.069, cosine 0.9955-0.998, rank 1.6-1.8. Predicting the mean token gives a loss_over_mean of 1; a fresh
# predictor started at 2.4 and fell below 1 within 30 steps.
LIMITS = {
    "target_std": (0.1, float("inf")),
    "cosine": (-1.0, 0.99),
    "rank_me": (2.0, float("inf")),
    "loss_over_mean": (0.0, 1.2),
}


@torch.no_grad()
def collapse_monitors(
    predicted_tokens: Float[Tensor, "M D"], target_tokens: Float[Tensor, "M D"], index: RaggedIndex
) -> dict[str, Tensor]:
    """Measure on the device how much information the target tokens carry.

    Call it for logged steps only: the singular values of a (B, D) matrix take time, and on a GPU PyTorch synchronises
    to check that they converged.

    Args:
        predicted_tokens: output of the predictor.
        target_tokens: the teacher's layer-normalised tokens at the same patches.
        index: patches that the rows belong to, image by image.

    Returns:
        Scalars by metric name. `monitor/target_std`: standard deviation over tokens, mean over dimensions, from 0
        (constant tokens) to 1. `monitor/loss_over_mean`: squared error divided by that of predicting the mean token.
        With at least 8 images also `monitor/cosine`: cosine similarity between the mean tokens of two images, mean over
        pairs; and `monitor/rank_me`: effective number of dimensions that the mean tokens of the images span. NaN where
        tokens are not finite.

    Source: RankMe, arXiv 2210.02885, equation 1 (rank_me).
    """
    predicted, target = predicted_tokens.detach().float(), target_tokens.float()
    centred = target - target.mean(0)
    error = (predicted - target).square().sum() / centred.square().sum().clamp(min=1e-12)
    monitors = {"target_std": centred.square().mean(0).sqrt().mean(), "loss_over_mean": error}
    if index.offsets.numel() - 1 >= MIN_IMAGES:
        pooled = _mean_by_image(target, index)
        monitors |= {"cosine": _mean_cosine(pooled), "rank_me": rank_me(pooled)}
    return {f"monitor/{name}": value for name, value in monitors.items()}


def _mean_by_image(tokens: Float[Tensor, "M D"], index: RaggedIndex) -> Float[Tensor, "B D"]:
    counts = index.offsets.diff()
    image = torch.arange(counts.numel(), device=tokens.device)
    # Without output_size, a GPU would have to be waited for to learn the number of rows.
    image = torch.repeat_interleave(image, counts, output_size=tokens.shape[0])
    sums = tokens.new_zeros(counts.numel(), tokens.shape[1]).index_add_(0, image, tokens)
    return sums / counts.clamp(min=1)[:, None]


def _mean_cosine(pooled: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    # The products of all pairs add up to the square of the sum; the products of images with themselves are subtracted.
    unit = F.normalize(pooled, dim=1)
    num_images = unit.shape[0]
    return (unit.sum(0).square().sum() - unit.square().sum()) / (num_images * (num_images - 1))


def collapse_warnings(values: dict[str, float]) -> list[str]:
    """Return a sentence for each collapse monitor among `values` that is outside its accepted range; NaN is neither."""
    remedy = "lower optim.lr or raise optim.teacher_momentum (resume=adjust)"
    meanings = {
        "target_std": f"target tokens hardly differ from each other, the encoder is collapsing: {remedy}",
        "cosine": f"images hardly differ, the encoder is collapsing, perhaps to tokens of the position only: {remedy}",
        "rank_me": f"images differ in hardly more than one direction, the encoder is collapsing: {remedy}",
        "loss_over_mean": "the mean token would be a better prediction; normal at first, later lower optim.lr",
    }
    warnings = []
    for name, meaning in meanings.items():
        value, (low, high) = values.get(f"monitor/{name}"), LIMITS[name]
        if value is not None and (value < low or value > high):
            warnings.append(f"monitor/{name} is {value:.4g}, outside [{low:g}, {high:g}]: {meaning}")
    return warnings
