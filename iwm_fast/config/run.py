"""Settings of a training run; `iwm_fast.config.loading` reads and writes them.

Groups are separated by effect. `data`, `views`, `mask`, `model`, `objective` and `optim` may change what is learned and
form the fingerprint; `runtime` and `output` must not. Importing this file must stay cheap: `--help` reads it.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from iwm_fast.config.deepspeed_settings import check_deepspeed_settings
from iwm_fast.config.strict_yaml import parse_int
from iwm_fast.pipelines.config import (
    Backend,
    DataConfig,
    LoaderConfig,
    MaskConfig,
    require,
    require_range,
    require_seed,
    require_size,
)
from iwm_fast.pipelines.transforms.composition import ViewConfig

MAX_BATCH = 1_000_000
Logger = Literal["tensorboard", "wandb"]
Metric = Literal["mrr", "knn", "linear", "attentive", "rank_me", "lidar"]
_YEAR_S = 31_536_000


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Vision transformer over patches; trained encoder and teacher have the same sizes. Defaults: ViT-B/16."""

    dim: int = 768
    """Width of the tokens, a multiple of 4 (timm: tiny 192, small 384, base 768, large 1024, huge 1280)."""
    depth: int = 12
    """Number of transformer blocks (timm: tiny to base 12, large 24, huge 32)."""
    num_heads: int = 12
    """Number of attention heads; must divide dim (timm: tiny 3, small 6, base 12, large and huge 16)."""
    patch_size: int = 16
    """Side of a patch in pixels; must divide views.size."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP, as a multiple of dim."""

    def __post_init__(self) -> None:
        check_transformer("model.encoder", self, min_depth=1)
        require(self.patch_size >= 1, "model.encoder.patch_size", self.patch_size, "be at least 1")


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """The world model, which predicts the tokens at target positions from context tokens and the action."""

    dim: int = 384
    """Width of the predictor's tokens, a multiple of 4."""
    depth: int = 12
    """Number of transformer blocks. 0 is the identity predictor, which trains the encoder to be invariant; deeper
    predictors can model the transformations instead."""
    num_heads: int = 12
    """Number of attention heads; must divide dim. Heads of width 32 are ours; the paper's are not known."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP, as a multiple of dim."""
    conditioning: Literal["feature", "sequence", "none"] = "feature"
    """How the action reaches the predictor. feature: mixed into each mask token; sequence: one extra token per entry;
    none: not at all, as a control."""

    def __post_init__(self) -> None:
        check_transformer("model.predictor", self, min_depth=0)


def check_transformer(name: str, sizes: Any, *, min_depth: int) -> None:
    """Check the sizes of a transformer: dim, depth, num_heads and mlp_ratio; `name` is their group, for messages."""
    dim, heads = sizes.dim, sizes.num_heads
    require(4 <= dim <= 65536 and dim % 4 == 0, f"{name}.dim", dim,
            "be a multiple of 4 (2-D sin-cos positions) up to 65536")  # fmt: skip
    require(heads >= 1 and dim % heads == 0, f"{name}.num_heads", heads, f"divide {name}.dim = {dim}")
    require(min_depth <= sizes.depth <= 1000, f"{name}.depth", sizes.depth, f"be between {min_depth} and 1000")
    require(1 / dim <= sizes.mlp_ratio <= 100, f"{name}.mlp_ratio", sizes.mlp_ratio,
            f"be between 1 / {name}.dim and 100")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of encoder and predictor."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The training loss."""

    distance: Literal["mse", "smooth_l1"] = "mse"
    """Distance between predicted tokens and the teacher's layer-normalised tokens: mean squared error or smooth L1."""
    variance_weight: float | None = None
    """Weight of VICReg's variance term on encoder tokens, which keeps them from collapsing. Unset: 1 for the identity
    predictor, 0 otherwise."""
    covariance_weight: float | None = None
    """Weight of VICReg's covariance term on encoder tokens, which decorrelates their dimensions. Unset: 0.04 for the
    identity predictor, 0 otherwise."""

    def __post_init__(self) -> None:
        for name in ("variance_weight", "covariance_weight"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"objective.{name}", value, "be at least 0")

    def vicreg_weights(self, *, is_identity: bool) -> tuple[float, float]:
        """Return the weights of the variance and covariance terms, whose defaults depend on the predictor."""
        # With the identity predictor, the EMA teacher alone does not prevent the encoder from collapsing.
        defaults = (1.0, 0.04) if is_identity else (0.0, 0.0)
        settings = (self.variance_weight, self.covariance_weight)
        variance, covariance = (
            default if value is None else value for value, default in zip(settings, defaults, strict=True)
        )
        return variance, covariance


