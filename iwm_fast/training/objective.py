"""The training loss: distance between predicted and target tokens, and VICReg's terms for the identity predictor."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from iwm_fast.config.run import ObjectiveConfig
from iwm_fast.models.student import Prediction
from iwm_fast.pipelines.batch import RaggedIndex

# VICReg adds this inside the square root, whose gradient is infinite at zero variance.
VARIANCE_EPS = 1e-4


class Objective:
    """Distance between predicted and target tokens, plus VICReg's variance and covariance terms if they have a weight.

    Source: IWM section 3 (distance); VICReg section 4.1 (terms).
    """

    def __init__(self, config: ObjectiveConfig, is_identity: bool) -> None:
        # With the identity predictor, the EMA teacher alone does not prevent the encoder from collapsing.
        defaults = (1.0, 0.04) if is_identity else (0.0, 0.0)
        settings = (config.variance_weight, config.covariance_weight)
        weights = [default if value is None else value for value, default in zip(settings, defaults, strict=True)]
        self.variance_weight: float = weights[0]
        self.covariance_weight: float = weights[1]
        self.distance = F.mse_loss if config.distance == "mse" else F.smooth_l1_loss

    def __call__(
        self, prediction: Prediction, target_tokens: Float[Tensor, "M D"], index: RaggedIndex
    ) -> Float[Tensor, ""]:
        """Return this micro-batch's contribution to the loss; the loss of the global batch is the sum of them.

        Args:
            prediction: output of the student.
            target_tokens: the teacher's tokens at the same patches, without gradient.
            index: patches that the rows belong to; `index.total` is their number in the global batch.
        """
        rows, dim = target_tokens.shape
        loss = self.distance(prediction.predicted_tokens, target_tokens, reduction="sum") / (dim * index.total)
        if self.variance_weight > 0 or self.covariance_weight > 0:
            variance, covariance = vicreg_terms(prediction.context_tokens)
            # These are statistics of a micro-batch, not sums over its rows. Weighted by its share of the rows, they
            # add up to their mean over the global batch.
            share = rows / index.total
            loss = loss + share * (self.variance_weight * variance + self.covariance_weight * covariance)
        return loss


def vicreg_terms(tokens: Float[Tensor, "C D"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return VICReg's variance term (hinge at a standard deviation of 1) and covariance term, in float32.

    Source: VICReg, arXiv 2105.04906, equations 1 to 4.
    """
    rows, dim = tokens.shape
    centred = tokens.float() - tokens.float().mean(0)
    covariance = centred.T @ centred / max(rows - 1, 1)
    variance = covariance.diagonal()
    hinge = F.relu(1 - (variance + VARIANCE_EPS).sqrt()).mean()
    return hinge, (covariance.square().sum() - variance.square().sum()) / dim
