"""Where DeepSpeed's ZeRO stages keep weights and moments, read and written by parameter name.

DeepSpeed's own accessors fail with two parameter groups ("exp_avg not found"), leave the model's copy of a weight
stale, or take one collective for each parameter; here it is one for a whole vector.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwm_fast.engines.portable_state import (
    MOMENTS,
    adam_steps,
    check_state,
    copy_to_host,
    get_moment,
    parameters_with_prefix,
    set_moments,
)
from iwm_fast.runtime.distributed import all_gather


class PartitionedMoments:
    """Stages 1 and 2: whole weights on every rank, moments in parts.

    Per parameter group there is one flat float32 vector, cut into equal parts, one per rank.
    """

    def __init__(self, module: nn.Module, zero: Any, rank: int) -> None:
        self._module, self._zero, self._rank = module, zero, rank

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        return parameters_with_prefix(self._module, prefix)

    def state(self) -> dict[str, Tensor]:
        state = {}
        if self._rank == 0:
            state |= {f"weight/{name}": copy_to_host(weight) for name, weight in self._module.named_parameters()}
            state["adam_step"] = torch.tensor(float(adam_steps(self._zero.optimizer)))
        for group, part in enumerate(self._zero.single_partition_of_fp32_groups):
            for moment in MOMENTS:
                whole = all_gather(get_moment(self._zero.optimizer, part, moment))
                if self._rank == 0:
                    state |= {f"{moment}/{name}": copy_to_host(row) for name, row in self._split(whole, group)}
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        check_state(state, self._module.named_parameters())
        for name, parameter in self._module.named_parameters():
            parameter.copy_(state[f"weight/{name}"])
        # the model's copy is written; this brings each rank's own part of it up to date
        self._zero.refresh_fp32_params()
        for group, part in enumerate(self._zero.single_partition_of_fp32_groups):
            moments = {}
            for moment in MOMENTS:
                # what pads the vector to equal parts stays zero
                whole = torch.zeros(self._zero.bit16_groups_flat[group].numel())
                for name, row in self._split(whole, group):
                    row.copy_(state[f"{moment}/{name}"])
                moments[moment] = whole.split(part.numel())[self._rank]
            set_moments(self._zero.optimizer, part, int(state["adam_step"]), moments)

    def _split(self, whole: Float[Tensor, "padded"], group: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each parameter of a group and a view of its piece of the group's flat vector."""
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        offsets = self._zero.round_robin_bit16_offsets[group]
        for parameter, offset in zip(self._zero.round_robin_bit16_groups[group], offsets, strict=True):
            yield names[id(parameter)], whole[offset : offset + parameter.numel()].view(parameter.shape)


class PartitionedParameters:
    """Stage 3: every parameter is cut into equal parts, the last one padded, one per rank.

    The trained ones lie one behind the other in a few flat vectors, which are what the optimiser knows.
    """

    def __init__(self, module: nn.Module, zero: Any, rank: int) -> None:
        self._zero, self._rank = zero, rank
        # a parameter's own shape is empty while its parts are spread
        self._parameters: dict[str, Any] = dict(module.named_parameters())

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        wanted = [name for name in self._parameters if name.startswith(prefix)]
        yield from self._gather({name: self._parameters[name].ds_tensor for name in wanted})

    def _gather(self, parts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Put this rank's parts and the other ranks' together, in one collective."""
        if not parts:
            return
        joined = all_gather(torch.cat([part.detach().flatten() for part in parts.values()]))
        lengths = [part.numel() for part in parts.values()]
        # one row for each rank
        columns = joined.view(-1, sum(lengths)).split(lengths, dim=1)
        for name, column in zip(parts, columns, strict=True):
            parameter = self._parameters[name]
            yield name, column.flatten()[: parameter.ds_numel].view(parameter.ds_shape)

    def state(self) -> dict[str, Tensor]:
        state = {}
        if self._rank == 0:
            state["adam_step"] = torch.tensor(float(adam_steps(self._zero.optimizer)))
        parts = {"weight": {name: parameter.ds_tensor for name, parameter in self._parameters.items()}}
        parts |= {moment: self._parts_of(moment) for moment in MOMENTS}
        for kind, part in parts.items():
            for name, whole in self._gather(part):
                if self._rank == 0:
                    state[f"{kind}/{name}"] = copy_to_host(whole)
        return state

    def _parts_of(self, moment: str) -> dict[str, Tensor]:
        flat = [get_moment(self._zero.optimizer, vector, moment) for vector in self._zero.fp32_partitioned_groups_flat]
        return {name: flat[vector][first:last] for name, (vector, first, last) in self._places().items()}

    def _places(self) -> dict[str, tuple[int, int, int]]:
        """Return for each trained parameter in which flat vector its part lies, from where to where."""
        places = {}
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                vector, first, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
                places[name] = (vector, int(first), int(first + length))
        return places

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        shaped = {
            name: torch.empty(parameter.ds_shape, device="meta", requires_grad=parameter.requires_grad)
            for name, parameter in self._parameters.items()
        }
        check_state(state, shaped.items())
        for name, parameter in self._parameters.items():
            self._write_part(parameter.ds_tensor, state[f"weight/{name}"])
            if parameter.shape == parameter.ds_shape:
                # a small one, which is kept whole beside its part
                parameter.copy_(state[f"weight/{name}"])
        # what the optimiser knows is a copy of the parts
        self._zero.refresh_fp32_params()
        flat = self._zero.fp32_partitioned_groups_flat
        moments = [{moment: torch.zeros_like(vector) for moment in MOMENTS} for vector in flat]
        for name, (vector, first, last) in self._places().items():
            for moment in MOMENTS:
                self._write_part(moments[vector][moment][first:last], state[f"{moment}/{name}"])
        for vector, filled in zip(flat, moments, strict=True):
            set_moments(self._zero.optimizer, vector, int(state["adam_step"]), filled)

    def _write_part(self, part: Tensor, whole: Tensor) -> None:
        """Copy this rank's piece of a whole tensor; what pads the last one stays as it is."""
        piece = whole.flatten()[self._rank * part.numel() : (self._rank + 1) * part.numel()]
        part.view(-1)[: piece.numel()].copy_(piece)


def replace_parameters(module: nn.Module, whole: dict[str, Tensor]) -> None:
    """Give a module that stage 3 has cut up whole parameters again, new ones in the place of its own."""
    for prefix, part in module.named_modules():
        # DeepSpeed keeps them in a dictionary of its own, which would fetch what is cut up
        part._parameters = {
            name: parameter
            if parameter is None
            else nn.Parameter(whole[f"{prefix}.{name}" if prefix else name], requires_grad=parameter.requires_grad)
            for name, parameter in part._parameters.items()
        }