def check_length(group: str, global_batch_size: int, epochs: float) -> None:
    """Check the settings that decide how many steps a training has; `group` is their group, for messages."""
    require(1 <= global_batch_size <= MAX_BATCH, f"{group}.global_batch_size", global_batch_size,
            f"be between 1 and {MAX_BATCH}")  # fmt: skip
    # The position in the stream of samples is a 64-bit number.
    require(0 < epochs <= 1e6, f"{group}.epochs", epochs, "be above 0 and at most 1000000")


def resolve_warmup(group: str, config: Any, *, recipe: tuple[int, int]) -> None:
    """Set an unset `warmup_epochs` to the same share of `epochs` as in the recipe, in place, and check the setting.

    The configuration then holds a number, which is what config.yaml and the fingerprint of a run record.

    Args:
        group: group of the settings, for messages.
        config: settings with `epochs` and `warmup_epochs`.
        recipe: epochs of the warm-up and all epochs of the recipe.

    Raises:
        ValueError: if the warm-up is as long as the run or longer.
    """
    given = config.warmup_epochs
    value = config.epochs * recipe[0] / recipe[1] if given is None else given
    # The class is frozen, which is meant for its users.
    object.__setattr__(config, "warmup_epochs", value)
    require(0 <= value < config.epochs, f"{group}.warmup_epochs", value, f"lie in [0, epochs = {config.epochs:g})")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimisation: AdamW and its schedules, measured in epochs of data.train."""

    global_batch_size: int = 2048
    """Images per optimiser step, over all ranks and micro-batches."""
    epochs: float = 300.0
    """Passes over the training samples; may be a fraction."""
    lr: float = 1e-3
    """Peak learning rate."""
    lr_start: float = 2e-4
    """Learning rate at the first step, from which the warm-up rises."""
    lr_end: float = 1e-6
    """Learning rate at the end of the cosine; with schedule_stretch > 1 the run ends before it is reached."""
    warmup_epochs: float | None = None
    """Epochs in which the learning rate rises linearly from lr_start to lr. Unset: the recipe's share of epochs, 40 of
    300."""
    weight_decay: tuple[float, float] = (0.04, 0.4)
    """Weight decay at the start and at the end of its cosine schedule. Biases and norms are not decayed."""
    teacher_momentum: tuple[float, float] = (0.996, 1.0)
    """EMA coefficient of the teacher at the start and at the end of its linear schedule, each in [0, 1]. 1 freezes the
    teacher; values that are too low let the tokens collapse."""
    schedule_stretch: float = 1.25
    """Length of the schedules as a multiple of the run's steps, at least 1; with 1.25 the run ends at 80 % of them."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment, each in [0, 1)."""
    clip_norm: float | None = 1.0
    """Global gradient norm above which gradients are scaled down. Unset: no clipping."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of forward and backward passes. Weights, teacher and optimiser state are always float32."""

    def __post_init__(self) -> None:
        check_length("optim", self.global_batch_size, self.epochs)
        resolve_warmup("optim", self, recipe=(40, 300))
        for name in ("lr", "lr_start", "lr_end"):
            require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "be at least 0")
        require(self.lr > 0, "optim.lr", self.lr, "be above 0")
        require(min(self.weight_decay) >= 0, "optim.weight_decay", self.weight_decay, "be at least 0")
        require_range("optim.teacher_momentum", self.teacher_momentum, 0.0, 1.0)
        stretch = self.schedule_stretch
        require(1 <= stretch <= 1000, "optim.schedule_stretch", stretch, "be between 1 and 1000")
        require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "lie in [0, 1)")
        require(self.clip_norm is None or self.clip_norm > 0, "optim.clip_norm", self.clip_norm, "be above 0 or unset")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How the run is computed. None of these settings changes what is learned, beyond rounding, but for
    micro_batch_size with VICReg's terms.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on. auto uses a GPU if there is one and logs its choice."""
    loader: Backend = "dali"
    """Data loader. dali: NVIDIA DALI, fast; torch: plain PyTorch, slow, for comparison and debugging."""
    ops: Literal["auto", "reference", "fused"] = "auto"
    """Implementation of attention, residual norms and predictor input. auto: Triton kernels if there are some for this
    GPU, precision, width of the heads and number of patches, otherwise PyTorch's operations, and the log says which;
    reference: PyTorch's operations; fused: Triton kernels or an error."""
    check_kernels: bool = True
    """Whether to compare the Triton kernels with PyTorch before the first step, on 8 of the run's masks. It takes about
    two seconds, without the compilation that training needs anyway. Only on GPUs."""
    engine: Literal["deepspeed", "plain"] = "deepspeed"
    """Training engine. deepspeed: DeepSpeed with ZeRO; plain: PyTorch alone, with DistributedDataParallel if there are
    several ranks."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage, for engine=deepspeed only. 0 shards nothing, 1 the optimiser state, 2 also the gradients, 3 also the
    weights; higher stages need less memory and communicate more. Unset: 1."""
    activation_checkpointing: bool = False
    """Whether to keep only the input of each transformer block for the backward pass and recompute the rest: much
    less memory for about a third more computation."""
    compile: bool = False
    """Whether to compile the transformer blocks of encoder, predictor and teacher with torch.compile."""
    rank_timeout_s: float = 3600.0
    """Seconds that a rank waits for the others before it considers them hung and the run ends. Allow for the time that
    rank 0 needs to index shards, save, and train the probes of an evaluation."""
    max_skipped_steps: int = 10
    """The run ends when this many consecutive steps were skipped because of a non-finite loss or gradient."""
    profile: str = ""
    """Steps to profile as FIRST:LAST, counted from 0 and without LAST, such as 10:20. Rank 0 writes a trace to the run
    folder. Empty: no profile."""
    micro_batch_size: int | None = None
    """Images per rank and forward pass; must divide the rank's share of the global batch, and gradients are accumulated
    over the rest. Unset: the complete share, without accumulation. VICReg's terms, which the identity predictor needs,
    are statistics of the images per forward pass of all ranks: with them, micro_batch_size times the number of ranks is
    part of what is learned and must stay the same when a run is resumed."""
    reader_threads: int = 4
    """Threads per rank that read encoded images. Only for runtime.loader=dali."""
    loader_threads: int = 2
    """Threads per rank that decode and transform images in DALI. Only for runtime.loader=dali."""
    prefetch: int = 2
    """Micro-batches prepared in advance; a larger number bridges slow reads but takes more memory. Only for
    runtime.loader=dali."""
    read_ahead: int = 2
    """Micro-batches beyond prefetch whose bytes are already being read. Only for runtime.loader=dali."""
    decode: Literal["gpu", "cpu"] = "gpu"
    """Where a run on a GPU decodes images. gpu: on the GPU; cpu: runtime.loader_threads decode and crop them, and the
    GPU resizes and transforms them, which suits machines with many cores and a busy GPU. `iwm check` says how many
    cores that takes. Without a GPU, and with runtime.loader=torch, images are always decoded on the CPU."""
    hw_decoder_load: float | None = None
    """Share of the JPEGs decoded by the GPU's hardware decoder, 0 to 1. Unset: DALI's default of 0.65. Only if a GPU
    decodes."""
    decoder_preallocate: tuple[int, int] | None = None
    """Width and height in pixels of the largest expected image, for which the hardware decoder allocates memory at the
    start. Unset: memory grows as larger images arrive. Only if a GPU decodes."""
    max_bad_samples: float = 0.02
    """Number of undecodable samples that a rank may replace by others of the same batch before the run ends; a value
    below 1 is a share of the images that a rank draws in an epoch, or has drawn so far if these are more."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Additional DeepSpeed settings of memory, speed and logs, such as {zero_optimization: {overlap_comm: true}}. All
    others are refused, because they follow from settings of the run or would change what is learned."""

    def __post_init__(self) -> None:
        # The class is frozen, which is meant for its users.
        object.__setattr__(self, "deepspeed", check_deepspeed_settings(self.deepspeed))
        has_no_effect = self.engine == "plain" and (self.zero_stage is not None or bool(self.deepspeed))
        require(not has_no_effect, "runtime.zero_stage and runtime.deepspeed", (self.zero_stage, self.deepspeed),
              "be unset with runtime.engine=plain, where they have no effect")  # fmt: skip
        require(not (self.compile and self.zero_stage == 3), "runtime.compile", True,
              "be false with runtime.zero_stage=3, which gathers and frees weights inside compiled blocks")  # fmt: skip
        for name, low in (("reader_threads", 1), ("loader_threads", 1), ("prefetch", 1), ("read_ahead", 0)):
            value = getattr(self, name)
            require(value >= low, f"runtime.{name}", value, f"be at least {low}")
            require(value <= 1024, f"runtime.{name}", value, "be at most 1024")
        require(self.max_skipped_steps >= 1, "runtime.max_skipped_steps", self.max_skipped_steps, "be at least 1")
        require(self.max_bad_samples >= 0, "runtime.max_bad_samples", self.max_bad_samples, "be at least 0")
        timeout = self.rank_timeout_s
        require(0 < timeout <= _YEAR_S, "runtime.rank_timeout_s", timeout, f"be above 0 and at most {_YEAR_S} (a year)")
        load = self.hw_decoder_load
        require(load is None or 0 <= load <= 1, "runtime.hw_decoder_load", load, "be between 0 and 1 or unset")
        sides = self.decoder_preallocate
        require(sides is None or (min(sides) >= 1 and max(sides) <= 65535), "runtime.decoder_preallocate", sides,
                "be between 1 and 65535 pixels, or unset")  # fmt: skip
        size = self.micro_batch_size
        require(size is None or size >= 1, "runtime.micro_batch_size", size, "be at least 1 or unset")
        require(parse_step_range(self.profile) is not None, "runtime.profile", self.profile,
              "be FIRST:LAST with 0 <= FIRST < LAST, such as 10:20, or empty")  # fmt: skip


