"""Predictors of known quality, to be put into a world model in place of a trained one."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from iwm_fast.world_model import WorldModel
from pipelines.actions import JITTER, action_difference, neutral_photometry
from pipelines.batch import normalize_view
from pipelines.views import render

FLAGS = ("grayscale", "blur", "solarize")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A source image, what it was before it was destroyed, and how it was."""

    source: torch.Tensor
    clean: torch.Tensor
    flags: tuple[str, ...] = ()


class Exact(nn.Module):
    """Recognises a source by its tokens, makes of the clean image what the action says, and encodes that.

    Each flag of the action that is not what the source has suffered adds 1 to all tokens.
    """

    def __init__(self, model: WorldModel, pairs: list[Pair]) -> None:
        super().__init__()
        self.model, self.pairs = model, pairs
        self.tokens = [model.encode(normalize_view(pair.source[None]))[0] for pair in pairs]

    def forward(self, context_tokens, action, context, target):
        first = context_tokens[: len(context_tokens) // len(action)]
        pair = self.pairs[int(torch.stack([(first - known).abs().max() for known in self.tokens]).argmin())]
        views = self.model.config.views
        change = action_difference(action.numpy(), views)
        neutral = neutral_photometry(len(action))
        jitter = {name: getattr(neutral, name) + change[name] for name in JITTER if name in change}
        images = render(pair.clean[None].expand(len(action), -1, -1, -1), replace(neutral, **jitter))
        told = {name: torch.from_numpy(change[name] > 0.5) for name in FLAGS if name in change}
        num_wrong = torch.stack([flag != (name in pair.flags) for name, flag in told.items()]).sum(dim=0)
        return (self.model.targets(normalize_view(images)) + num_wrong[:, None, None]).flatten(0, 1)


class Deaf(nn.Module):
    """Predicts the source itself, whatever the action says."""

    def forward(self, context_tokens, action, context, target):
        return context_tokens


def exact(model: WorldModel, *pairs: Pair) -> WorldModel:
    return replace(model, predictor=Exact(model, list(pairs)))


def deaf(model: WorldModel) -> WorldModel:
    return replace(model, predictor=Deaf())
