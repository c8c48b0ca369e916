"""Image World Models: pretraining (`pretrain`), evaluation, and the trained model (`load`, `WorldModel`)."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iwm_fast.checkpoints.pixel_decoder import load_pixel_decoder
    from iwm_fast.train import pretrain
    from iwm_fast.world_model import WorldModel, load

    __version__: str

__all__ = ["WorldModel", "load", "load_pixel_decoder", "pretrain"]

_MODULES = {
    "WorldModel": "world_model",
    "load": "world_model",
    "load_pixel_decoder": "checkpoints.pixel_decoder",
    "pretrain": "train",
}


def __getattr__(name: str) -> Any:
    """Import the public API on first use, so that the command line need not wait for torch."""
    if name == "__version__":
        try:
            return version("iwm-fast")
        # A checkout that is on the path without being installed.
        except PackageNotFoundError:
            return "unknown"
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"iwm_fast.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """Include the names of the public API, which are not imported yet."""
    return sorted({*globals(), *__all__, "__version__"})
