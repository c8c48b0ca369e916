"""One run's settings, composed; `iwm_fast.config.loading` reads and writes them.

Groups are ordered by effect. `data`, `views`, `mask`, `model`, `objective` and `optim` may change what is learnt and
make the fingerprint; `runtime` and `output` must not. Importing this file must stay cheap: `--help` reads it.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from iwm_fast.pipelines.config import Backend, DataConfig, LoaderConfig, MaskConfig, ViewConfig, check, check_range


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Vision transformer over patches; teacher and trained encoder share it. Defaults: ViT-B/16."""

    dim: int = 768
    """Width of the tokens (timm: tiny 192, small 384, base 768, large 1024, huge 1280)."""
    depth: int = 12
    """Transformer blocks (timm: tiny to base 12, large 24, huge 32)."""
    num_heads: int = 12
    """Attention heads (timm: tiny 3, small 6, base 12, large 16, huge 16)."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over dim."""

    def __post_init__(self) -> None:
        _check_transformer("model.encoder", self.dim, self.depth, self.num_heads)
        check(self.depth >= 1, "model.encoder.depth", self.depth, "be at least 1")
        check(self.patch_size >= 1, "model.encoder.patch_size", self.patch_size, "be at least 1")


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """The world model: context tokens and action in, tokens at target positions out."""

    dim: int = 384
    """Width of the predictor's tokens."""
    depth: int = 12
    """Transformer blocks; 0 is the identity predictor, the invariant end of the slider."""
    num_heads: int = 12
    """Attention heads; heads of 32 (dim / 32) are the paper's."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over dim."""
    conditioning: Literal["feature", "sequence", "none"] = "feature"
    """How the action enters: concatenated to each mask token, as one token per entry, or not at all (a control)."""

    def __post_init__(self) -> None:
        _check_transformer("model.predictor", self.dim, self.depth, self.num_heads)
        check(self.depth >= 0, "model.predictor.depth", self.depth, "be at least 0")


