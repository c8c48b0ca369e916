"""The error of a checkpoint or an export that cannot be written, read or used."""

from pathlib import Path

from iwm_fast.pipelines.storage.atomic import verify_manifest


class CheckpointError(Exception):
    """A checkpoint or export cannot be written, read or used; the message names it and the remedy."""


def require_undamaged(folder: Path, names: tuple[str, ...]) -> None:
    """Compare files of a checkpoint or an export with the sizes and hashes in its manifest.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    try:
        verify_manifest(folder, names)
    except OSError as error:
        raise CheckpointError(f"{error}: it is damaged; the run's other checkpoints may be complete") from error
