"""The training loss: distance between predicted and target tokens, and VICReg's terms for the identity predictor."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from iwm_fast.config.run import ObjectiveConfig
from iwm_fast.models.student import Prediction
from iwm_fast.pipelines.batch import RaggedIndex
from iwm_fast.runtime import distributed

# VICReg adds this inside the square root, whose gradient is infinite at zero variance.
VARIANCE_EPS = 1e-4


class Objective:
    """Distance between predicted and target tokens, plus VICReg's variance and covariance terms if they have a weight.

    Source: IWM (distance); VICReg section 4.1 (terms).
    """

    def __init__(self, config: ObjectiveConfig, is_identity: bool) -> None:
        self.variance_weight: float
        self.covariance_weight: float
        self.variance_weight, self.covariance_weight = config.vicreg_weights(is_identity=is_identity)
        self.distance = F.mse_loss if config.distance == "mse" else F.smooth_l1_loss

    def __call__(
        self, prediction: Prediction, target_tokens: Float[Tensor, "M D"], index: RaggedIndex
    ) -> Float[Tensor, ""]:
        """Return this micro-batch's contribution to the loss; the loss of the global batch is the sum of them.

        Collective if VICReg's terms have a weight, and then the backward pass is, too.

        Args:
            prediction: output of the student.
            target_tokens: the teacher's tokens at the same patches, without gradient.
            index: patches that the rows belong to; `index.total` is their number in the global batch.
        """
        rows, dim = target_tokens.shape
        loss = self.distance(prediction.predicted_tokens, target_tokens, reduction="sum") / (dim * index.total)
        if self.variance_weight > 0 or self.covariance_weight > 0:
            variance, covariance = vicreg_terms(prediction.context_tokens)
            # These are statistics of the micro-batches of all ranks, not sums over rows. Weighted by the share of the
            # rows, they add up to their mean over the forward passes of the global batch.
            share = rows / index.total
            loss = loss + share * (self.variance_weight * variance + self.covariance_weight * covariance)
        return loss


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks, with the gradients of the losses of all ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return distributed.sum_over_ranks(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Engines sum the gradients of parameters, so the losses of the ranks are summed, too.
        return distributed.sum_over_ranks(gradient)


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    total = _SumOverRanks.apply(tensor)
    assert isinstance(total, Tensor)
    return total


def vicreg_terms(tokens: Float[Tensor, "C D"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return VICReg's variance term (hinge at a standard deviation of 1) and covariance term, in float32.

    They are statistics of the tokens of all ranks. Collective, and the backward pass as well: every rank must call it.

    Source: VICReg, arXiv 2105.04906, equations 1 to 4.
    """
    rows, dim = tokens.shape
    tokens = tokens.float()
    sums = _sum_over_ranks(torch.cat([tokens.sum(0), tokens.new_tensor([float(rows)])]))
    count = sums[-1]
    # Centred before the products are summed: their difference from the product of the means would lose digits.
    centred = tokens - sums[:-1] / count.clamp(min=1)
    covariance = _sum_over_ranks(centred.T @ centred) / (count - 1).clamp(min=1)
    variance = covariance.diagonal()
    hinge = F.relu(1 - (variance + VARIANCE_EPS).sqrt()).mean()
    return hinge, (covariance.square().sum() - variance.square().sum()) / dim
