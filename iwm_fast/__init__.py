"""Image World Models: pretraining (`pretrain`), evaluation, and the trained model (`load`, `WorldModel`)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iwm_fast.train import pretrain
    from iwm_fast.world_model import WorldModel, load

__all__ = ["WorldModel", "load", "pretrain"]

_MODULES = {"WorldModel": "world_model", "load": "world_model", "pretrain": "train"}


def __getattr__(name: str) -> Any:
    """Import the public API on first use, so that the command line need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"iwm_fast.{_MODULES[name]}"), name)
