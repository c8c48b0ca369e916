"""Classification heads on frozen or finetuned tokens: linear on their mean, linear on each patch, attentive."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwm_fast.models.layers import NORM_EPS, Mlp

# Width of an attention head, as in ViT.
_HEAD_DIM = 64


class LinearHead(nn.Module):
    """Linear classifier on the mean of an image's tokens."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B K"]:
        """Return the logit of each class."""
        return self.linear(tokens.mean(dim=1))


class PatchHead(nn.Module):
    """Linear classifier of each patch, for dense prediction."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N K"]:
        """Return the logit of each class for each patch."""
        return self.linear(tokens)


class AttentiveHead(nn.Module):
    """Attentive classifier: a learned query attends to all tokens, followed by an MLP and a linear layer.

    The query is the same for all images, so keys and values of single tokens need not be computed. The query is
    multiplied by the key matrix, and the attention-weighted mean of the tokens by the value matrix. This is the same
    function at a cost per token of 2 D multiplications for each attention head, instead of 2 D^2. Keys have no bias,
    because a constant added to all scores of a softmax changes nothing.

    Source: V-JEPA's attentive pooler, where the tokens are normalised and the query is not. Its public code creates an
    output projection after the attention but never applies it, so this head has none.
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
        """Return parameters that `forward` reads without calling their layer; ZeRO stage 3 must gather them."""
        return [*self.to_key.parameters(), *self.to_value.parameters()]

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B K"]:
        """Return the logit of each class."""
        tokens = self.norm(tokens)
        # The query is the residual stream: attention and MLP are added to it.
        pooled = self._attend(tokens).flatten(1) + self.query
        return self.linear(pooled + self.mlp(self.norm_pooled(pooled)))

    def _attend(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B heads d"]:
        """Return the attention-weighted mean of the values, by head, of width d = D / heads."""
        by_head = (self.num_heads, -1)
        query = self.to_query(self.query).unflatten(0, by_head)
        # The query as seen through the key matrix: its product with a token is the score of the token's key.
        key_query = torch.einsum("hd,hdi->hi", query, self.to_key.weight.unflatten(0, by_head))
        weights = (tokens @ key_query.T / query.shape[1] ** 0.5).softmax(dim=1)
        mean_tokens = weights.transpose(1, 2).to(tokens.dtype) @ tokens
        values = torch.einsum("bhi,hdi->bhd", mean_tokens, self.to_value.weight.unflatten(0, by_head))
        # The weights of a softmax sum to 1, so the bias of a mean of values is the bias of one.
        return values + self.to_value.bias.unflatten(0, by_head)
