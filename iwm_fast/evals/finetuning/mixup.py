"""Augmentation of training batches on the device: random erasing, mixup or CutMix, and label smoothing.

These are timm's, which draw from the global generators of torch, NumPy and Python, so the caller has to seed them.
"""

import torch
from jaxtyping import Float, Int64
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from iwm_fast.config.finetuning import TuneTaskConfig
from iwm_fast.evals.finetuning.run import split_global_batch
from iwm_fast.pipelines.config import require


class BatchAugmentation:
    """Erases, mixes and smooths according to the settings in `augment`."""

    def __init__(self, settings: TuneTaskConfig, num_classes: int, world_size: int) -> None:
        """Read the settings.

        Raises:
            ValueError: if images are to be mixed and the micro-batch size is odd.
        """
        augment = settings.augment
        self._num_classes: int = num_classes
        self._label_smoothing: float = augment.label_smoothing
        self._erasing: float = augment.erasing
        self._mixup: Mixup | None = None
        if augment.mixup > 0 or augment.cutmix > 0:
            micro_batch_size, _ = split_global_batch(settings, world_size)
            # timm mixes the first image with the last, the second with the last but one, and so on.
            require(micro_batch_size % 2 == 0, "runtime.micro_batch_size (by default tune.global_batch_size / ranks)",
                  micro_batch_size, "be even if augment.mixup or augment.cutmix is above 0")  # fmt: skip
            self._mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
            )

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "B 3 H W"], label: Int64[Tensor, "B"]
    ) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B K"]]:
        """Return augmented copies of normalised images, and their soft labels, which sum to 1 over the classes."""
        images, label = images.clone(), label.to(images.device)
        if self._erasing > 0:
            # Erased pixels become normal noise, which has the mean and deviation of normalised images.
            images = RandomErasing(self._erasing, mode="pixel", device=str(images.device))(images)
        if self._mixup is not None:
            return self._mixup(images, label)
        return images, mixup_target(label, self._num_classes, smoothing=self._label_smoothing)
