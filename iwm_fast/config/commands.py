"""Settings of the commands before and after a run, for the command line and for Python; cheap to import."""

from dataclasses import dataclass, field
from typing import Literal

from iwm_fast.config.evaluation import EvalDataConfig
from iwm_fast.pipelines.config import MAX_PIXELS, Backend, require, require_image_extension, require_size


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Settings of `iwm check`, which estimates what a run needs before it starts; given beside the run's settings."""

    ranks: int | None = None
    """Number of processes, one per GPU. Unset: WORLD_SIZE if it is set, otherwise the GPUs of this machine, or 1."""
    images_per_s: float | None = None
    """Measured training speed over all ranks, in images per second. Unset: hours are estimated from the GPU's peak."""
    gpu: str = ""
    """GPU that the run is meant for, such as H100 or "RTX 4090"; this machine need not have one. A100 means its version
    with 40 GB, A100-80GB the other one. Unset: this machine's GPU, or an H100 for the estimate of hours."""
    gpu_memory_gb: float | None = None
    """Memory of the GPU that the run is meant for, in 10^9 bytes. Unset: that of gpu, or of this machine's GPU. With
    neither, the estimated memory is not judged."""

    def __post_init__(self) -> None:
        require(self.ranks is None or self.ranks >= 1, "ranks", self.ranks, "be at least 1 or unset")
        speed = self.images_per_s
        require(speed is None or speed > 0, "images_per_s", speed, "be above 0 or unset")
        memory = self.gpu_memory_gb
        require(memory is None or memory > 0, "gpu_memory_gb", memory, "be above 0 or unset")


@dataclass(frozen=True, kw_only=True)
class CheckShardsConfig:
    """Settings of `iwm shards check`."""

    image: str = ""
    """Member of each sample that is its image, like data.image of the runs that will read the shards."""
    max_pixels: int = MAX_PIXELS
    """Largest number of pixels of an image or a segmentation map, like data.max_pixels of these runs."""

    def __post_init__(self) -> None:
        require_image_extension("image", self.image)
        require(self.max_pixels >= 1, "max_pixels", self.max_pixels, "be at least 1")


CHECK_DEFAULTS = CheckShardsConfig()


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of `iwm export`, which turns a trained run into a folder that other projects can load."""

    run: str = ""
    """Folder of the trained run."""
    checkpoint: str = ""
    """Checkpoint to export: a step, such as 1500, a checkpoint's folder, or best. Unset: the newest."""
    to: str = ""
    """Folder to write. It must not exist yet."""
    size: int | None = None
    """Side in pixels of the images that the exported model takes, a multiple of the patch size; positions are
    recomputed for it. Unset: the run's views.size."""

    def __post_init__(self) -> None:
        require_size(self.size)
        require(bool(self.to), "to", self.to, "name a folder to write")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Settings of `iwm embed`, which writes the features of images to a file, one row per image."""

    run: str = ""
    """Folder of the run, or of an export."""
    checkpoint: str = ""
    """Checkpoint to use: a step, such as 1500, a checkpoint's folder, or best. Unset: the newest."""
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    """Shards to embed, as data.val, and the label to write beside the features, as data.label."""
    images: str = ""
    """Image file, or folder of images with its subfolders, to embed instead of shards."""
    to: str = ""
    """File to write, which must not exist yet: NAME.parquet, or NAME.npz, which is collected in memory."""
    size: int | None = None
    """Side in pixels of the squares that are encoded, a multiple of the patch size. Unset: the run's views.size."""
    pool: Literal["mean", "none"] = "mean"
    """mean: the feature is the mean over the patches; none: the features of all patches, one after the other in raster
    order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on. auto uses a GPU if there is one."""

    def __post_init__(self) -> None:
        require_size(self.size)
        require(self.to.endswith((".parquet", ".npz")), "to", self.to, "name a file to write, .parquet or .npz")
        require(not self.data.train, "data.train", self.data.train, "be unset; name the shards to embed in data.val")
        require(not (self.images and self.data.val), "images and data.val", (self.images, self.data.val),
              "not both be set")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of `iwm report`, which writes one HTML page about a run or a lab."""

    run: str = ""
    """Folder of a run. Set either this or lab."""
    lab: str = ""
    """Folder of a lab. Set either this or run."""

    def __post_init__(self) -> None:
        folders = self.run, self.lab
        require(bool(self.run) != bool(self.lab), "either run or lab", folders, "name a folder, and the other be unset")


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Settings of `iwm replay`, which renders the views of one training step again from the run's action log."""

    run: str = ""
    """Folder of a run that was trained with output.action_log=true."""
    step: int | None = None
    """Step to render, counted from 0: step 99 belongs to the row with step 100 in metrics.jsonl. Unset: list the logged
    steps instead."""
    first_slot: int = 0
    """First slot of the global batch to render, counted from 0."""
    num_images: int | None = None
    """Number of images to render. Unset: 8 for a picture, all images of the step for tensors."""
    format: Literal["png", "tensors"] = "png"
    """png: a sheet with both views of each image; tensors: a safetensors file with source_view and target_view (uint8,
    B x H x W x 3), action, slot and sample."""
    out: str = ""
    """File to write. Unset: replay-step-00000099.png or .safetensors in the run folder."""
    shards: str = ""
    """Current location of the training shards, written like data.train. Unset: the location used in training."""
    backend: Backend | None = None
    """Loader that renders the views. Unset: the run's runtime.loader, which reproduces the pixels exactly."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Device to render on. Unset: the run's runtime.device."""

    def __post_init__(self) -> None:
        require(self.step is None or self.step >= 0, "step", self.step, "be at least 0")
        require(self.first_slot >= 0, "first_slot", self.first_slot, "be at least 0")
        require(
            self.num_images is None or self.num_images >= 1, "num_images", self.num_images, "be at least 1 or unset"
        )
