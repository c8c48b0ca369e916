"""The teacher: an exponential moving average of the encoder, which provides the prediction targets."""

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
    """Exponential moving average of an encoder, in float32 and without gradients.

    Its weights change only in `update` and `load_state_dict`, in place.
    """

    def __init__(self, encoder: Encoder, autocast_dtype: torch.dtype | None) -> None:
        """Start as a copy of `encoder`; forward passes run under autocast unless `autocast_dtype` is None."""
        # Float32: with a momentum near 1, most updates are smaller than the resolution of bf16.
        self.encoder: Encoder = copy.deepcopy(encoder).float().requires_grad_(False).eval()
        self.autocast_dtype: torch.dtype | None = autocast_dtype

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, Tensor]], momentum: float) -> None:
        """Update every weight in place: teacher <- momentum * teacher + (1 - momentum) * parameter.

        Args:
            parameters: weights of the trained encoder with their names in the encoder, in any order.
            momentum: EMA coefficient; 1 leaves the teacher unchanged, 0 copies the parameters.

        Raises:
            ValueError: if a name is missing, unknown or repeated, or if `momentum` lies outside [0, 1].
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}; set optim.teacher_momentum")
        weights = dict(self.encoder.named_parameters())
        sources = list(parameters)
        _check_names([name for name, _ in sources], set(weights))
        averages: list[Tensor] = [weights[name] for name, _ in sources]
        updates = [tensor.detach().to(weights[name]) for name, tensor in sources]
        # One kernel launch for all weights instead of one per weight. PyTorch has no public name for it.
        torch._foreach_lerp_(averages, updates, 1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def encode(self, view: Float[Tensor, "B 3 H W"], index: RaggedIndex | None) -> Float[Tensor, "M D"]:
        """Return the target tokens in float32: encode all patches of the view and layer-normalise without parameters.

        Args:
            view: normalised images of the target view.
            index: patches whose tokens are returned; None for all patches.
        """
        is_autocast = self.autocast_dtype is not None
        with torch.autocast(view.device.type, dtype=self.autocast_dtype, enabled=is_autocast):
            tokens = self.encoder(view, None)
        if index is not None:
            tokens = tokens.index_select(0, index.row)
        # I-JEPA's loss uses PyTorch's default eps of 1e-5. Here it is 1e-6 as in all other norms, which hardly matters:
        # after the encoder's final norm, tokens have a variance near 1.
        return F.layer_norm(tokens.float(), (tokens.shape[-1],), eps=NORM_EPS)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights by timm's names, without copying: they change with the next update."""
        return self.encoder.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Overwrite the weights in place; all names must match."""
        self.encoder.load_state_dict(state)


def _check_names(names: list[str], expected: set[str]) -> None:
    missing, unknown = sorted(expected - set(names)), sorted(set(names) - expected)
    if missing or unknown or len(names) != len(expected):
        raise ValueError(
            f"parameters must name each of the encoder's {len(expected)} once, got {len(names)} "
            f"(missing: {missing[:3]}, unknown: {unknown[:3]}); pass names as in encoder.named_parameters()"
        )
