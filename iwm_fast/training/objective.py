"""What is minimised, and the signs that it is being cheated: the loss alone does not show a collapse."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from iwm_fast.config.run import ObjectiveConfig
from iwm_fast.models.student import Prediction
from iwm_fast.pipelines.batch import RaggedIndex

# VICReg's floor inside the square root, against the infinite slope at zero variance
VARIANCE_EPS = 1e-4


class Objective:
    """Distance of predicted from target tokens; for the identity predictor also VICReg's two terms.

    Source: IWM section 3 (distance); VICReg section 4.1 (terms).
    """

    def __init__(self, config: ObjectiveConfig, is_identity: bool) -> None:
        # without a predictor the EMA teacher alone does not keep the encoder from collapsing
        defaults = (1.0, 0.04) if is_identity else (0.0, 0.0)
        given = (config.variance_weight, config.covariance_weight)
        weights = [default if value is None else value for value, default in zip(given, defaults, strict=True)]
        self.variance_weight, self.covariance_weight = weights
        self.distance = F.mse_loss if config.distance == "mse" else F.smooth_l1_loss

    def __call__(
        self, prediction: Prediction, target_tokens: Float[Tensor, "M D"], index: RaggedIndex
    ) -> Float[Tensor, ""]:
        """Return this micro-batch's part of the loss; the parts of a global batch simply add up.

        Args:
            prediction: of the student.
            target_tokens: the teacher's at the same patches, without gradient.
            index: the patches of these rows; `index.total` counts those of the whole global batch.
        """
        rows, dim = target_tokens.shape
        loss = self.distance(prediction.predicted_tokens, target_tokens, reduction="sum") / (dim * index.total)
        if self.variance_weight > 0 or self.covariance_weight > 0:
            variance, covariance = spread_terms(prediction.context_tokens)
            # statistics of a micro-batch do not add up like sums; its share of the rows makes their mean
            share = rows / index.total
            loss = loss + share * (self.variance_weight * variance + self.covariance_weight * covariance)
        return loss


def spread_terms(tokens: Float[Tensor, "C D"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return VICReg's variance term (hinge at a standard deviation of one) and covariance term, in float32."""
    rows, dim = tokens.shape
    centred = tokens.float() - tokens.float().mean(0)
    covariance = centred.T @ centred / max(rows - 1, 1)
    variance = covariance.diagonal()
    hinge = F.relu(1 - (variance + VARIANCE_EPS).sqrt()).mean()
    return hinge, (covariance.square().sum() - variance.square().sum()) / dim
