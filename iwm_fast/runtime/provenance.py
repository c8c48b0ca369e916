"""By what and where a number was made: command, commit, versions, machine."""

import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "nvidia-dali-cuda130", "deepspeed", "timm", "numpy")


def describe_run(device: torch.device, world_size: int) -> dict[str, Any]:
    """Say by what and where a run is made: command, commit, versions, machine."""
    return {
        "command": " ".join(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "machine": machine(device),
        "world_size": world_size,
    }


def commit() -> str:
    """Return the project's commit, with `+changes` if files differ from it; "unknown" outside a checkout."""
    project = Path(__file__).parents[2]
    if not (project / ".git").exists():
        return "unknown"
    asked = ["git", "-C", str(project), "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


def machine(device: torch.device) -> str:
    """Name the processor or GPU that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    num_threads = torch.get_num_threads()
    return f"{cpu_name()}, {num_threads} thread{'s' if num_threads > 1 else ''} per rank"


def cpu_name() -> str:
    """Name the processor as the kernel does, or at least its architecture."""
    listed = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", listed.read_text(), re.MULTILINE) if listed.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
