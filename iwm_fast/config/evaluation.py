"""Settings of the evaluations that train no network for long; used by the command line and Python, cheap to import."""

from dataclasses import dataclass, field
from typing import Literal

from iwm_fast.pipelines.config import require, require_image_extension, require_label_field, require_seed, require_size
from iwm_fast.pipelines.transforms.composition import FAMILIES

Readout = Literal["absolute", "difference"]
"""How the tokens of a changed image are read out of the predictor. absolute: its prediction for the action, as in the
paper; difference: the prediction for the action, minus that for no action, plus the source's own target tokens."""
READOUTS: tuple[Readout, ...] = ("absolute", "difference")


@dataclass(frozen=True, kw_only=True)
class EvalDataConfig:
    """Shards and labels to evaluate on."""

    train: str = ""
    """Shards that probes learn from, written like the run's data.train. Unset: the shards the run was trained on."""
    val: str = ""
    """Validation shards, on which the reported numbers are measured. Unset: the run's data.val."""
    image: str = ""
    """Member of each sample that is its image, such as left.jpg or jpg. Unset: the run's data.image."""
    label: str = "cls"
    """Label to predict: cls for the .cls members, or json.NAME for a field of the .json members (json.NAME.NAME for a
    nested field)."""
    max_pixels: int | None = None
    """Largest number of pixels of an image; larger ones are not decoded. Unset: the run's data.max_pixels."""

    def __post_init__(self) -> None:
        require_image_extension("data.image", self.image)
        require_label_field("data.label", self.label)
        limit = self.max_pixels
        require(limit is None or limit >= 1, "data.max_pixels", limit, "be at least 1 or unset")


def check_no_label(data: EvalDataConfig) -> None:
    """Check that the label is left unset, for an evaluation that uses none."""
    require(data.label == "cls", "data.label", data.label, "be left unset: this evaluation uses no labels")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings shared by the evaluations that train no network for long."""

    run: str = ""
    """Folder of the run, or of an export."""
    checkpoint: str = ""
    """Checkpoint to evaluate: a step, such as 1500, the path of a checkpoint's folder, or best for the one that
    output.keep_best kept. The names of the results then end with the step. Unset: the newest."""
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on. auto uses a GPU if there is one."""
    seed: int = 0
    """Seed of all random draws: banks, target changes, initial heads, the untrained control, bootstrap intervals."""

    def __post_init__(self) -> None:
        require_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """The size of the images of an evaluation, which may be another one than in training."""

    size: int | None = None
    """Side of the images in pixels, a multiple of the patch size; positions are recomputed for it, and the names of the
    results end with it. Unset: the run's views.size."""

    def __post_init__(self) -> None:
        require_size(self.size)
        # The other settings of an evaluation are in a class that follows this one.
        super().__post_init__()  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True, kw_only=True)
class BankConfig(EvalConfig):
    """Settings shared by the evaluations that look predictions up in banks of changed images."""

    num_images: int = 256
    """Number of validation images, evenly spaced over the data set; each has its own bank."""
    bank_size: int = 64
    """Jittered versions of an image that its predictions are looked up in."""
    bank: Literal["default", "strong", "run"] = "default"
    """Strengths of the changes in banks. default: the default settings of jitter; strong: about twice as strong; run:
    the strengths the run was trained with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_label(self.data)
        require(self.num_images >= 1, "num_images", self.num_images, "be at least 1")
        require(2 <= self.bank_size <= 100_000, "bank_size", self.bank_size, "be between 2 and 100000")


@dataclass(frozen=True, kw_only=True)
class FamilyConfig(SizeConfig, BankConfig):
    """Settings shared by the evaluations that test transformations one by one."""

    families: tuple[str, ...] | None = None
    """Transformations to test, by their groups in views, such as [jitter, blur]. Unset: all that are on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.families is not None:
            is_distinct = len(set(self.families)) == len(self.families) > 0
            require(is_distinct, "families", self.families, "name one or more families, without repetition")
            unknown = [family for family in self.families if family not in FAMILIES]
            require(not unknown, "families", unknown, f"name transformations of {', '.join(FAMILIES)}")


@dataclass(frozen=True, kw_only=True)
class MrrConfig(FamilyConfig):
    """How well the predictor applies a transformation: mean reciprocal rank of the correct image in a bank."""

    bank_size: int = 256
    """Jittered versions of an image in its bank; each of them is the correct answer once. The chance level depends on
    it: 0.024 for 256, 0.074 for 64."""
    families: tuple[str, ...] | None = None
    """Transformations to test, by their groups in views, such as [jitter, blur]. Those of both views predict a bank
    member from the clean image, those of the source view only from the corrupted image. Unset: all that are on."""


