"""How a result was produced: command, commit, package versions and machine."""

import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("iwm-fast", "torch", "triton", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "deepspeed", "timm", "numpy")


def describe_run(device: torch.device, world_size: int) -> dict[str, Any]:
    """Return how this run is produced: command, start time, commit, package versions, machine and world size."""
    return {
        "command": " ".join(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": current_commit(),
        "versions": {"python": platform.python_version(), **installed_versions()},
        "machine": describe_machine(device),
        "world_size": world_size,
    }


def installed_versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Return the version of each package; those of other extras are left out."""
    versions = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def current_commit() -> str:
    """Return the project's commit, with `+changes` if files differ from it; "unknown" without git or a checkout."""
    project = Path(__file__).parents[2]
    # Git would otherwise describe any repository around an installed package.
    if not (project / ".git").exists():
        return "unknown"
    # Excluding all tags makes the description the bare hash.
    command = ["git", "-C", str(project), "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, check=False)
    # Without git.
    except OSError:
        return "unknown"
    return completed.stdout.strip() or "unknown"


def describe_machine(device: torch.device) -> str:
    """Return the name of the GPU or processor that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    num_threads = torch.get_num_threads()
    return f"{cpu_name()}, {num_threads} thread{'s' if num_threads > 1 else ''} per rank"


def cpu_name() -> str:
    """Return the processor's name as the Linux kernel reports it, or at least its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()
