"""Image World Models: model, training, evaluation, and the Python API for trained models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iwm_fast.world_model import WorldModel, load

__all__ = ["WorldModel", "load"]


def __getattr__(name: str) -> Any:
    """Import the public names on first access, so that the command line does not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from iwm_fast import world_model  # noqa: PLC0415

    return getattr(world_model, name)
