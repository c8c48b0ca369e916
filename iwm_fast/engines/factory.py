"""The choice between the PyTorch engine and the DeepSpeed engine."""

from torch import nn
from torch.optim import Optimizer

from iwm_fast.config.run import RunConfig
from iwm_fast.engines.base import Engine
from iwm_fast.engines.deepspeed_engine import DeepSpeedEngine
from iwm_fast.engines.optimizer import check_optimizer
from iwm_fast.engines.torch_engine import TorchEngine
from iwm_fast.runtime.distributed import RankInfo, copy_from_rank_zero


def build_engine(config: RunConfig, module: nn.Module, optimizer: Optimizer, rank_info: RankInfo) -> Engine:
    """Build the engine that `runtime.engine` selects.

    The module moves to the rank's device, and its parameters are overwritten in place with those of rank 0.

    Collective: every rank must call it.

    Raises:
        ValueError: if the optimiser does not hold exactly the trainable parameters, a parameter is not float32, or
            `runtime.deepspeed` conflicts with other settings.
    """
    module.to(rank_info.device)
    check_optimizer(optimizer, module.named_parameters())
    for parameter in module.parameters():
        copy_from_rank_zero(parameter)
    engine_type = DeepSpeedEngine if config.runtime.engine == "deepspeed" else TorchEngine
    return engine_type(config, module, optimizer, rank_info)
