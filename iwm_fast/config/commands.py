"""Settings of the commands before and behind a run, for the command line and for Python; cheap to import."""

from dataclasses import dataclass
from typing import Literal

from iwm_fast.pipelines.config import Backend, check


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What a run will take on some machine, told before it starts; the run's own settings stand beside these."""

    ranks: int | None = None
    """Processes that train together, one per GPU; unset: WORLD_SIZE, otherwise this machine's GPUs, otherwise 1."""
    images_per_s: float | None = None
    """Training speed over all ranks, if you know it, to tell the hours from."""
    gpu: str = ""
    """The GPU that the run is meant for, such as H100; then this machine need not have one. Unset: this machine's,
    otherwise an H100 to tell the hours from."""

    def __post_init__(self) -> None:
        check(self.ranks is None or self.ranks >= 1, "ranks", self.ranks, "be at least 1 or unset")
        speed = self.images_per_s
        check(speed is None or speed > 0, "images_per_s", speed, "be above 0 or unset")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A trained run made into a folder that others can use."""

    run: str = ""
    """Run folder."""
    to: str = ""
    """Folder to write; it must not exist."""

    def __post_init__(self) -> None:
        check(bool(self.to), "to", self.to, "name a folder to write")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """One HTML page of a run or of a lab."""

    run: str = ""
    """Run folder."""
    lab: str = ""
    """Folder of a lab, instead."""

    def __post_init__(self) -> None:
        check(bool(self.run) != bool(self.lab), "run and lab", (self.run, self.lab), "name one folder, in one of them")


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """The views of one step of training, rendered again from the run's action log."""

    run: str = ""
    """Run folder; the run was trained with output.action_log=true."""
    step: int | None = None
    """Step to render, from 0; step 99 is the one whose row in metrics.jsonl says 100. Unset: the steps that are logged
    are listed."""
    first_slot: int = 0
    """Place in the global batch to begin with."""
    num_images: int | None = None
    """How many; unset: 8 for a picture, all of the step for tensors."""
    format: Literal["png", "tensors"] = "png"
    """png: a sheet of both views; tensors: source_view and target_view as uint8 (B, H, W, 3), action, slot, sample."""
    out: str = ""
    """File to write; unset: replay-step-00000099.png or .safetensors in the run folder."""
    shards: str = ""
    """Where the training shards are now, like data.train; unset: where they were."""
    backend: Backend | None = None
    """Which loader renders; unset: the run's runtime.loader, which gives the same pixels again."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where to render; unset: the run's runtime.device."""

    def __post_init__(self) -> None:
        check(self.step is None or self.step >= 0, "step", self.step, "be at least 0")
        check(self.first_slot >= 0, "first_slot", self.first_slot, "be at least 0")
        check(self.num_images is None or self.num_images >= 1, "num_images", self.num_images, "be at least 1 or unset")
