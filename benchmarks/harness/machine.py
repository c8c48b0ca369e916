"""Description of the machine, command and commit that every record carries."""

import hashlib
import math
import os
import platform
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

from iwm_fast.runtime import provenance

PROJECT = Path(__file__).parents[2]
SOURCES = ("kernels", "pipelines", "iwm_fast", "benchmarks")
"""Folders whose code decides what is measured."""
PACKAGES = ("nvidia-dali-cuda130", "torchvision", "webdataset", "pillow", "numpy", "deepspeed")


def describe(commit: str | None = None) -> dict[str, Any]:
    """Return GPU, CPU, versions, commit, command and start time, without what is missing or unknown.

    Without `commit` it is that of `source_version`.
    """
    properties = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    description = {
        "gpu": properties.name if properties else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "driver": _driver_version() if properties else None,
        "cpu": provenance.cpu_name(),
        "cores": num_cores(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if properties else None,
        "python": platform.python_version(),
        **provenance.installed_versions(PACKAGES),
        "commit": commit or source_version(),
        # The original arguments include -m, which sys.argv does not. The interpreter's folder is left out.
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "run": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return {name: value for name, value in description.items() if value not in (None, "unknown")}


def source_version(*more_folders: str, project: Path = PROJECT) -> str:
    """Return the commit, or, where there is no git repository, a hash of the code that is measured.

    A copy of the working tree on another machine may have no repository. `more_folders` are hashed, too.
    """
    commit = provenance.current_commit()
    if commit != "unknown":
        return commit
    digest = hashlib.sha256()
    for folder in (*SOURCES, *more_folders):
        for path in sorted((project / folder).rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(project)} {len(content)} ".encode() + content)
    return f"sources-{digest.hexdigest()[:12]}"


def slug(name: str) -> str:
    """Return a name in lower case with hyphens, for use as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def num_cores() -> int:
    """Return how many cores this process may use according to its CPU affinity and its container's quota."""
    affinity, limit = len(os.sched_getaffinity(0)), Path("/sys/fs/cgroup/cpu.max")
    quota, _, period = limit.read_text().partition(" ") if limit.exists() else ("max", "", "")
    return affinity if quota == "max" else min(affinity, max(math.floor(int(quota) / int(period)), 1))


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return answer.strip().partition("\n")[0] or None


def processor_name(description: dict[str, Any]) -> str:
    """Return the name of the GPU, if any, and of the CPU with its number of cores."""
    cpu = f"{description.get('cpu') or 'CPU'}, {description.get('cores')} cores"
    return f"{description['gpu']}, {cpu}" if description.get("gpu") else cpu


def describe_in_words(description: dict[str, Any]) -> str:
    """Return a line of text for a description: processors, measured ceilings, versions, start time and command."""
    ceilings = ""
    if "matrix_flops_per_s" in description:
        copy, product = description["copy_bytes_per_s"] / 1e12, description["matrix_flops_per_s"] / 1e12
        ceilings = f"copies {copy:.2f} TB/s, multiplies {product:.0f} TFLOP/s; "
    names = ("driver", *PACKAGES, "torch", "triton", "cuda", "cudnn", "python", "commit")
    versions = ", ".join(f"{name} {description[name]}" for name in names if description.get(name) is not None)
    processors = ("" if description.get("gpu") else "no GPU, ") + processor_name(description)
    return f"{processors}: {ceilings}{versions}; {description.get('run')}; `{description.get('command')}`"


def cpu_time_s() -> float:
    """Return the CPU time of this process and of all its descendants, these to a hundredth of a second."""
    times: dict[int, tuple[int, int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name of the program, in parentheses, may contain blanks.
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # The process has ended.
        # Parent, and clock ticks: user and system time, with those of children that have ended.
        times[int(path.parent.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    itself = os.getpid()
    family = {itself}
    while more := {child for child, (parent, _) in times.items() if parent in family} - family:
        family |= more
    ticks = sum(times[member][1] for member in family - {itself})
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system + ticks / os.sysconf("SC_CLK_TCK")