@dataclass(frozen=True, kw_only=True)
class SensitivityConfig(FamilyConfig):
    """How far a transformation moves the encoder's features, as a share of how far apart different images are."""

    bank_size: int = 16
    """Changed versions of each image."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(SizeConfig, BankConfig):
    """How far the world model carries: several actions in a row, compared with one action that does the same."""

    num_images: int = 64
    """Number of validation images, evenly spaced over the data set; each has its own bank."""
    max_actions: int = 5
    """Largest number of actions in a row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(2 <= self.max_actions <= 100, "max_actions", self.max_actions, "be between 2 and 100")


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(SizeConfig, EvalConfig):
    """Settings shared by the evaluations of frozen features."""

    layers: int = 1
    """Number of last layers of the encoder whose outputs, each after the final norm, are concatenated to features; DINO
    and I-JEPA also report 4. If it is above 1, the names of the results end with it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.layers >= 1, "layers", self.layers, "be at least 1")


@dataclass(frozen=True, kw_only=True)
class KnnConfig(FeatureConfig):
    """How well features separate classes: weighted vote of the nearest training images."""

    num_neighbors: int = 10
    """Number of nearest training images that vote."""
    temperature: float = 0.07
    """A neighbour with cosine similarity s votes with weight exp(s / temperature): low values favour the nearest."""
    max_train_samples: int = 50_000
    """Largest number of training images; if there are more, an evenly spaced subset is used."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_neighbors >= 1, "num_neighbors", self.num_neighbors, "be at least 1")
        require(self.temperature > 0, "temperature", self.temperature, "be above 0")
        require(self.max_train_samples >= 1, "max_train_samples", self.max_train_samples, "be at least 1")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(FeatureConfig):
    """Settings shared by the linear and the attentive probe: data and the search for hyperparameters."""

    max_train_samples: int | None = None
    """Largest number of training images; if there are more, an evenly spaced subset is used. Unset: all."""
    holdout: float = 0.1
    """Share of the training images that is held out to choose hyperparameters, between 0 and 1. The validation images
    are used once, at the end."""
    epochs: int = 100
    """Passes over the features of the training images that are not held out."""
    batch_size: int = 1024
    """Images per optimiser step."""
    lrs: tuple[float, ...] = (1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3)
    """Peak learning rates to search over (AdamW, cosine decay to 0); all heads are trained in one pass."""
    weight_decays: tuple[float, ...] = (0.0, 1e-3, 1e-1)
    """Weight decays to search over, combined with every learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = self.max_train_samples
        require(limit is None or limit >= 2, "max_train_samples", limit, "be at least 2 or unset")
        require(0 < self.holdout < 1, "holdout", self.holdout, "lie between 0 and 1")
        require(self.epochs >= 1, "epochs", self.epochs, "be at least 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "be at least 1")
        require(bool(self.lrs) and min(self.lrs) > 0, "lrs", self.lrs, "name learning rates above 0")
        is_fine = bool(self.weight_decays) and min(self.weight_decays) >= 0
        require(is_fine, "weight_decays", self.weight_decays, "name weight decays of at least 0")


@dataclass(frozen=True, kw_only=True)
class LinearConfig(ProbeConfig):
    """A linear classifier on frozen, mean-pooled features."""


@dataclass(frozen=True, kw_only=True)
class AttentiveConfig(ProbeConfig):
    """An attentive classifier on frozen tokens: a learned query attends to all patches."""

    epochs: int = 20
    """Passes over the tokens of the training images that are not held out."""
    batch_size: int = 256
    """Images per optimiser step."""
    lrs: tuple[float, ...] = (1e-2, 3e-3, 1e-3, 3e-4)
    """Peak learning rates to search over (AdamW, cosine decay to 0); all heads are trained in one pass."""
    weight_decays: tuple[float, ...] = (0.01,)
    """Weight decays to search over, combined with every learning rate."""
    max_cache_gb: float = 200.0
    """Largest size in GB (10^9 bytes) of the token cache on disk; a token takes 2 bytes per dimension."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_cache_gb > 0, "max_cache_gb", self.max_cache_gb, "be above 0")


