"""Settings of the tasks that train networks: finetune, multitask, segment; cheap to import."""

from dataclasses import dataclass, field
from typing import Literal

from iwm_fast.config.evaluation import EvalData
from iwm_fast.config.run import RuntimeConfig
from iwm_fast.pipelines.config import RandAugmentConfig, check

ARMS = ("encoder", "predictor", "random_predictor", "attentive", "end_to_end")
"""encoder: encoder and linear head; predictor: the world model and an attentive head on the frozen encoder;
random_predictor: the same from new weights; attentive: the head alone; end_to_end: encoder, world model and head."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """How networks are finetuned: AdamW, linear warm-up, cosine to 0. Defaults are the paper's for ImageNet."""

    global_batch_size: int = 1024
    """Images per optimiser step over all ranks and micro-batches."""
    epochs: float = 100.0
    """Passes over the training samples."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up from 0."""
    lr: float = 1e-3
    """Peak learning rate of what starts from new weights: heads, a random predictor."""
    pretrained_lr_factor: float = 0.1
    """What the learning rate of a pretrained predictor is multiplied with, and with it an encoder's under one."""
    encoder_lr: float = 2e-3
    """Peak learning rate of the encoder finetuned without a predictor, and of its linear head."""
    layer_decay: float = 0.65
    """What each layer's learning rate is multiplied with per layer above it, the head being the topmost, in an encoder
    that is finetuned."""
    end_to_end_layer_decay: float = 0.9
    """The same in encoder and predictor, one above the other, where both are finetuned."""
    weight_decay: float = 0.05
    """Of matrices; biases, norms and tokens have none."""
    drop_path: float = 0.2
    """Share of images that skip the last block's updates in training; rises linearly from 0 at the first block."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; unset: no clipping."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment coefficients."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the networks; weights are always float32."""

    def __post_init__(self) -> None:
        check(self.global_batch_size >= 1, "tune.global_batch_size", self.global_batch_size, "be at least 1")
        check(self.epochs > 0, "tune.epochs", self.epochs, "be above 0")
        accepted = f"lie in [0, epochs = {self.epochs:g})"
        check(0 <= self.warmup_epochs < self.epochs, "tune.warmup_epochs", self.warmup_epochs, accepted)
        for name in ("lr", "encoder_lr", "pretrained_lr_factor"):
            check(getattr(self, name) > 0, f"tune.{name}", getattr(self, name), "be above 0")
        for name in ("layer_decay", "end_to_end_layer_decay"):
            check(0 < getattr(self, name) <= 1, f"tune.{name}", getattr(self, name), "lie in (0, 1]")
        check(self.weight_decay >= 0, "tune.weight_decay", self.weight_decay, "be at least 0")
        check(0 <= self.drop_path < 1, "tune.drop_path", self.drop_path, "lie in [0, 1)")
        check(self.clip_norm is None or self.clip_norm > 0, "tune.clip_norm", self.clip_norm, "be above 0 or unset")
        check(all(0 <= beta < 1 for beta in self.betas), "tune.betas", self.betas, "lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training images are changed: crop, flip and RandAugment by DALI, the rest by timm on batches."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a crop covers."""
    flip: float = 0.5
    """Probability that an image is mirrored; 0 where left and right matter to the labels."""
    rand_augment: bool = True
    """Whether RandAugment is applied."""
    operations: RandAugmentConfig = field(default_factory=RandAugmentConfig)
    """How."""
    mixup: float = 0.8
    """Alpha of mixup, 0: none."""
    cutmix: float = 1.0
    """Alpha of cutmix, 0: none; with mixup, one of both is chosen for each micro-batch."""
    erasing: float = 0.25
    """Probability that a rectangle of the image is erased."""
    label_smoothing: float = 0.1
    """Share of the label that is spread over all classes."""

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        check(0 < low <= high <= 1, "augment.crop_scale", self.crop_scale, "satisfy 0 < low <= high <= 1")
        check(0 <= self.flip <= 1, "augment.flip", self.flip, "lie between 0 and 1")
        check(self.mixup >= 0, "augment.mixup", self.mixup, "be at least 0")
        check(self.cutmix >= 0, "augment.cutmix", self.cutmix, "be at least 0")
        check(0 <= self.erasing <= 1, "augment.erasing", self.erasing, "lie between 0 and 1")
        check(0 <= self.label_smoothing < 1, "augment.label_smoothing", self.label_smoothing, "lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class DenseAugmentConfig(AugmentConfig):
    """How training images are changed where each pixel has a label: crop and flip, which labels follow, nothing else.

    The other settings are there because tasks share them, and must stay as they are.
    """

    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Share of the image's area that a crop covers."""
    rand_augment: bool = False
    """Not here: it turns and shears images, and labels would stay where they are."""
    mixup: float = 0.0
    """Not here: a pixel has one class."""
    cutmix: float = 0.0
    """Not here, likewise."""
    erasing: float = 0.0
    """Not here: what is erased has no class."""
    label_smoothing: float = 0.0
    """Not here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rand_augment", "mixup", "cutmix", "erasing", "label_smoothing"):
            value = getattr(self, name)
            check(not value, f"augment.{name}", value,
                  "be off where each pixel has a label; crop_scale and flip may be set")  # fmt: skip
        check(self.operations == RandAugmentConfig(), "augment.operations", self.operations,
              "be left unset: RandAugment is off here")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TuneTask:
    """What is the same for all tasks that train."""

    run: str = ""
    """Run folder, or export."""
    data: EvalData = field(default_factory=EvalData)
    tune: TuneConfig = field(default_factory=TuneConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """As in training: engine, ZeRO stage, micro-batch, loader."""
    name: str = ""
    """Tells this attempt from others of the same task; its results and checkpoints carry it."""
    log_every: int = 50
    """Steps between two rows of numbers."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    seed: int = 0
    """Fixes new weights, order, augmentation and intervals."""

    def __post_init__(self) -> None:
        is_plain = all(letter.isalnum() or letter in "._-" for letter in self.name)
        check(is_plain, "name", self.name, "be of letters, digits, dots, dashes and underscores")
        for name in ("log_every", "checkpoint_every"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "be at least 1")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TuneTask):
    """Is the predictor worth keeping? The same task learnt by encoder, predictor, new predictor, head and all."""

    arms: str = "all"
    """Which, joined by commas: encoder, predictor, random_predictor, attentive, end_to_end."""
    timm: str = ""
    """Name of a timm ViT whose encoder arm is measured instead of a run's, with its tag if it has one, which says how
    pixels are normalised (vit_base_patch16_224.mae); then give `to` instead of `run`."""
    weights: str = ""
    """Its weights, a .safetensors or .pth file; unset: new ones."""
    to: str = ""
    """Folder for the results, where there is no run."""
    image_size: int = 224
    """Side of the images, where there is no run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.chosen_arms
        unknown = [arm for arm in given if arm not in ARMS]
        check(not unknown and len(set(given)) == len(given), "arms", self.arms,
              f"be all, or name some of {', '.join(ARMS)} once each, joined by commas")  # fmt: skip
        if self.timm:
            check(not self.run and bool(self.to), "to", self.to, "name a folder where timm is given, and run be unset")
            check(self.arms in ("all", "encoder"), "arms", self.arms, "be encoder or unset where timm is given")
        else:
            check(not (self.weights or self.to), "timm", self.timm, "name a model where weights or to are given")

    @property
    def chosen_arms(self) -> tuple[str, ...]:
        """Return the arms to be measured, in the order of the table."""
        if self.arms == "all":
            return ARMS if not self.timm else ("encoder",)
        return tuple(self.arms.split(","))


@dataclass(frozen=True, kw_only=True)
class MultitaskConfig(TuneTask):
    """One predictor for several tasks, a token for each, beside one predictor per task.

    Each batch is split between the tasks, so one of T tasks sees tune.global_batch_size / T images per step. A
    predictor of one task alone gets as many steps and as many images of its task: a T-th of batch and epochs.
    """

    tasks: str = ""
    """YAML file that names the tasks: `NAME: {label: cls, weight: 1.0}`; label as in data.label."""
    single: bool = True
    """Whether the predictors of one task each are trained, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.data.label == "cls", "data.label", self.data.label, "be left unset: the file of tasks names labels")


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(TuneTask):
    """A linear classifier of patches, on the encoder's tokens or the predictor's; labels are PNGs in the shards."""

    augment: DenseAugmentConfig = field(default_factory=DenseAugmentConfig)
    arms: str = "head,untrained_head,predictor,random_predictor,encoder"
    """Which, joined by commas. head: a linear head alone on the frozen encoder; untrained_head: on an encoder as it was
    before training, head's control; predictor and random_predictor: with a world model under the head, from the run's
    weights or new ones; encoder: encoder and head."""
    num_classes: int | None = None
    """Classes are numbered from 0 in the masks; unset: all masks are read once to find out, about 2 minutes for 20,000
    on few cores."""
    ignore_index: int = 255
    """Mask value that counts neither in the loss nor in the measure."""
    num_shown: int = 6
    """Validation images in the picture."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("head", "untrained_head", "predictor", "random_predictor", "encoder")
        given = self.arms.split(",")
        check(set(given) <= set(known) and len(set(given)) == len(given), "arms", self.arms,
              f"name some of {', '.join(known)} once each, joined by commas")  # fmt: skip
        check(self.data.label == "cls", "data.label", self.data.label, "be left unset: labels are masks here")
        check(0 <= self.ignore_index <= 255, "ignore_index", self.ignore_index, "be between 0 and 255")
        classes = self.num_classes
        check(classes is None or 1 <= classes <= 256, "num_classes", classes, "be between 1 and 256, or unset")
        check(self.num_shown >= 1, "num_shown", self.num_shown, "be at least 1")
