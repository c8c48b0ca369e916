"""The teacher: a slow copy of the encoder that says what has to be predicted."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from iwm_fast.models.encoder import Encoder
from iwm_fast.models.layers import NORM_EPS
from iwm_fast.pipelines.batch import RaggedIndex


class Teacher:
    """Exponential moving average of an encoder, float32, without gradients.

    Its weights change in place in `update` and `load_state_dict` only.
    """

    def __init__(self, encoder: Encoder, autocast_dtype: torch.dtype | None) -> None:
        self.encoder = copy.deepcopy(encoder).float().requires_grad_(False).eval()
        self.autocast_dtype = autocast_dtype

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, Tensor]], momentum: float) -> None:
        """Move every weight in place: teacher <- momentum * teacher + (1 - momentum) * parameter.

        Args:
            parameters: the trained encoder's, under their names in the encoder; in any order.
            momentum: 1 leaves the teacher as it is, 0 copies.

        Raises:
            ValueError: if a name is missing, unknown or given twice, or `momentum` lies outside [0, 1].
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}; set optim.teacher_momentum")
        own = dict(self.encoder.named_parameters())
        given = list(parameters)
        _check_names([name for name, _ in given], set(own))
        averages: list[Tensor] = [own[name] for name, _ in given]
        sources = [tensor.detach().to(own[name]) for name, tensor in given]
        # one launch for all weights instead of one each; torch has no public name for it
        torch._foreach_lerp_(averages, sources, 1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def encode(self, view: Float[Tensor, "B 3 H W"], index: RaggedIndex | None) -> Float[Tensor, "M D"]:
        """Encode all patches of the view, keep the rows of `index` (None: all), LayerNorm without parameters.

        The norm's eps is the networks' 1e-6, not torch's 1e-5 that I-JEPA's loss uses: one number everywhere, and
        tokens behind the encoder's final norm have a variance near one. Float32.
        """
        is_mixed = self.autocast_dtype is not None
        with torch.autocast(view.device.type, dtype=self.autocast_dtype, enabled=is_mixed):
            tokens = self.encoder(view, None)
        if index is not None:
            tokens = tokens.index_select(0, index.row)
        return F.layer_norm(tokens.float(), (tokens.shape[-1],), eps=NORM_EPS)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the encoder's state by timm's names; the tensors are the teacher's own."""
        return self.encoder.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Overwrite the weights in place, strictly."""
        self.encoder.load_state_dict(state)


def _check_names(given: list[str], own: set[str]) -> None:
    missing, unknown = sorted(own - set(given)), sorted(set(given) - own)
    if missing or unknown or len(given) != len(own):
        raise ValueError(
            f"parameters must name each of the encoder's {len(own)} once, got {len(given)} "
            f"(missing: {missing[:3]}, unknown: {unknown[:3]}); pass names as in encoder.named_parameters()"
        )
