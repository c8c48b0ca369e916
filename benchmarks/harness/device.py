"""Errors of a GPU: kernels run asynchronously, so a kernel's error is raised by whatever waits for the GPU next."""

import torch


class UnusableGpuError(RuntimeError):
    """An error, such as an illegal memory access, after which every CUDA call of this process fails."""


def synchronize() -> None:
    """Wait for the GPU, if there is one, so that the error of a kernel is raised here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def check_usable() -> None:
    """Raise UnusableGpuError if an earlier error has left the GPU unusable for this process."""
    try:
        synchronize()
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        raise UnusableGpuError(f"this process cannot use the GPU any more: {first_line}") from error


def is_usable() -> bool:
    """Return whether this process can still use the GPU; True without one."""
    try:
        check_usable()
    except UnusableGpuError:
        return False
    return True