def _check_transformer(name: str, dim: int, depth: int, num_heads: int) -> None:
    check(num_heads >= 1 and dim % num_heads == 0, f"{name}.num_heads", num_heads, f"divide {name}.dim = {dim}")
    check(dim >= 4 and dim % 4 == 0, f"{name}.dim", dim, "be a multiple of 4 (2-D sin-cos positions)")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Encoder and predictor."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised."""

    distance: Literal["mse", "smooth_l1"] = "mse"
    """Between predicted tokens and the teacher's LayerNormed tokens."""
    variance_weight: float | None = None
    """Weight of the variance term on encoder tokens; unset: 1 for the identity predictor, 0 otherwise."""
    covariance_weight: float | None = None
    """Weight of the covariance term on encoder tokens; unset: 0.04 for the identity predictor, 0 otherwise."""

    def __post_init__(self) -> None:
        for name in ("variance_weight", "covariance_weight"):
            value = getattr(self, name)
            check(value is None or value >= 0, f"objective.{name}", value, "be at least 0")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How it is minimised: AdamW and its schedules, counted in epochs of data.train."""

    global_batch_size: int = 2048
    """Images per optimiser step over all ranks and micro-batches."""
    epochs: float = 300.0
    """Passes over the training samples."""
    lr: float = 1e-3
    """Peak learning rate."""
    lr_start: float = 2e-4
    """Learning rate of the first step."""
    lr_end: float = 1e-6
    """Where the cosine ends (with schedule_stretch > 1 the run stops before)."""
    warmup_epochs: float = 40.0
    """Epochs of linear warm-up."""
    weight_decay: tuple[float, float] = (0.04, 0.4)
    """First and last weight decay, cosine; biases and norms have none."""
    teacher_momentum: tuple[float, float] = (0.996, 1.0)
    """First and last EMA coefficient of the teacher, linear; 1 = frozen."""
    schedule_stretch: float = 1.25
    """Schedules are laid out for this many times the run's steps."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment coefficients."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; unset: no clipping."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the networks; weights, teacher and optimiser are always fp32."""

    def __post_init__(self) -> None:
        check(self.global_batch_size >= 1, "optim.global_batch_size", self.global_batch_size, "be at least 1")
        check(self.epochs > 0, "optim.epochs", self.epochs, "be above 0")
        check(
            0 <= self.warmup_epochs < self.epochs,
            "optim.warmup_epochs",
            self.warmup_epochs,
            f"lie in [0, epochs = {self.epochs:g})",
        )
        for name in ("lr", "lr_start", "lr_end"):
            check(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "be at least 0")
        check(self.lr > 0, "optim.lr", self.lr, "be above 0")
        check(min(self.weight_decay) >= 0, "optim.weight_decay", self.weight_decay, "be at least 0")
        check_range("optim.teacher_momentum", self.teacher_momentum, 0.0, 1.0)
        check(self.schedule_stretch >= 1, "optim.schedule_stretch", self.schedule_stretch, "be at least 1")
        check(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "lie in [0, 1)")
        check(self.clip_norm is None or self.clip_norm > 0, "optim.clip_norm", self.clip_norm, "be above 0 or unset")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How it is computed; none of this changes what is learnt."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one and says which it took."""
    loader: Backend = "dali"
    """dali: the fast path; torch: its plain twin."""
    ops: Literal["reference", "fused"] = "reference"
    """reference: attention, residual norms and predictor input in plain PyTorch; fused: in Triton kernels, for NVIDIA
    GPUs and heads of 32 or 64."""
    engine: Literal["deepspeed", "plain"] = "deepspeed"
    """deepspeed: ZeRO; plain: its twin in PyTorch alone, DistributedDataParallel where there are several ranks."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed's stage: 0 shards nothing, 1 the optimiser's state, 2 the gradients too, 3 the weights too; unset: 1.
    Not for engine=plain."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: less memory, a third more work."""
    compile: bool = False
    """Compile encoder, predictor and teacher block by block with torch.compile."""
    rank_timeout_s: float = 3600.0
    """How long a rank waits for the others before it takes them for hung and the run ends. They may be indexing,
    saving or evaluating meanwhile."""
    max_skipped_steps: int = 10
    """Steps in a row that may be skipped for a loss or gradient that is not finite before the run ends."""
    profile: str = ""
    """FIRST:LAST writes a trace of these steps, counted from 0 and the last one left out, into the run folder."""
    micro_batch_size: int | None = None
    """Images per rank per forward; unset: global batch / ranks. Accumulation is derived."""
    reader_threads: int = 4
    """Threads that read encoded images, per rank; only for runtime.loader=dali."""
    loader_threads: int = 2
    """DALI's threads (decoding on the CPU), per rank; only for runtime.loader=dali."""
    prefetch: int = 2
    """Micro-batches prepared ahead; only for runtime.loader=dali."""
    read_ahead: int = 2
    """Further micro-batches whose bytes are already asked for; only for runtime.loader=dali."""
    hw_decoder_load: float | None = None
    """Share of the JPEGs that a GPU's own decoder takes, 0 to 1; unset: DALI's 0.65. Only where DALI has a GPU."""
    decoder_preallocate: tuple[int, int] | None = None
    """Width and height in pixels for which a GPU's own decoder makes room at the start; unset: as images come."""
    max_bad_samples: float = 0.02
    """How many undecodable samples a rank replaces by others of the same batch before it stops: a count from 1 on,
    below 1 a share of all samples."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further DeepSpeed settings, merged over ours; a conflict with ours is an error."""

    def __post_init__(self) -> None:
        is_pointless = self.engine == "plain" and (self.zero_stage is not None or bool(self.deepspeed))
        check(not is_pointless, "runtime.zero_stage and runtime.deepspeed", (self.zero_stage, self.deepspeed),
              "be unset with runtime.engine=plain, where they have no effect")  # fmt: skip
        check(not (self.compile and self.zero_stage == 3), "runtime.compile", True,
              "be false with runtime.zero_stage=3, whose weights come and go inside of what is compiled")  # fmt: skip
        for name in ("reader_threads", "loader_threads", "prefetch", "max_skipped_steps"):
            check(getattr(self, name) >= 1, f"runtime.{name}", getattr(self, name), "be at least 1")
        for name in ("read_ahead", "max_bad_samples"):
            check(getattr(self, name) >= 0, f"runtime.{name}", getattr(self, name), "be at least 0")
        check(self.rank_timeout_s > 0, "runtime.rank_timeout_s", self.rank_timeout_s, "be above 0")
        load, sides = self.hw_decoder_load, self.decoder_preallocate
        check(load is None or 0 <= load <= 1, "runtime.hw_decoder_load", load, "be between 0 and 1 or unset")
        check(sides is None or min(sides) >= 1, "runtime.decoder_preallocate", sides, "be at least 1 pixel or unset")
        size = self.micro_batch_size
        check(size is None or size >= 1, "runtime.micro_batch_size", size, "be at least 1 or unset")
        check(profiled_steps(self.profile) is not None, "runtime.profile", self.profile,
              "be FIRST:LAST with 0 <= FIRST < LAST, such as 10:20, or empty")  # fmt: skip


