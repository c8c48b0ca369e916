"""Heads on frozen or finetuned tokens: linear on the mean, attentive, linear per patch."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

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

    Source: V-JEPA's attentive pooler (query not normalised, tokens are). Its public code makes an output projection
    behind the attention and never applies it; here there is none to forget.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.num_heads = max(dim // _HEAD_DIM, 1) if dim % _HEAD_DIM == 0 else 1
        self.query = nn.Parameter(torch.zeros(dim))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.to_query = nn.Linear(dim, dim)
        self.to_key_value = nn.Linear(dim, 2 * dim)
        self.norm_pooled = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, 4 * dim)
        self.linear = nn.Linear(dim, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B K"]:
        """Return one score for each class."""
        num_images, _, dim = tokens.shape
        heads = (self.num_heads, dim // self.num_heads)
        key, value = self.to_key_value(self.norm(tokens)).chunk(2, dim=-1)
        key, value = (part.unflatten(-1, heads).transpose(1, 2) for part in (key, value))
        query = self.to_query(self.query).view(1, *heads[:1], 1, heads[1]).expand(num_images, -1, -1, -1)
        pooled = functional.scaled_dot_product_attention(query, key, value).flatten(1) + self.query
        return self.linear(pooled + self.mlp(self.norm_pooled(pooled)))
