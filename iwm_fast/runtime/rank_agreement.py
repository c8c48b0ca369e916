"""Ranks must agree on settings, packages and data before they train together.

Every machine of a launch has its own command line and its own files. With different learning rates the ranks would
train another model than any of them was told to; with different batch sizes they would wait for each other endlessly.
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from iwm_fast.runtime.error_reporting import PeerFailedError
from iwm_fast.runtime.provenance import installed_versions

# They change results, or which kernels are used.
_VARIABLES = (
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCHDYNAMO_DISABLE",
    "TRITON_INTERPRET",
)
_MAX_NAMED = 5
_REMEDY = "start all machines with the same command, files and packages"
# Time for the other ranks to read the verdict before rank 0 ends, and with it perhaps the store.
_FAREWELL = timedelta(seconds=10)


def require_same_settings(store: Store, rank: int, world_size: int, settings: Mapping[str, Any]) -> None:
    """Check that all ranks have the same settings, packages and environment. Collective: every rank must call it.

    It uses the store through which ranks find each other, because collectives need the same device on all ranks.

    Args:
        store: store that all ranks share.
        rank: number of this process.
        world_size: number of processes.
        settings: values that JSON can represent, by dotted name.

    Raises:
        ValueError: on rank 0, naming the differing settings, the first rank that has them, and both values.
        PeerFailedError: on the other ranks.
    """
    local = _as_json({**settings, **_describe_environment()})
    if rank > 0:
        difference = _describe_differences(json.loads(store.get("settings")), json.loads(local), rank)
        store.set(f"difference {rank}", json.dumps(difference))
        verdict = json.loads(store.get("verdict"))
        store.set(f"read by {rank}", "")
        if verdict:
            raise PeerFailedError("rank 0 reports that settings differ")
        return
    store.set("settings", local)
    differences = [json.loads(store.get(f"difference {other}")) for other in range(1, world_size)]
    verdict = next(filter(None, differences), "")
    store.set("verdict", json.dumps(verdict))
    if verdict:
        with suppress(RuntimeError):
            store.wait([f"read by {other}" for other in range(1, world_size)], _FAREWELL)
        raise ValueError(verdict)


def require_same_on_all_ranks(values: Mapping[str, Any]) -> None:
    """Check that all ranks have the same values, such as digests of files. Collective: every rank must call it.

    Raises:
        ValueError: on rank 0, naming the differing values, the first rank that has them, and both values.
        PeerFailedError: on the other ranks.
    """
    if not dist.is_initialized():
        return
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, _as_json(values))
    first, *others = map(json.loads, gathered)
    report_first([_describe_differences(first, other, rank) for rank, other in enumerate(others, start=1)])


def report_first(problems: Sequence[str]) -> None:
    """Raise the first problem that is not empty; all ranks must have the same list.

    Raises:
        ValueError: on rank 0, so that only one message is printed.
        PeerFailedError: on the other ranks.
    """
    problem = next(filter(None, problems), "")
    if problem and dist.get_rank() > 0:
        raise PeerFailedError("rank 0 reports the problem")
    if problem:
        raise ValueError(problem)


def _as_json(values: Mapping[str, Any]) -> str:
    # Through JSON, because a tuple equals the list that the other ranks receive.
    return json.dumps(dict(values), sort_keys=True, default=str)


def _describe_differences(first: dict[str, Any], other: dict[str, Any], rank: int) -> str:
    """Return a message with the values that differ between rank 0 and another rank; empty if none does."""
    names = [name for name in sorted(first.keys() | other.keys()) if first.get(name) != other.get(name)]
    lines = [f"{name} is {first.get(name)!r} on rank 0 and {other.get(name)!r} on rank {rank}" for name in names]
    more = [f"{len(lines) - _MAX_NAMED} more"] if len(lines) > _MAX_NAMED else []
    return f"the ranks differ: {'; '.join(lines[:_MAX_NAMED] + more)}; {_REMEDY}" if names else ""


def _describe_environment() -> dict[str, str | None]:
    """Return what besides the settings decides how a rank computes, by name."""
    versions = installed_versions() | {"Python": platform.python_version(), "the source of iwm-fast": _source_digest()}
    variables = {f"environment variable {name}": os.environ.get(name) for name in _VARIABLES}
    return {f"version of {name}": value for name, value in versions.items()} | variables


def _source_digest() -> str:
    """Return a digest of this package's source files, because two checkouts may have the same version."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for folder in (package, package / "kernels", package / "pipelines"):
        # The last two are links in a checkout, which rglob does not follow.
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(package)}".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
