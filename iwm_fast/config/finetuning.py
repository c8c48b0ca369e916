"""Settings of the evaluations that train networks: finetune, multitask, segment, decode; cheap to import."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from iwm_fast.config.evaluation import EvalDataConfig, SizeConfig, check_no_label
from iwm_fast.config.run import OptimConfig, RuntimeConfig, check_length, check_transformer, resolve_warmup
from iwm_fast.pipelines.config import RandAugmentConfig, require, require_seed
from iwm_fast.pipelines.transforms.composition import ViewConfig

ARMS = ("encoder", "predictor", "random_predictor", "attentive", "end_to_end")
"""Variants of finetuning. encoder: the encoder and a linear head are trained; predictor: the pretrained predictor and
an attentive head, on the frozen encoder; random_predictor: like predictor, from random weights; attentive: an attentive
head alone, on the frozen encoder; end_to_end: encoder, predictor and head."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Optimisation of finetuning: AdamW, linear warm-up, cosine decay to 0. The defaults are for ImageNet; the
    paper's are known for the epochs and the ratio of learning rates only.
    """

    global_batch_size: int = 1024
    """Images per optimiser step over all ranks and micro-batches."""
    epochs: float = 100.0
    """Passes over the training samples."""
    warmup_epochs: float | None = None
    """Epochs in which the learning rate rises linearly from 0 to its peak. Unset: the same share of epochs as 5 of
    100."""
    lr: float = 1e-3
    """Peak learning rate of weights that start from scratch: heads and a random predictor."""
    pretrained_lr_factor: float = 0.1
    """Factor on lr for a pretrained predictor and, in the arm end_to_end, for the encoder too."""
    encoder_lr: float = 2e-3
    """Peak learning rate in the arm encoder, for the encoder and its linear head."""
    layer_decay: float = 0.65
    """Layer-wise learning-rate decay in the arm encoder: a layer's rate is multiplied by this factor once per layer
    between it and the head. 1 means equal rates."""
    end_to_end_layer_decay: float = 0.9
    """Layer-wise learning-rate decay in the arm end_to_end, over the layers of encoder and predictor together."""
    weight_decay: float = 0.05
    """Weight decay of matrices. Biases, norms and learned tokens are not decayed."""
    drop_path: float = 0.2
    """Stochastic depth: probability that an image skips the last block's residual branches in training, rising linearly
    from 0 at the first block."""
    clip_norm: float | None = 1.0
    """Global gradient norm above which gradients are scaled down. Unset: no clipping."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment, each in [0, 1)."""
    precision: Literal["bf16", "fp32"] | None = None
    """Precision of forward and backward passes. Weights are always float32. Unset: that of the run's training;
    bf16 for a model of timm."""
    blocks: int | None = None
    """Number of blocks to train below the head, counted from the head: of the encoder or of the predictor, depending on
    the arm; in the arm end_to_end first of the predictor, then of the encoder. All layers below them are frozen. 0
    trains the head alone. Unset: everything is trained, also the layers below the first block."""
    encoder: Literal["teacher", "student"] = "teacher"
    """Encoder to start from. teacher: the EMA teacher; student: the encoder that was trained by gradient descent."""
    action: Literal["null", "drawn"] = "null"
    """Action that the predictor is given in training. null: no change; drawn: the action of a change that pretraining
    would draw, although the image is not changed. Validation always uses the null action."""
    context: Literal["full", "masked"] = "full"
    """Patches that encoder and predictor see in training in arms with a predictor. full: all; masked: the context
    patches of masks that are drawn as in pretraining. All patches are predicted. Validation always uses all patches."""

    def __post_init__(self) -> None:
        check_length("tune", self.global_batch_size, self.epochs)
        blocks = self.blocks
        require(blocks is None or blocks >= 0, "tune.blocks", blocks, "be at least 0 or unset")
        resolve_warmup("tune", self, recipe=(5, 100))
        for name in ("lr", "encoder_lr", "pretrained_lr_factor"):
            require(getattr(self, name) > 0, f"tune.{name}", getattr(self, name), "be above 0")
        for name in ("layer_decay", "end_to_end_layer_decay"):
            require(0 < getattr(self, name) <= 1, f"tune.{name}", getattr(self, name), "lie in (0, 1]")
        require(self.weight_decay >= 0, "tune.weight_decay", self.weight_decay, "be at least 0")
        require(0 <= self.drop_path < 1, "tune.drop_path", self.drop_path, "lie in [0, 1)")
        require(self.clip_norm is None or self.clip_norm > 0, "tune.clip_norm", self.clip_norm, "be above 0 or unset")
        require(all(0 <= beta < 1 for beta in self.betas), "tune.betas", self.betas, "lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of training images: crop, flip and RandAugment by the loader, the rest by timm on batches."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a random crop covers."""
    flip: float = 0.5
    """Probability of a horizontal flip. Use 0 if labels depend on left and right."""
    rand_augment: bool = True
    """Whether RandAugment is applied."""
    operations: RandAugmentConfig = field(default_factory=RandAugmentConfig)
    """Number and strength of RandAugment's operations."""
    mixup: float = 0.8
    """Alpha of mixup's Beta distribution. 0 turns mixup off."""
    cutmix: float = 1.0
    """Alpha of CutMix's Beta distribution. 0 turns CutMix off; with mixup, one of the two is chosen per micro-batch."""
    erasing: float = 0.25
    """Probability that a random rectangle of the image is erased (random erasing)."""
    label_smoothing: float = 0.1
    """Share of the target probability that is spread evenly over all classes, in [0, 1)."""

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "augment.crop_scale", self.crop_scale, "satisfy 0 < low <= high <= 1")
        require(0 <= self.flip <= 1, "augment.flip", self.flip, "lie between 0 and 1")
        require(self.mixup >= 0, "augment.mixup", self.mixup, "be at least 0")
        require(self.cutmix >= 0, "augment.cutmix", self.cutmix, "be at least 0")
        require(0 <= self.erasing <= 1, "augment.erasing", self.erasing, "lie between 0 and 1")
        require(0 <= self.label_smoothing < 1, "augment.label_smoothing", self.label_smoothing, "lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class DenseAugmentConfig(AugmentConfig):
    """Augmentation for dense labels: crops and flips, which are applied to the label maps too, and nothing else.

    The other settings exist only because all evaluations share them; they must stay off.
    """

    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Smallest and largest share of the image's area that a random crop covers."""
    rand_augment: bool = False
    """Must stay false: RandAugment rotates and shears images, and the label maps would no longer match."""
    mixup: float = 0.0
    """Must stay 0: a pixel has one class."""
    cutmix: float = 0.0
    """Must stay 0: a pixel has one class."""
    erasing: float = 0.0
    """Must stay 0: erased pixels have no class."""
    label_smoothing: float = 0.0
    """Must stay 0: the loss uses the classes of the label maps as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rand_augment", "mixup", "cutmix", "erasing", "label_smoothing"):
            value = getattr(self, name)
            require(not value, f"augment.{name}", value,
                  "be off where each pixel has a label; crop_scale and flip may be set")  # fmt: skip
        require(self.operations == RandAugmentConfig(), "augment.operations", self.operations,
              "be left unset: RandAugment is off here")  # fmt: skip


# The learning rate rises from 0 and, by the last step, has returned to it.
_TO_ZERO: dict[str, Any] = {"lr_start": 0.0, "lr_end": 0.0, "schedule_stretch": 1.0}


@dataclass(frozen=True, kw_only=True)
class TrainedEvalConfig:
    """Settings shared by the evaluations that train networks."""

    run: str = ""
    """Folder of the run, or of an export."""
    checkpoint: str = ""
    """Checkpoint to start from: a step, such as 1500, the path of a checkpoint's folder, or best for the one that
    output.keep_best kept. The names of results and trained networks then end with the step. Unset: the newest."""
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Settings of computation, with the same meaning as in pretraining: engine, ZeRO stage, micro-batch, loader."""
    name: str = ""
    """Name of this attempt, appended to the names of its results and checkpoints so that several attempts can coexist.
    Letters, digits, dots, dashes and underscores."""
    log_every: int = 50
    """Optimiser steps between two rows in metrics.jsonl."""
    checkpoint_every: int = 1000
    """Optimiser steps between two checkpoints."""
    seed: int = 0
    """Seed of initial weights, sample order, augmentation and bootstrap intervals."""

    def __post_init__(self) -> None:
        require_seed(self.seed)
        is_plain = all(letter.isalnum() or letter in "._-" for letter in self.name)
        require(is_plain, "name", self.name, "consist of letters, digits, dots, dashes and underscores")
        for name in ("log_every", "checkpoint_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "be at least 1")


@dataclass(frozen=True, kw_only=True)
class TuneTaskConfig(SizeConfig, TrainedEvalConfig):
    """Settings shared by the evaluations that finetune networks on labels."""

    tune: TuneConfig = field(default_factory=TuneConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def optim(self, num_samples: int) -> OptimConfig:
        """Return the optimisation, except its precision, in the form that engines and schedules accept."""
        tune = self.tune
        return OptimConfig(
            global_batch_size=tune.global_batch_size,
            epochs=tune.epochs,
            warmup_epochs=tune.warmup_epochs,
            lr=tune.lr,
            weight_decay=(tune.weight_decay, tune.weight_decay),
            betas=tune.betas,
            clip_norm=tune.clip_norm,
            **_TO_ZERO,
        )

    def training_views(self, views: ViewConfig) -> ViewConfig:
        """Return a run's views with crops and flips of the augmentation."""
        crop = replace(views.crop, scale=self.augment.crop_scale)
        return replace(views, crop=crop, flip=replace(views.flip, probability=self.augment.flip))


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TuneTaskConfig):
    """Is the predictor worth keeping? Classification learned by up to five variants of the network, called arms."""

    arms: str = "all"
    """Arms to train, joined by commas, or all. encoder: encoder and linear head; predictor: pretrained predictor and
    attentive head on the frozen encoder; random_predictor: like predictor, from random weights; attentive: attentive
    head alone; end_to_end: encoder, predictor and head."""
    timm: str = ""
    """Name of a timm ViT to finetune as a baseline instead of a run's encoder, such as vit_base_patch16_224.mae; the
    tag after the dot selects the pixel normalisation. Set `to` instead of `run`."""
    weights: str = ""
    """File with the weights of the timm model, .safetensors or .pth. Unset: random weights."""
    to: str = ""
    """Folder for the results of a timm model."""
    size: int | None = None
    """Side of the images in pixels, a multiple of the patch size; positions are recomputed for it, and the names of the
    results end with it. Unset: the run's views.size, or 224 for a timm model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        arms = self.chosen_arms
        unknown = [arm for arm in arms if arm not in ARMS]
        require(not unknown and len(set(arms)) == len(arms), "arms", self.arms,
              f"be all, or name some of {', '.join(ARMS)} once each, joined by commas")  # fmt: skip
        if self.timm:
            require(self.tune.encoder == "teacher", "tune.encoder", self.tune.encoder, "be left unset if timm is set")
            require(not self.checkpoint, "checkpoint", self.checkpoint, "be unset if timm is set")
            require(
                not self.run and bool(self.to), "to", self.to, "name a folder if timm is set, and run must be unset"
            )
            require(self.arms in ("all", "encoder"), "arms", self.arms, "be encoder or unset if timm is set")
        else:
            require(not (self.weights or self.to), "timm", self.timm, "name a model if weights or to is set")

    @property
    def chosen_arms(self) -> tuple[str, ...]:
        """Arms to train, in the order of the result table."""
        if self.arms == "all":
            return ARMS if not self.timm else ("encoder",)
        return tuple(self.arms.split(","))


@dataclass(frozen=True, kw_only=True)
class MultitaskConfig(TuneTaskConfig):
    """One predictor for several tasks, each with a learned token, compared with one predictor per task.

    Each batch is split evenly between the T tasks, so a task sees tune.global_batch_size / T images per step. A
    predictor of a single task takes as many steps on as many images of its task: 1/T of the batch and of the epochs.
    """

    tasks: str = ""
    """YAML file with one line per task, `NAME: {label: cls, weight: 1.0}`: label as in data.label, weight of its
    loss."""
    single: bool = True
    """Whether one predictor per task is trained for comparison, which takes about as long again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.data.label == "cls", "data.label", self.data.label, "be left unset: the file of tasks names the labels"
        )
        for name, default in (("action", "null"), ("context", "full")):
            value = getattr(self.tune, name)
            require(value == default, f"tune.{name}", value, f"be {default}; only finetune and segment have others")


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(TuneTaskConfig):
    """Segmentation by a linear classifier of patch tokens from encoder or predictor; labels are PNGs in the shards."""

    augment: DenseAugmentConfig = field(default_factory=DenseAugmentConfig)
    arms: str = "head,untrained_head,predictor,random_predictor,encoder"
    """Arms to train, joined by commas. head: linear head alone on the frozen encoder; untrained_head: its control, on
    an untrained encoder; predictor: the pretrained predictor and head on the frozen encoder; random_predictor: like
    predictor, from random weights; encoder: encoder and head; end_to_end: encoder, predictor and head."""
    num_classes: int | None = None
    """Number of classes, numbered from 0 in the label maps. Unset: all label maps are read once to find the largest
    class, about 2 minutes for 20,000 images on a few cores."""
    ignore_index: int = 255
    """Value in the label maps that is ignored by the loss and by mean IoU."""
    num_shown: int = 6
    """Number of validation images in the picture of predictions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        accepted = ("head", "untrained_head", "predictor", "random_predictor", "encoder", "end_to_end")
        arms = self.arms.split(",")
        require(set(arms) <= set(accepted) and len(set(arms)) == len(arms), "arms", self.arms,
              f"name some of {', '.join(accepted)} once each, joined by commas")  # fmt: skip
        require(
            self.data.label == "cls", "data.label", self.data.label, "be left unset: the labels are segmentation maps"
        )
        require(0 <= self.ignore_index <= 255, "ignore_index", self.ignore_index, "be between 0 and 255")
        classes = self.num_classes
        require(classes is None or 1 <= classes <= 256, "num_classes", classes, "be between 1 and 256, or unset")
        require(self.num_shown >= 1, "num_shown", self.num_shown, "be at least 1")


@dataclass(frozen=True, kw_only=True)
class PixelDecoderConfig:
    """Sizes of the pixel decoder, a transformer from tokens to pixels."""

    dim: int = 256
    """Width of the decoder's tokens, a multiple of 4."""
    depth: int = 2
    """Number of transformer blocks. 0 is a linear map from each token to the pixels of its patch."""
    num_heads: int = 4
    """Number of attention heads; must divide dim."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP, as a multiple of dim."""

    def __post_init__(self) -> None:
        check_transformer("decoder", self, min_depth=0)


@dataclass(frozen=True, kw_only=True)
class DecoderTuneConfig:
    """Optimisation of the pixel decoder: AdamW, linear warm-up over 5 % of the steps, cosine decay to 0."""

    steps: int = 2000
    """Number of optimiser steps."""
    global_batch_size: int = 64
    """Images per optimiser step over all ranks and micro-batches; both views of each image are decoded."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Weight decay of matrices. Biases and norms are not decayed."""
    precision: Literal["bf16", "fp32"] | None = None
    """Precision of forward and backward passes. Weights are always float32. Unset: that of the run's training."""

    def __post_init__(self) -> None:
        require(1 <= self.steps <= 10**9, "tune.steps", self.steps, "be between 1 and 10^9")
        check_length("tune", self.global_batch_size, epochs=1.0)
        require(self.lr > 0, "tune.lr", self.lr, "be above 0")
        require(self.weight_decay >= 0, "tune.weight_decay", self.weight_decay, "be at least 0")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(TrainedEvalConfig):
    """A pixel decoder of the teacher's tokens, trained on the run's own crops and jitter, and how well it decodes."""

    decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)
    tune: DecoderTuneConfig = field(default_factory=DecoderTuneConfig)
    controls: bool = True
    """Whether a linear decoder, and a decoder of an untrained encoder's tokens, are trained alike for comparison, which
    more than doubles the time."""
    num_images: int = 1024
    """Largest number of validation images to measure on, evenly spaced over the data set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_label(self.data)
        require(self.num_images >= 1, "num_images", self.num_images, "be at least 1")

    def optim(self, num_samples: int) -> OptimConfig:
        """Return the optimisation, except its precision, in the form that engines and schedules accept."""
        tune = self.tune
        # Half a step less, because the number of steps is rounded up.
        epochs = (tune.steps - 0.5) * tune.global_batch_size / num_samples
        return OptimConfig(
            global_batch_size=tune.global_batch_size,
            epochs=epochs,
            warmup_epochs=epochs / 20,
            lr=tune.lr,
            weight_decay=(tune.weight_decay, tune.weight_decay),
            **_TO_ZERO,
        )

    def training_views(self, views: ViewConfig) -> ViewConfig:
        """Return the views of the run, on which its own encoder was trained."""
        return views


TrainedSettings = TuneTaskConfig | DecodeConfig
"""Settings of any evaluation that trains networks."""
