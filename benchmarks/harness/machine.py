"""On what a number was measured: no number without its machine, command and commit."""

import importlib.metadata
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

from iwm_fast.runtime import provenance
from iwm_fast.runtime.provenance import cpu_name

PROJECT = Path(__file__).parents[2]
PIPELINE_PACKAGES = ("nvidia-dali-cuda130", "torchvision", "webdataset", "pillow", "numpy")


def describe(commit: str | None = None, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return CPU, GPU, versions, commit, command and the time of starting; what there is not, is not said.

    Args:
        commit: what to say where there is no git, as in a copy of the working tree; otherwise git is asked.
        packages: whose versions matter too.
    """
    properties = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    found = {
        "gpu": properties.name if properties else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "driver": _driver() if properties else None,
        "cpu": cpu_name(),
        "cores": num_cores(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if properties else None,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "commit": commit or provenance.commit(),
        # as it was typed, without the interpreter's folder
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "run": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return {name: value for name, value in found.items() if value not in (None, "unknown")}


def slug(name: str) -> str:
    """Return a processor's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def num_cores() -> int:
    """Return how many cores this process may use, by its affinity and its container's limit."""
    allowed, limit = len(os.sched_getaffinity(0)), Path("/sys/fs/cgroup/cpu.max")
    quota, _, period = limit.read_text().partition(" ") if limit.exists() else ("max", "", "")
    return allowed if quota == "max" else min(allowed, max(math.floor(int(quota) / int(period)), 1))


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return answer.strip().partition("\n")[0] or None


def processor(about: dict[str, Any]) -> str:
    """Return a name for what does the work."""
    cpu = f"{about.get('cpu') or 'CPU'}, {about.get('cores')} cores"
    return f"{about['gpu']}, {cpu}" if about.get("gpu") else cpu


def machine_line(about: dict[str, Any]) -> str:
    """Return on what was measured, in words."""
    ceilings = ""
    if "matrix_flops_per_s" in about:
        copy, product = about["copy_bytes_per_s"] / 1e12, about["matrix_flops_per_s"] / 1e12
        ceilings = f"copies {copy:.2f} TB/s, multiplies {product:.0f} TFLOP/s; "
    names = ("driver", *PIPELINE_PACKAGES, "deepspeed", "torch", "triton", "cuda", "cudnn", "python", "commit")
    versions = ", ".join(f"{name} {about[name]}" for name in names if about.get(name) is not None)
    cpu = f", {about['cpu']}, {about['cores']} cores" if about.get("cpu") else ""
    return f"{about.get('gpu') or 'no GPU'}{cpu}: {ceilings}{versions}; {about.get('run')}; `{about.get('command')}`"
