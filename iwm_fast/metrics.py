"""Numbers of a run: `metrics.jsonl` is the record of truth, TensorBoard shows the same."""

import json
import math
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

_PACKAGES = ("torch", "triton", "nvidia-dali-cuda130", "deepspeed", "timm", "numpy")


class MetricWriter:
    """Appends one row per log step; rows at or behind the step a run resumes from are dropped first."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(folder) if row["step"] <= first_step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        draft = self._path.with_suffix(".draft")
        draft.write_text(text, encoding="utf-8")
        draft.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one row; `step` is the number of steps done."""
        # JSON knows no infinity, which is the gradient norm of a skipped step
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return a run's rows; a last line cut off by a crash is left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


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
    project = Path(__file__).parent.parent
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
