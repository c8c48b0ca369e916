"""What is done to training images as batches, on the device: erasing, then mixup or cutmix; and to their labels.

timm's, which draws from the global generators of torch, numpy and Python: whoever calls this seeds them.
"""

import torch
from jaxtyping import Float, Int64
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from iwm_fast.config.finetuning import TuneTask
from iwm_fast.evals.finetuning.run import micro_batches
from iwm_fast.pipelines.config import check


class Mixing:
    """Erases, mixes and smooths, as `augment` says."""

    def __init__(self, task: TuneTask, num_classes: int, world_size: int) -> None:
        """Get ready.

        Raises:
            ValueError: if images are to be mixed and a micro-batch is of odd size.
        """
        augment = task.augment
        self._num_classes, self._label_smoothing = num_classes, augment.label_smoothing
        self._erasing = augment.erasing
        self._mixup: Mixup | None = None
        if augment.mixup > 0 or augment.cutmix > 0:
            micro, _ = micro_batches(task, world_size)
            # the first is mixed with the last, and so on
            check(micro % 2 == 0, "runtime.micro_batch_size (tune.global_batch_size / ranks where unset)", micro,
                  "be even where augment.mixup or augment.cutmix is above 0")  # fmt: skip
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
        """Return changed copies of normalised images, and each one's label as shares of all classes."""
        images, label = images.clone(), label.to(images.device)
        if self._erasing > 0:
            # normal noise for each pixel, which is what normalised images look like
            images = RandomErasing(self._erasing, mode="pixel", device=str(images.device))(images)
        if self._mixup is not None:
            return self._mixup(images, label)
        return images, mixup_target(label, self._num_classes, smoothing=self._label_smoothing)
