"""Packages that the core installation lacks, and the extras of `pip install 'iwm-fast[EXTRA]'` that install them."""

from collections.abc import Collection, Iterable
from importlib.util import find_spec

_TRAIN, _EVAL, _DEMO = "train-cuda13", "eval", "demo"
EXTRAS = {
    "nvidia.dali": (_TRAIN,),
    "deepspeed": (_TRAIN,),
    "tensorboard": (_TRAIN,),
    "webdataset": (_TRAIN,),
    "pyarrow": (_TRAIN, _EVAL),
    "braceexpand": (_TRAIN, _EVAL),
    "urllib3": (_TRAIN, _EVAL),
    "matplotlib": (_EVAL,),
    "scipy": (_EVAL,),
    "skimage": (_DEMO,),
    "sklearn": (_DEMO,),
    "wandb": ("wandb",),
}
"""Import name of each package, and the extras that contain it, the smallest last."""
DEMO_PACKAGES = tuple(name for name in EXTRAS if name != "wandb")
"""Packages that the demo needs, which uses all extras but the logger for W&B."""


class MissingPackageError(ModuleNotFoundError):
    """Packages of an extra are not installed; the message names them and the extra."""


def require_packages(names: Iterable[str]) -> None:
    """Check, without importing them, that packages are installed, so that one message can name all that are missing.

    Args:
        names: import names, which are keys of `EXTRAS`.

    Raises:
        MissingPackageError: naming the missing packages and the extras that contain them.
    """
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        raise _missing_packages(missing)


def require_training_packages(loader: str, engine: str, loggers: Collection[str] = ("tensorboard",)) -> None:
    """Check that the packages that training needs with these settings are installed.

    Raises:
        MissingPackageError: naming the missing packages and the extras that contain them.
    """
    chosen = {"nvidia.dali": loader == "dali", "deepspeed": engine == "deepspeed"}
    chosen |= {name: name in loggers for name in ("tensorboard", "wandb")}
    require_packages([*(name for name, is_used in chosen.items() if is_used), "pyarrow"])


def find_missing_package(error: Exception) -> MissingPackageError | None:
    """Return the error to report for an import that failed because an extra is not installed; None for other errors."""
    if not isinstance(error, ModuleNotFoundError) or isinstance(error, MissingPackageError):
        return None
    # Without any package of NVIDIA, `import nvidia.dali` already fails at its parent.
    missing = [name for name in EXTRAS if error.name in (name, name.partition(".")[0])]
    return _missing_packages(missing) if missing else None


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    # Looking up a submodule imports its parent, which may be missing, too.
    except ModuleNotFoundError:
        return False


def _missing_packages(names: list[str]) -> MissingPackageError:
    extras: list[str] = []
    # A package of several extras comes last: one that is needed for another package may contain it.
    for name in sorted(names, key=lambda name: len(EXTRAS[name])):
        if not set(EXTRAS[name]) & set(extras):
            extras.append(EXTRAS[name][-1])
    verb = "is" if len(names) == 1 else "are"
    hint = f" (CUDA 12: {_TRAIN.replace('13', '12')})" if _TRAIN in extras else ""
    return MissingPackageError(
        f"{', '.join(names)} {verb} not installed: pip install 'iwm-fast[{','.join(extras)}]'{hint}", name=names[0]
    )
