"""Ridge regression with penalties chosen on held-out examples, a baseline that uses frozen features only."""

import torch
from jaxtyping import Float
from torch import Tensor

PENALTIES = tuple(10.0**power for power in range(-4, 6))
# Every fifth training example chooses the penalty.
_HOLD_OUT_EVERY = 5


def ridge(
    features: Float[Tensor, "train F"], targets: Float[Tensor, "train K"], queries: Float[Tensor, "val F"]
) -> Float[Tensor, "val K"]:
    """Return the predictions for the queries; each of the K targets has its own penalty.

    Features are standardised by the training examples, and penalties are relative to the number of examples. The best
    penalty on every fifth training example is used to learn from all of them.
    """
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0).clamp_min(1e-6)
    features, queries = (((rows - mean) / std).double() for rows in (features, queries))
    targets = targets.double()
    is_held_out = torch.arange(len(features), device=features.device) % _HOLD_OUT_EVERY == 0
    predicted = _fit(features[~is_held_out], targets[~is_held_out], features[is_held_out])
    best = (predicted - targets[is_held_out]).square().mean(dim=1).argmin(dim=0)
    return _fit(features, targets, queries)[best, :, torch.arange(targets.shape[1])].T.float()


def _fit(
    features: Float[Tensor, "examples F"], targets: Float[Tensor, "examples K"], queries: Float[Tensor, "queries F"]
) -> Float[Tensor, "penalties queries K"]:
    """Return the predictions for the queries with each penalty."""
    centre, offset = features.mean(dim=0), targets.mean(dim=0)
    centred = features - centre
    # One eigendecomposition serves all penalties, because a penalty only shifts the eigenvalues.
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(features))
    rotated, cross = (queries - centre) @ vectors, vectors.T @ (centred.T @ (targets - offset) / len(features))
    return torch.stack([rotated @ (cross / (values.clamp_min(0) + penalty)[:, None]) + offset for penalty in PENALTIES])
