"""Errors of all libraries that mean that memory is exhausted, on a GPU or on the host."""

import re
from collections.abc import Iterator
from typing import Literal

# torch, cuBLAS and cuDNN, Triton, DALI, NCCL.
_GPU = re.compile(
    r"(CUDA|HIP) (error: )?out of memory|\[CUDA\]: out of memory|cuda failure.*out of memory|cudaErrorMemoryAllocation"
    r"|CUDA allocation failed|CUDABadAlloc|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
# torch, C++ libraries, the kernel.
_HOST = re.compile(r"DefaultCPUAllocator|std::bad_alloc|cannot allocate memory", re.IGNORECASE)


def exhausted_memory(error: BaseException) -> tuple[Literal["GPU", "host"], str] | None:
    """Return which memory an error says is exhausted, and its first sentences; None for any other error.

    The errors that led to this one are searched, too, because libraries wrap them.
    """
    for cause in _chain(error):
        text = " ".join(str(cause).split())[:300] or type(cause).__name__
        # By name, because importing torch takes seconds.
        if type(cause).__name__ == "OutOfMemoryError" or _GPU.search(text):
            return "GPU", text
        if isinstance(cause, MemoryError) or _HOST.search(text):
            return "host", text
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
