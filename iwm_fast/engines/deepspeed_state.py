"""Reading and writing, by parameter name, the weights and moments that DeepSpeed's ZeRO stages keep.

DeepSpeed has accessors of its own, but they fail with two parameter groups ("exp_avg not found"), do not update the
model's copy of a weight, or need one collective per parameter. Here one collective gathers a complete flat vector.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwm_fast.engines.portable_state import (
    MOMENTS,
    check_state,
    copy_to_cpu,
    count_adam_steps,
    get_moment,
    parameters_with_prefix,
    set_moments,
)
from iwm_fast.runtime.distributed import all_gather


class PartitionedMoments:
    """The state of ZeRO stages 1 and 2: complete weights on every rank, moments partitioned over ranks.

    Each parameter group is one flat float32 vector, cut into equal partitions, one per rank. The methods are those of
    `iwm_fast.engines.base.Engine`.
    """

    def __init__(self, module: nn.Module, zero_optimizer: Any, rank: int) -> None:
        self._module = module
        self._zero = zero_optimizer
        self._rank = rank

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        return parameters_with_prefix(self._module, prefix)

    def state(self) -> dict[str, Tensor]:
        state = {}
        if self._rank == 0:
            state |= {f"weight/{name}": copy_to_cpu(weight) for name, weight in self._module.named_parameters()}
            state["adam_step"] = torch.tensor(float(count_adam_steps(self._zero.optimizer)))
        for group, partition in enumerate(self._zero.single_partition_of_fp32_groups):
            for moment in MOMENTS:
                # All ranks gather, although only rank 0 keeps the result.
                vector = all_gather(get_moment(self._zero.optimizer, partition, moment))
                if self._rank == 0:
                    state |= {f"{moment}/{name}": copy_to_cpu(view) for name, view in self._split(vector, group)}
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        check_state(state, self._module.named_parameters())
        for name, parameter in self._module.named_parameters():
            parameter.copy_(state[f"weight/{name}"])
        # ZeRO updates its own partition of the weights and then overwrites the model's copy, which is all that has been
        # written so far. This copies the model's weights into the partition.
        self._zero.refresh_fp32_params()
        for group, partition in enumerate(self._zero.single_partition_of_fp32_groups):
            moments = {}
            for moment in MOMENTS:
                # The padding at the end, which makes partitions equal, stays zero.
                vector = torch.zeros(self._zero.bit16_groups_flat[group].numel())
                for name, view in self._split(vector, group):
                    view.copy_(state[f"{moment}/{name}"])
                moments[moment] = vector.split(partition.numel())[self._rank]
            set_moments(self._zero.optimizer, partition, int(state["adam_step"]), moments)

    def _split(self, vector: Float[Tensor, "padded"], group: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each parameter of a group and a view of its values in the group's flat vector."""
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        offsets = self._zero.round_robin_bit16_offsets[group]
        for parameter, offset in zip(self._zero.round_robin_bit16_groups[group], offsets, strict=True):
            yield names[id(parameter)], vector[offset : offset + parameter.numel()].view(parameter.shape)


