"""The choice between PyTorch's engine and DeepSpeed's."""

from torch import nn
from torch.optim import Optimizer

from iwm_fast.config.run import RunConfig
from iwm_fast.engines.base import Engine
from iwm_fast.engines.deepspeed_engine import DeepSpeedEngine
from iwm_fast.engines.optimizer import check_optimizer
from iwm_fast.engines.torch_engine import TorchEngine
from iwm_fast.runtime.distributed import RankInfo, copy_from_rank_zero


def build_engine(config: RunConfig, module: nn.Module, optimizer: Optimizer, rank_info: RankInfo) -> Engine:
    """Return the engine that `runtime.engine` names; moves the module to its device and starts all ranks from rank 0.

    Raises:
        ValueError: if module and optimiser do not fit the engines, or `runtime.deepspeed` contradicts other settings.
    """
    module.to(rank_info.device)
    check_optimizer(optimizer, module.named_parameters())
    for parameter in module.parameters():
        copy_from_rank_zero(parameter)
    kind = DeepSpeedEngine if config.runtime.engine == "deepspeed" else TorchEngine
    return kind(config, module, optimizer, rank_info)
