"""Settings of the commands before and behind a run, for the command line and for Python; cheap to import."""

from dataclasses import dataclass

from pipelines.config import check


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
