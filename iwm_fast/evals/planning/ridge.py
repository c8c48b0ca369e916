"""Ridge regression with penalties chosen on a held-out part: what frozen features alone can tell."""

import torch
from jaxtyping import Float
from torch import Tensor

PENALTIES = tuple(10.0**power for power in range(-4, 6))
# every fifth example
_HELD_OUT = 5


def ridge(
    features: Float[Tensor, "train F"], answers: Float[Tensor, "train K"], asked: Float[Tensor, "val F"]
) -> Float[Tensor, "val K"]:
    """Return the answers for `asked`, after learning from the others; each answer has a penalty of its own.

    Features are standardised by the training examples. Penalties are relative to the number of examples. The one that
    is best on every fifth training example is used to learn from all of them.
    """
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0).clamp_min(1e-6)
    known, asked = (((part - mean) / std).double() for part in (features, asked))
    answers = answers.double()
    is_held = torch.arange(len(known), device=known.device) % _HELD_OUT == 0
    tried = _fit(known[~is_held], answers[~is_held], known[is_held])
    error = (tried - answers[is_held]).square().mean(dim=1)
    chosen = error.argmin(dim=0)
    return _fit(known, answers, asked)[chosen, :, torch.arange(answers.shape[1])].T.float()


def _fit(
    known: Float[Tensor, "examples F"], answers: Float[Tensor, "examples K"], asked: Float[Tensor, "others F"]
) -> Float[Tensor, "penalties others K"]:
    """Return the answers by each penalty."""
    centre, offset = known.mean(dim=0), answers.mean(dim=0)
    inner = (known - centre).T @ (known - centre) / len(known)
    outer = (known - centre).T @ (answers - offset) / len(known)
    values, vectors = torch.linalg.eigh(inner)
    turned = (asked - centre) @ vectors
    return torch.stack(
        [turned @ ((vectors.T @ outer) / (values.clamp_min(0) + penalty)[:, None]) + offset for penalty in PENALTIES]
    )
