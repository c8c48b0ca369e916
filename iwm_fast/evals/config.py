"""Settings of the evaluations, for the command line and for Python; cheap to import."""

from dataclasses import dataclass, field
from typing import Literal

from pipelines.config import Backend, check


@dataclass(frozen=True, kw_only=True)
class EvalData:
    """Which shards to evaluate on."""

    train: str = ""
    """Shards for probes to learn from; unset: those the run was trained on."""
    val: str = ""
    """Shards to report on; unset: the run's data.val."""
    label: str = "cls"
    """What probes compare: cls, or json.NAME for a field of the .json members, json.NAME.NAME for one inside it."""

    def __post_init__(self) -> None:
        is_name = self.label == "cls" or (self.label.startswith("json.") and all(self.label.split(".")))
        check(is_name, "data.label", self.label, "be cls or json.NAME")


def _check_no_label(data: EvalData) -> None:
    check(data.label == "cls", "data.label", data.label, "be left unset: no labels are compared here")


@dataclass(frozen=True, kw_only=True)
class MrrConfig:
    """How well the predictor applies a transformation: mean reciprocal rank of the right image in a bank."""

    run: str = ""
    """Run folder."""
    data: EvalData = field(default_factory=EvalData)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    num_images: int = 256
    """Validation images, spread evenly over the set; each has a bank of its own."""
    bank_size: int = 256
    """Jittered versions of an image to choose from, every one asked for once. Chance depends on it."""
    bank: Literal["default", "run"] = "default"
    """Jitter strengths of the bank: brightness, contrast 0.4, saturation 0.2, hue 0.1, or the run's own."""
    seed: int = 0
    """Fixes the banks and the untrained control."""

    def __post_init__(self) -> None:
        _check_no_label(self.data)
        check(self.num_images >= 1, "num_images", self.num_images, "be at least 1")
        check(self.bank_size >= 2, "bank_size", self.bank_size, "be at least 2")


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Whether like images have like features: weighted vote of the nearest training images."""

    run: str = ""
    """Run folder."""
    data: EvalData = field(default_factory=EvalData)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    num_neighbors: int = 10
    """Training images that vote."""
    temperature: float = 0.07
    """A neighbour of cosine similarity s votes with weight exp(s / temperature)."""
    max_train_samples: int = 50_000
    """At most so many training images, spread evenly over the set."""
    seed: int = 0
    """Fixes the untrained control."""

    def __post_init__(self) -> None:
        check(self.num_neighbors >= 1, "num_neighbors", self.num_neighbors, "be at least 1")
        check(self.temperature > 0, "temperature", self.temperature, "be above 0")
        check(self.max_train_samples >= 1, "max_train_samples", self.max_train_samples, "be at least 1")


@dataclass(frozen=True, kw_only=True)
class ImagineConfig:
    """A picture of the world model at work: source, asked-for change, true rendering, retrieved image."""

    run: str = ""
    """Run folder."""
    data: EvalData = field(default_factory=EvalData)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    num_images: int = 6
    """Validation images, one column each."""
    bank_size: int = 64
    """Jittered versions to retrieve from."""
    bank: Literal["default", "run"] = "run"
    """Jitter strengths of the bank: the defaults of views, or the run's own."""
    seed: int = 0
    """Fixes images and banks."""
    picture: str = ""
    """PNG file to write; unset: imagine.png in the run folder."""

    def __post_init__(self) -> None:
        _check_no_label(self.data)
        check(self.num_images >= 1, "num_images", self.num_images, "be at least 1")
        check(self.bank_size >= 2, "bank_size", self.bank_size, "be at least 2")


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """The views of one step of training, rendered again from the run's action log."""

    run: str = ""
    """Run folder; the run was trained with output.action_log=true."""
    step: int | None = None
    """Which step, from 0: in metrics.jsonl step 100 stands behind step 99. If unset, you are told which there are."""
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