def loader_config(runtime: RuntimeConfig) -> LoaderConfig:
    """Return the settings of the loaders, under their own names."""
    return LoaderConfig(**{one.name: getattr(runtime, one.name) for one in fields(LoaderConfig)})


def profiled_steps(text: str) -> range | None:
    """Return the steps that `runtime.profile` names, none for an empty text, None if it is wrong."""
    first, colon, last = text.partition(":")
    if not text:
        return range(0)
    is_range = bool(colon) and first.isdigit() and last.isdigit() and int(first) < int(last)
    return range(int(first), int(last)) if is_range else None


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where results go and how often they are written."""

    folder: str = "runs/unnamed"
    """Run folder: resolved config, metrics.jsonl, TensorBoard, checkpoints, evaluations."""
    log_every: int = 10
    """Steps between log rows."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always makes one."""
    keep_last: int = 3
    """How many of the newest checkpoints are kept: the newest may be damaged by a failing disk."""
    keep_every: int | None = None
    """Checkpoints at multiples of so many steps are kept for ever; unset: none is."""
    evaluate_every: int | None = None
    """Steps between quick evaluations on data.val, MRR and k-NN, written into metrics.jsonl; the last step always makes
    one; unset: none."""
    action_log: bool = False
    """Keep what was drawn for every sample, about 100 bytes each, as Parquet in actions/; for `iwm replay`."""

    def __post_init__(self) -> None:
        check(bool(self.folder), "output.folder", self.folder, "name a folder")
        for name in ("log_every", "checkpoint_every", "keep_last"):
            check(getattr(self, name) >= 1, f"output.{name}", getattr(self, name), "be at least 1")
        for name in ("keep_every", "evaluate_every"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"output.{name}", value, "be at least 1 or unset")
        every = self.evaluate_every
        check(every is None or every % self.log_every == 0, "output.evaluate_every", every,
              f"be a multiple of output.log_every = {self.log_every} or unset")  # fmt: skip
        every = self.keep_every
        check(every is None or every % self.checkpoint_every == 0, "output.keep_every", every,
              f"be a multiple of output.checkpoint_every = {self.checkpoint_every} or unset")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run, whole."""

    seed: int = 0
    """Fixes initial weights, order, crops, actions and masks."""
    resume: Literal["never", "auto", "extend"] = "never"
    """auto: go on from the newest checkpoint of output.folder, or start; never: refuse a folder that holds a run;
    extend: as auto, and optim.epochs may differ: schedules are laid out anew over the new number."""
    init_from: str = ""
    """Where weights come from before the first step: a run's folder, an export folder, or a file of a ViT under timm's
    names, such as timm's or I-JEPA's. A run that goes on does not read it again."""
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        check(0 <= self.seed < 2**63, "seed", self.seed, "lie in [0, 2^63)")
        patch = self.model.encoder.patch_size
        check(
            self.views.size % patch == 0,
            "views.size",
            self.views.size,
            f"be a multiple of model.encoder.patch_size = {patch}",
        )

    @property
    def grid(self) -> int:
        """Patches along one side of a view."""
        return self.views.size // self.model.encoder.patch_size


def accumulation_steps(config: RunConfig, world_size: int) -> tuple[int, int]:
    """Return (micro-batch size per rank, micro-batches per optimiser step).

    Raises:
        ValueError: if global batch, ranks and micro-batch do not divide.
    """
    return split_batch("optim", config.optim.global_batch_size, config.runtime.micro_batch_size, world_size)


def split_batch(group: str, total: int, micro_batch_size: int | None, world_size: int) -> tuple[int, int]:
    """Return (micro-batch size per rank, micro-batches per optimiser step).

    Args:
        group: of the setting global_batch_size, for messages.
        total: images of an optimiser step over all ranks.
        micro_batch_size: images per rank and forward; None: all of the rank's share.
        world_size: number of ranks.

    Raises:
        ValueError: if these do not divide.
    """
    check(total % world_size == 0, f"{group}.global_batch_size", total, f"be a multiple of the {world_size} ranks")
    micro = micro_batch_size or total // world_size
    equation = f"satisfy micro_batch_size * {world_size} ranks * accumulation = {group}.global_batch_size = {total}"
    check(total % (micro * world_size) == 0, "runtime.micro_batch_size", micro, equation)
    return micro, total // (micro * world_size)