@dataclass(frozen=True, kw_only=True)
class PcaConfig(FeatureConfig):
    """A picture of frozen features: the first three principal components of all patches as red, green and blue."""

    images: str = ""
    """Image file, or folder of images with its subfolders, to show instead of validation images."""
    num_images: int = 8
    """Largest number of images, one per column; if there are more, evenly spaced ones are shown."""
    picture: str = ""
    """PNG file NAME.png to write. Unset: pca.png in the run folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_label(self.data)
        require(not self.data.train, "data.train", self.data.train, "be unset; name the shards to show in data.val")
        require(not (self.images and self.data.val), "images and data.val", (self.images, self.data.val),
              "not both be set")  # fmt: skip
        require(1 <= self.num_images <= 100, "num_images", self.num_images, "be between 1 and 100")
        require(not self.picture or self.picture.endswith(".png"), "picture", self.picture, "end with .png")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(SizeConfig, EvalConfig):
    """Planning: find the change that turns one image into another, by the cross-entropy method over actions."""

    source: str = ""
    """Image file to start from. With target, the change between the two images is searched for and printed, and no
    metric is computed."""
    target: str = ""
    """Image file that the source should be turned into."""
    num_images: int = 128
    """Number of validation images, evenly spaced over the data set, each with one change to find."""
    num_train_images: int = 2048
    """Number of training images for the baseline, a regression of the change from frozen features."""
    population: int = 128
    """Candidate actions per round. On the demo's training images, more candidates or rounds found no better action."""
    rounds: int = 8
    """Rounds of the search; time grows in proportion."""
    elite_share: float = 0.1
    """Share of best candidates per round, which the next round's distribution is fitted to, between 0 and 1."""
    readout: Readout = "absolute"
    """What is compared with the target's tokens. absolute: the prediction for a candidate action; difference: that
    prediction, minus the prediction for no action, plus the source's own tokens. The result is then plan_difference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_label(self.data)
        require(bool(self.source) == bool(self.target), "source and target", (self.source, self.target),
              "both name image files, or both be unset")  # fmt: skip
        for name in ("num_images", "rounds"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "be at least 1")
        require(self.num_train_images >= 2, "num_train_images", self.num_train_images, "be at least 2")
        require(4 <= self.population <= 10**6, "population", self.population, "be between 4 and 1000000")
        require(0 < self.elite_share < 1, "elite_share", self.elite_share, "lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class ImagineConfig(BankConfig):
    """Pictures of predictions: source image, requested change, what was imagined (after `iwm decode`) and retrieved."""

    num_images: int = 6
    """Number of validation images, one per column; colourful and different ones are chosen."""
    image: str = ""
    """Image file of your own, which is shown instead of validation images, with a column for each of num_images
    changes. There are no plots then."""
    num_plotted: int = 64
    """Number of validation images of the plots of recovered parameters and ranks, evenly spaced over the data set."""
    steps: int = 7
    """Number of values at which each entry of the action is shown in the sweeps, from its minimum to its maximum."""
    picture: str = ""
    """PNG file NAME.png to write; NAME_sweeps.png, NAME_plots.png and the page NAME.html are written beside it. Unset:
    imagine.png, or imagine_NAME.png for an image of your own, in the run folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        no_shards = not (self.image and self.data.val)
        require(no_shards, "image and data.val", (self.image, self.data.val), "not both be set: one of them is shown")
        require(self.num_plotted >= 1, "num_plotted", self.num_plotted, "be at least 1")
        require(self.steps >= 2, "steps", self.steps, "be at least 2")
        require(self.steps <= 1000, "steps", self.steps, "be at most 1000")
        require(not self.picture or self.picture.endswith(".png"), "picture", self.picture, "end with .png")


@dataclass(frozen=True, kw_only=True)
class PlayConfig(BankConfig):
    """A page with sliders: what the world model imagines for any change of an image."""

    num_images: int = 6
    """Number of validation images to choose from; colourful and different ones are chosen."""
    host: str = "127.0.0.1"
    """Address to listen on. 127.0.0.1: only this machine can open the page. With 0.0.0.0 everyone in the network can,
    without a password."""
    port: int = 8765
    """Port to listen on; 0: any free one."""
    to: str = ""
    """HTML file NAME.html to write instead of serving a page: it needs no server, and shows one entry of the action at
    a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.port <= 65535, "port", self.port, "be between 0 and 65535")
        require(bool(self.host), "host", self.host, "be an address, such as 127.0.0.1")
        require(not self.to or self.to.endswith(".html"), "to", self.to, "end with .html")