class PartitionedParameters:
    """The state of ZeRO stage 3: weights and moments partitioned over ranks.

    Every parameter is cut into equal partitions, the last one padded, one per rank. The optimiser holds the partitions
    of the trained parameters in a few flat vectors. The methods are those of `iwm_fast.engines.base.Engine`.
    """

    def __init__(self, module: nn.Module, zero_optimizer: Any, rank: int) -> None:
        self._zero = zero_optimizer
        self._rank = rank
        # A partitioned parameter is an empty tensor. Its partition is `ds_tensor`, its full shape `ds_shape`.
        self._parameters: dict[str, Any] = dict(module.named_parameters())

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        names = [name for name in self._parameters if name.startswith(prefix)]
        yield from self._gather({name: self._parameters[name].ds_tensor for name in names})

    def _gather(self, partitions: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield name and full tensor of this rank's partitions, completed with those of the other ranks.

        Collective: every rank must call it. It makes a single all-gather for all names.
        """
        if not partitions:
            return
        gathered = all_gather(torch.cat([partition.detach().flatten() for partition in partitions.values()]))
        lengths = [partition.numel() for partition in partitions.values()]
        # As a matrix with one row per rank, the partitions of one parameter are a block of columns.
        blocks = gathered.view(-1, sum(lengths)).split(lengths, dim=1)
        for name, block in zip(partitions, blocks, strict=True):
            parameter = self._parameters[name]
            # Cutting to `ds_numel` removes the padding of the last partition.
            yield name, block.flatten()[: parameter.ds_numel].view(parameter.ds_shape)

    def state(self) -> dict[str, Tensor]:
        state = {}
        if self._rank == 0:
            state["adam_step"] = torch.tensor(float(count_adam_steps(self._zero.optimizer)))
        by_kind = {"weight": {name: parameter.ds_tensor for name, parameter in self._parameters.items()}}
        by_kind |= {moment: self._moment_partitions(moment) for moment in MOMENTS}
        for kind, partitions in by_kind.items():
            for name, full in self._gather(partitions):
                if self._rank == 0:
                    state[f"{kind}/{name}"] = copy_to_cpu(full)
        return state

    def _moment_partitions(self, moment: str) -> dict[str, Tensor]:
        """Return views of this rank's partitions of a moment, by name of the trained parameter."""
        flat = [get_moment(self._zero.optimizer, vector, moment) for vector in self._zero.fp32_partitioned_groups_flat]
        return {name: flat[vector][start:stop] for name, (vector, start, stop) in self._locations().items()}

    def _locations(self) -> dict[str, tuple[int, int, int]]:
        """Return for each trained parameter the number of its flat vector, and its partition's start and stop there."""
        locations = {}
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                vector, start, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
                locations[name] = (vector, int(start), int(start + length))
        return locations

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        # Tensors on the meta device have the full shapes, which the partitioned parameters do not have.
        full_shapes = {
            name: torch.empty(parameter.ds_shape, device="meta", requires_grad=parameter.requires_grad)
            for name, parameter in self._parameters.items()
        }
        check_state(state, full_shapes.items())
        for name, parameter in self._parameters.items():
            self._write_partition(parameter.ds_tensor, state[f"weight/{name}"])
            # DeepSpeed keeps small parameters gathered between steps, in addition to their partitions.
            if parameter.shape == parameter.ds_shape:
                parameter.copy_(state[f"weight/{name}"])
        # The optimiser's flat vectors are copies of the partitions.
        self._zero.refresh_fp32_params()
        flat = self._zero.fp32_partitioned_groups_flat
        moments = [{moment: torch.zeros_like(vector) for moment in MOMENTS} for vector in flat]
        for name, (vector, start, stop) in self._locations().items():
            for moment in MOMENTS:
                self._write_partition(moments[vector][moment][start:stop], state[f"{moment}/{name}"])
        for vector, vector_moments in zip(flat, moments, strict=True):
            set_moments(self._zero.optimizer, vector, int(state["adam_step"]), vector_moments)

    def _write_partition(self, partition: Tensor, full: Tensor) -> None:
        """Copy this rank's share of a full tensor into its partition; padding keeps its values."""
        share = full.flatten()[self._rank * partition.numel() : (self._rank + 1) * partition.numel()]
        partition.view(-1)[: share.numel()].copy_(share)


def replace_parameters(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Replace in place all parameters of a module that ZeRO stage 3 has partitioned by new ones with full weights."""
    for prefix, submodule in module.named_modules():
        # DeepSpeed has replaced this dictionary by one of its own type, which gathers parameters on access. A plain
        # dictionary takes its place.
        submodule._parameters = {
            name: parameter
            if parameter is None
            else nn.Parameter(weights[f"{prefix}.{name}" if prefix else name], requires_grad=parameter.requires_grad)
            for name, parameter in submodule._parameters.items()
        }
