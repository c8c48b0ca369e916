"""Heads on frozen or finetuned tokens: linear on the mean, attentive, linear per patch."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwm_fast.models.layers import NORM_EPS, Mlp

_HEAD_DIM = 64


class LinearHead(nn.Module):
    """A linear classifier on the mean over patches."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B K"]:
        """Return one score for each class."""
        return self.linear(tokens.mean(dim=1))


class PatchHead(nn.Module):
    """A linear classifier of each patch, for dense tasks."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N K"]:
        """Return one score for each patch and class."""
        return self.linear(tokens)


class AttentiveHead(nn.Module):
    """One learned query looks at all tokens, then an MLP and a linear classifier.

    As the query is the same for all images, keys and values of single tokens are never made: the query goes through the
    keys' matrix instead, and the mean that each head of attention takes of the tokens goes through the values'. That is
    the same function for 2 D numbers of work a token instead of 2 D^2. Keys have no bias: one number added to all
    scores of a softmax changes nothing.

    Source: V-JEPA's attentive pooler (query not normalised, tokens are). Its public code makes an output projection
    behind the attention and never applies it; here there is none to forget.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.num_heads = max(dim // _HEAD_DIM, 1) if dim % _HEAD_DIM == 0 else 1
        self.query = nn.Parameter(torch.zeros(dim))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.to_query = nn.Linear(dim, dim)
        self.to_key = nn.Linear(dim, dim, bias=False)
        self.to_value = nn.Linear(dim, dim)
        self.norm_pooled = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, 4 * dim)
        self.linear = nn.Linear(dim, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.query, std=0.02)

    def external_parameters(self) -> list[nn.Parameter]:
        """Return what `forward` takes from layers that it does not call: ZeRO-3 must fetch it."""
        return [*self.to_key.parameters(), *self.to_value.parameters()]

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B K"]:
        """Return one score for each class."""
        tokens = self.norm(tokens)
        pooled = self._look(tokens).flatten(1) + self.query
        return self.linear(pooled + self.mlp(self.norm_pooled(pooled)))

    def _look(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B heads d"]:
        split = (self.num_heads, -1)
        query = self.to_query(self.query).unflatten(0, split)
        key = torch.einsum("hd,hdi->hi", query, self.to_key.weight.unflatten(0, split))
        share = (tokens @ key.T / query.shape[1] ** 0.5).softmax(dim=1)
        mixed = share.transpose(1, 2).to(tokens.dtype) @ tokens
        value = torch.einsum("bhi,hdi->bhd", mixed, self.to_value.weight.unflatten(0, split))
        return value + self.to_value.bias.unflatten(0, split)
