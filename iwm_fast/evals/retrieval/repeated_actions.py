"""Several actions in a row: how predicted tokens are fed back into the predictor."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from iwm_fast.evals.retrieval.bank import max_sequences_per_forward
from iwm_fast.world_model import WorldModel


def roll_out(
    model: WorldModel, tokens: Float[Tensor, "1 N D"], action: Float[Tensor, "M A"], num_actions: int, *, readout: str
) -> Float[Tensor, "M N D"]:
    """Return the target tokens predicted after `num_actions` equal actions in a row, whose sum is `action`.

    Args:
        model: its predictor is applied `num_actions` times.
        tokens: the encoder's tokens of the source image.
        action: M actions, each of which starts from the source.
        num_actions: number of equal parts that each action is divided into.
        readout: as in `WorldModel.predict`; it is applied after each part.
    """
    return torch.cat([
        list(iterate_actions(model, tokens, part, num_actions, readout=readout))[-1]
        for part in (action / num_actions).split(max_sequences_per_forward(model))
    ])  # fmt: skip


def iterate_actions(
    model: WorldModel, tokens: Float[Tensor, "1 N D"], part: Float[Tensor, "M A"], num_actions: int, *, readout: str
) -> Iterator[Float[Tensor, "M N D"]]:
    """Yield the predicted target tokens after applying `part` once, twice, and so on up to `num_actions` times.

    Arguments are as in `roll_out`, but `part` is one of the equal parts of each action.
    """
    # Target tokens have lost the mean and the spread that the encoder gives to its tokens, which the predictor expects.
    # Those of the source at the same position replace them.
    mean, std = tokens.mean(dim=-1, keepdim=True), tokens.std(dim=-1, correction=0, keepdim=True)
    for _ in range(num_actions):
        predicted = model.predict_from(tokens, part, readout=readout)
        yield predicted
        tokens = mean + std * predicted
