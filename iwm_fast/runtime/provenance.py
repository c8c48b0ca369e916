"""By what and where a number was made: command, commit, versions, machine."""

import platform
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
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''} per rank"
