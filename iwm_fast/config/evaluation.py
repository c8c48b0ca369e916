"""Settings of the evaluations that need no long training, for the command line and for Python; cheap to import."""

from dataclasses import dataclass, field
from typing import Literal

from iwm_fast.pipelines.config import check, check_label_field

Family = Literal["jitter", "grayscale", "blur", "solarize"]


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
        check_label_field("data.label", self.label)


def _check_no_label(data: EvalData) -> None:
    check(data.label == "cls", "data.label", data.label, "be left unset: no labels are compared here")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is the same for all evaluations that need no long training."""

    run: str = ""
    """Run folder, or export."""
    data: EvalData = field(default_factory=EvalData)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    seed: int = 0
    """Fixes everything drawn: banks, changes, heads, the untrained control, intervals."""


@dataclass(frozen=True, kw_only=True)
class MrrConfig(EvalConfig):
    """How well the predictor applies a transformation: mean reciprocal rank of the right image in a bank."""

    num_images: int = 256
    """Validation images, spread evenly over the set; each has a bank of its own."""
    bank_size: int = 256
    """Jittered versions of an image to choose from, every one asked for once. Chance depends on it."""
    bank: Literal["default", "strong", "run"] = "default"
    """Jitter strengths of the bank: brightness, contrast 0.4, saturation 0.2, hue 0.1; 0.8, 0.8, 0.8, 0.2; or the
    run's own."""
    families: tuple[Family, ...] = ("jitter", "grayscale", "blur", "solarize")
    """What is asked for: jitter forward, clean image to bank member; the others backward, from the destroyed image to
    the bank member, as training shows them."""

    def __post_init__(self) -> None:
        _check_no_label(self.data)
        check(self.num_images >= 1, "num_images", self.num_images, "be at least 1")
        check(self.bank_size >= 2, "bank_size", self.bank_size, "be at least 2")
        check(len(set(self.families)) == len(self.families) > 0, "families", self.families, "name families once")


@dataclass(frozen=True, kw_only=True)
class KnnConfig(EvalConfig):
    """Whether like images have like features: weighted vote of the nearest training images."""

    num_neighbors: int = 10
    """Training images that vote."""
    temperature: float = 0.07
    """A neighbour of cosine similarity s votes with weight exp(s / temperature)."""
    max_train_samples: int = 50_000
    """At most so many training images, spread evenly over the set."""

    def __post_init__(self) -> None:
        check(self.num_neighbors >= 1, "num_neighbors", self.num_neighbors, "be at least 1")
        check(self.temperature > 0, "temperature", self.temperature, "be above 0")
        check(self.max_train_samples >= 1, "max_train_samples", self.max_train_samples, "be at least 1")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(EvalConfig):
    """What is the same for both probes: data, and how hyperparameters are chosen."""

    max_train_samples: int | None = None
    """At most so many training images, spread evenly over the set; unset: all."""
    holdout: float = 0.1
    """Share of the training images on which hyperparameters are chosen; validation is looked at once, at the end."""
    epochs: int = 100
    """Passes over the features of the remaining training images."""
    batch_size: int = 1024
    """Images of one step."""
    lrs: tuple[float, ...] = (1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3)
    """Peak learning rates, AdamW, all trained together; cosine to 0."""
    weight_decays: tuple[float, ...] = (0.0, 1e-3, 1e-1)
    """Weight decays, each with each learning rate."""

    def __post_init__(self) -> None:
        most = self.max_train_samples
        check(most is None or most >= 2, "max_train_samples", most, "be at least 2 or unset")
        check(0 < self.holdout < 1, "holdout", self.holdout, "lie between 0 and 1")
        check(self.epochs >= 1, "epochs", self.epochs, "be at least 1")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "be at least 1")
        check(bool(self.lrs) and min(self.lrs) > 0, "lrs", self.lrs, "name learning rates above 0")
        fine = bool(self.weight_decays) and min(self.weight_decays) >= 0
        check(fine, "weight_decays", self.weight_decays, "name weight decays of at least 0")


@dataclass(frozen=True, kw_only=True)
class LinearConfig(ProbeConfig):
    """A linear classifier on frozen, mean-pooled features."""


@dataclass(frozen=True, kw_only=True)
class AttentiveConfig(ProbeConfig):
    """An attentive classifier on frozen tokens: one learned query looks at all patches."""

    epochs: int = 20
    """Passes over the tokens of the remaining training images."""
    batch_size: int = 256
    """Images of one step."""
    lrs: tuple[float, ...] = (1e-2, 3e-3, 1e-3, 3e-4)
    """Peak learning rates, AdamW, all trained together; cosine to 0."""
    weight_decays: tuple[float, ...] = (0.01,)
    """Weight decays, each with each learning rate."""
    max_cache_gb: float = 200.0
    """Room that the tokens of all images may take on the disk, in GB, two bytes a number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.max_cache_gb > 0, "max_cache_gb", self.max_cache_gb, "be above 0")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(EvalConfig):
    """Which change leads from one image to another: the world model searched by the cross-entropy method."""

    source: str = ""
    """An image file to start from; with target, their change is looked for and nothing is measured."""
    target: str = ""
    """The image file that it should become."""
    num_images: int = 128
    """Validation images, spread evenly over the set, each with a change to be found."""
    num_train_images: int = 2048
    """Training images that the regression on frozen features learns from."""
    population: int = 128
    """Actions tried in each round. On the demo's training images more of them, or more rounds, found nothing nearer."""
    rounds: int = 8
    """Rounds of the search."""
    elite_share: float = 0.1
    """Share of the actions that the next round is drawn from."""

    def __post_init__(self) -> None:
        _check_no_label(self.data)
        check(bool(self.source) == bool(self.target), "source and target", (self.source, self.target),
              "both name image files, or both be unset")  # fmt: skip
        for name in ("num_images", "rounds"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "be at least 1")
        check(self.num_train_images >= 2, "num_train_images", self.num_train_images, "be at least 2")
        check(self.population >= 4, "population", self.population, "be at least 4")
        check(0 < self.elite_share < 1, "elite_share", self.elite_share, "lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class ImagineConfig(EvalConfig):
    """A picture of the world model at work: source, asked-for change, true rendering, retrieved image."""

    num_images: int = 6
    """Validation images, one column each."""
    bank_size: int = 64
    """Jittered versions to retrieve from."""
    bank: Literal["default", "strong", "run"] = "run"
    """Jitter strengths of the bank: the defaults of views, strong ones, or the run's own."""
    steps: int = 7
    """Values of each entry of the action in the sweeps, from its lower to its upper end."""
    picture: str = ""
    """PNG file to write, NAME_sweeps.png and the page NAME.html beside it; unset: imagine.png in the run folder."""

    def __post_init__(self) -> None:
        _check_no_label(self.data)
        check(self.num_images >= 1, "num_images", self.num_images, "be at least 1")
        check(self.bank_size >= 2, "bank_size", self.bank_size, "be at least 2")
        check(self.steps >= 2, "steps", self.steps, "be at least 2")
        check(not self.picture or self.picture.endswith(".png"), "picture", self.picture, "end with .png")
