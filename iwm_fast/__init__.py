"""Image World Models: pretraining, evaluation, and the Python API of a trained model (`load`, `WorldModel`)."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iwm_fast.world_model import WorldModel, load

    __version__: str

__all__ = ["WorldModel", "load"]


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
    from iwm_fast import world_model  # noqa: PLC0415

    return getattr(world_model, name)


def __dir__() -> list[str]:
    """Include the names of the public API, which are not imported yet."""
    return sorted({*globals(), *__all__, "__version__"})