def loader_config(runtime: RuntimeConfig) -> LoaderConfig:
    """Return the loader's share of the runtime settings; both classes use the same names."""
    return LoaderConfig(**{setting.name: getattr(runtime, setting.name) for setting in fields(LoaderConfig)})


def parse_step_range(text: str) -> range | None:
    """Parse FIRST:LAST into a range of steps; an empty text gives an empty range, a malformed one None."""
    first, _, last = text.partition(":")
    if not text:
        return range(0)
    start, stop = parse_int(first), parse_int(last)
    return range(start, stop) if start is not None and stop is not None and 0 <= start < stop else None


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where results are written, and how often."""

    folder: str = "runs/unnamed"
    """Run folder. It receives config.yaml, metrics.jsonl, TensorBoard logs, checkpoints and evaluations."""
    loggers: tuple[Logger, ...] = ("tensorboard",)
    """What receives the values of metrics.jsonl, which is always written. tensorboard: event files in the run folder;
    wandb: Weights & Biases, with the extra wandb."""
    log_every: int = 10
    """Optimiser steps between log rows."""
    checkpoint_every: int = 1000
    """Optimiser steps between checkpoints. The last step always saves one."""
    keep_last: int = 3
    """Number of most recent checkpoints to keep. With several, a run survives damage to the newest one."""
    keep_every: int | None = None
    """Checkpoints at multiples of this number of steps are never deleted; a multiple of checkpoint_every. Unset: only
    the most recent ones are kept."""
    keep_best: Metric | None = None
    """Metric of the evaluations during training whose best step is saved and kept beside the most recent checkpoints,
    for `checkpoint=best`. Unset: none."""
    evaluate_every: int | None = None
    """Optimiser steps between small evaluations on data.val (MRR, k-NN, linear and attentive probe, RankMe, LiDAR),
    logged and written to metrics.jsonl; a multiple of log_every. The last step always evaluates. Unset: no
    evaluations."""
    action_log: bool = False
    """Whether to log the crop, transformations and action of every sample as Parquet in actions/, about 100 bytes per
    sample. `iwm replay` needs it."""

    def __post_init__(self) -> None:
        require(bool(self.folder), "output.folder", self.folder, "name a folder")
        for name in ("log_every", "checkpoint_every", "keep_last"):
            require(getattr(self, name) >= 1, f"output.{name}", getattr(self, name), "be at least 1")
        for name in ("keep_every", "evaluate_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"output.{name}", value, "be at least 1 or unset")
        interval = self.evaluate_every
        require(interval is None or interval % self.log_every == 0, "output.evaluate_every", interval,
              f"be a multiple of output.log_every = {self.log_every} or unset")  # fmt: skip
        metric = self.keep_best
        require(metric is None or self.evaluate_every is not None, "output.keep_best", metric,
                "be unset without output.evaluate_every, which sets how often it is measured")  # fmt: skip
        names = self.loggers
        require(len(set(names)) == len(names), "output.loggers", names, "name each logger once")
        interval = self.keep_every
        require(interval is None or interval % self.checkpoint_every == 0, "output.keep_every", interval,
              f"be a multiple of output.checkpoint_every = {self.checkpoint_every} or unset")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a training run."""

    seed: int = 0
    """Seed of initial weights, sample order, crops, actions and masks, in [0, 2^63)."""
    resume: Literal["never", "auto", "extend", "adjust"] = "never"
    """never: refuse an output.folder that already holds a run; auto: resume from its newest checkpoint, or start if it
    has none; extend: like auto, but optim.epochs may differ, and the schedules are stretched to the new number; adjust:
    like auto, but optim.lr, lr_start, lr_end, warmup_epochs, weight_decay, teacher_momentum, clip_norm and epochs may
    differ, and their new values hold from here on."""
    init_from: str = ""
    """Source of the initial weights: the folder of a run or of an export, or a file with a ViT in timm's naming, for
    example from timm or I-JEPA. A resumed run does not read it again. Empty: random weights."""
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        require_seed(self.seed)
        patch = self.model.encoder.patch_size
        require(self.views.size % patch == 0, "views.size", self.views.size,
                f"be a multiple of model.encoder.patch_size = {patch}")  # fmt: skip
        plain = [f"views.{operation.name}" for operation in self.views.operations if operation.needs_plain_loader]
        require(not plain or self.runtime.loader == "torch", "runtime.loader", self.runtime.loader,
                f"be torch with these settings of {', '.join(plain)}")  # fmt: skip

    @property
    def grid(self) -> int:
        """Number of patches along one side of a view."""
        return self.views.size // self.model.encoder.patch_size

    def at_size(self, size: int | None) -> "RunConfig":
        """Return the settings for images of another size, in patches of the same size; None: these settings.

        Raises:
            ValueError: if patches do not divide `size`, or it is out of range.
        """
        if size is None:
            return self
        patch = self.model.encoder.patch_size
        below = max(size // patch, 1) * patch
        require(size >= patch and size % patch == 0, "size", size,
                f"be a multiple of the patch size {patch}, such as {below} or {below + patch}")  # fmt: skip
        require_size(size)
        return replace(self, views=replace(self.views, size=size))
