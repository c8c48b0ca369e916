"""The error of a checkpoint or an export that cannot be written, read or used."""

from pathlib import Path

from iwm_fast.pipelines.storage.atomic import verify


class CheckpointError(Exception):
    """A checkpoint cannot be written, read or used; says where and what to do."""


def require_undamaged(folder: Path, names: tuple[str, ...]) -> None:
    """Compare files of a checkpoint, or of an export, with its manifest.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    try:
        verify(folder, names)
    except OSError as error:
        raise CheckpointError(f"{error}: it is damaged; the run's other checkpoints may be complete") from error
