"""Signs that the loss is being cheated: it alone does not show a collapse of the representation."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from iwm_fast.pipelines.batch import RaggedIndex

# with fewer images, statistics between images say nothing: their rank is at most their number
MIN_IMAGES = 8

# Accepted values. They lie between what was seen in trials at 64 images and 64 patches (encoder 4 x 192): untrained and
# healthily trained std 0.54-0.89, cosine 0.08-0.88, rank 5.4-8.1; collapsed (lr 1e-2, no EMA) std 0.045-0.069, cosine
# 0.9955-0.998, rank 1.6-1.8. A constant prediction has a loss_over_mean of 1; a fresh predictor stood at 2.4 and was
# below 1 within 30 steps.
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
    """Measure on the device how much the target tokens still say.

    Those between images are left out for fewer than 8 images. Call it for logged steps only: the singular values of
    a (B, D) matrix cost time, and on a GPU torch waits for the device to check them.

    Returns:
        Scalars: `monitor/target_std`, standard deviation over tokens, mean over dimensions (0 constant, 1 at most);
        `monitor/loss_over_mean`, squared error over that of predicting the batch's mean token;
        `monitor/cosine`, between the mean tokens of different images, mean over pairs;
        `monitor/rank_me`, effective number of dimensions the images' mean tokens use.

    Source: RankMe, arXiv 2210.02885, equation 1 (rank_me).
    """
    predicted, target = predicted_tokens.detach().float(), target_tokens.float()
    spread = target - target.mean(0)
    error = (predicted - target).square().sum() / spread.square().sum().clamp(min=1e-12)
    monitors = {"target_std": spread.square().mean(0).sqrt().mean(), "loss_over_mean": error}
    if index.offsets.numel() - 1 >= MIN_IMAGES:
        pooled = _pool(target, index)
        monitors |= {"cosine": _mean_cosine(pooled), "rank_me": _rank_me(pooled)}
    return {f"monitor/{name}": value for name, value in monitors.items()}


def _pool(tokens: Float[Tensor, "M D"], index: RaggedIndex) -> Float[Tensor, "B D"]:
    counts = index.offsets.diff()
    image = torch.arange(counts.numel(), device=tokens.device)
    image = torch.repeat_interleave(image, counts, output_size=tokens.shape[0])
    sums = tokens.new_zeros(counts.numel(), tokens.shape[1]).index_add_(0, image, tokens)
    return sums / counts.clamp(min=1)[:, None]


def _mean_cosine(pooled: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    # the sum of all pairs' products is the square of the sum; the diagonal is taken off
    unit = F.normalize(pooled, dim=1)
    images = unit.shape[0]
    return (unit.sum(0).square().sum() - unit.square().sum()) / (images * (images - 1))


def _rank_me(pooled: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    values = torch.linalg.svdvals(pooled)
    share = values / values.sum().clamp(min=1e-12)
    return torch.special.entr(share).sum().exp()


def collapse_warnings(values: dict[str, float]) -> list[str]:
    """Say in sentences which collapse monitors look bad; a name that is missing is not judged."""
    remedy = "lower optim.lr or raise optim.teacher_momentum"
    signs = {
        "target_std": f"target tokens hardly differ from each other, the encoder is collapsing: {remedy}",
        "cosine": f"images can hardly be told apart, the encoder is collapsing, perhaps to positions only: {remedy}",
        "rank_me": f"images differ in hardly more than one direction, the encoder is collapsing: {remedy}",
        "loss_over_mean": "a constant would predict better; normal in the first steps, later lower optim.lr",
    }
    found = []
    for name, sentence in signs.items():
        value, (lowest, highest) = values.get(f"monitor/{name}"), LIMITS[name]
        if value is not None and not lowest <= value <= highest:
            found.append(f"monitor/{name} is {value:.4g}, outside [{lowest:g}, {highest:g}]: {sentence}")
    return found
