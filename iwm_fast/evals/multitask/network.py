"""One predictor for several tasks: a learned token tells it the task, and each task has its own head and loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from iwm_fast.config.finetuning import TuneTaskConfig
from iwm_fast.evals.finetuning.mixup import BatchAugmentation
from iwm_fast.evals.finetuning.networks import Encode
from iwm_fast.models.heads import AttentiveHead
from iwm_fast.models.predictor import Predictor
from iwm_fast.pipelines.annotations.labels import Labels
from iwm_fast.pipelines.batch import Batch, RaggedIndex
from iwm_fast.runtime.distributed import RankInfo


@dataclass(frozen=True, kw_only=True)
class TaskInputs:
    """The inputs of a `TaskPredictor` for one micro-batch, in which each image belongs to one task."""

    tokens: Float[Tensor, "B N D"]
    """Tokens of all patches from the frozen encoder."""
    action: Float[Tensor, "B A"]
    """Null action: the predictor predicts the image without any change."""
    patches: RaggedIndex
    """All patches, which are both context and target."""
    task: Int64[Tensor, "B"]
    """Number of each image's task."""
    indices: tuple[Int64[Tensor, "_"], ...]
    """For each task, the positions of its images in the micro-batch."""
    labels: tuple[Float[Tensor, "_ _"], ...] = ()
    """For each task, the soft labels of its images; empty in evaluation."""


class TaskPredictor(nn.Module):
    """A predictor with a token and a head for each task.

    Source: IWM (multitask predictor tuning).
    """

    def __init__(self, predictor: Predictor, num_classes: list[int]) -> None:
        """Add tokens and heads to a predictor, given the number of classes of each task."""
        super().__init__()
        self.predictor: Predictor = predictor
        width, dim = predictor.mask_token.numel(), predictor.project.out_features
        # Each token is a separate vector, because weight decay applies to every parameter with two axes.
        self.tokens = nn.ParameterList(torch.zeros(width) for _ in num_classes)
        for token in self.tokens:
            nn.init.trunc_normal_(token, std=0.02)
        self.heads = nn.ModuleList(AttentiveHead(dim, classes) for classes in num_classes)

    def external_parameters(self) -> list[nn.Parameter]:
        """Return the tokens, which ZeRO-3 cannot gather by a hook because their list has no forward pass."""
        return list(self.tokens)

    def forward(self, inputs: TaskInputs) -> list[Float[Tensor, "_ _"]]:
        """Return, for each task, the logits of its images; the predictor runs once for all images."""
        predicted = self.predict_tokens(inputs)
        return [head(predicted[indices]) for head, indices in zip(self.heads, inputs.indices, strict=True)]

    def predict_tokens(self, inputs: TaskInputs) -> Float[Tensor, "B N D"]:
        """Return the predicted tokens of all patches, each image conditioned on the token of its task."""
        task_tokens = torch.stack(list(self.tokens))[inputs.task][:, None]
        patches, (num_images, num_patches, _) = inputs.patches, inputs.tokens.shape
        context = inputs.tokens.flatten(0, 1)
        predicted = self.predictor(context, inputs.action, patches, patches, extra_tokens=task_tokens)
        return predicted.unflatten(0, (num_images, num_patches))


class TaskBatcher:
    """Assigns the images of micro-batches to tasks and augments each task's images separately.

    The task follows from the slot in the global batch, so it does not depend on the number of ranks.
    """

    def __init__(self, labels: list[Labels], settings: TuneTaskConfig, encode: Encode, rank_info: RankInfo) -> None:
        """Build the augmentation of each task; the batch sizes in `settings` are those of a single task."""
        self._labels: list[Labels] = labels
        self._encode: Encode = encode
        self._augmentations = [BatchAugmentation(settings, len(task.classes), rank_info.world_size) for task in labels]

    def __call__(self, batch: Batch) -> TaskInputs:
        """Return the frozen encoder's tokens of the augmented images, with the indices and labels of each task."""
        task, device = batch.slot % len(self._labels), batch.source_view.device
        view, all_indices, all_labels = batch.source_view.clone(), [], []
        for number, (labels, augment) in enumerate(zip(self._labels, self._augmentations, strict=True)):
            # Slots and sample numbers are on the host, views on the device.
            on_host = (task == number).nonzero().flatten()
            indices = on_host.to(device)
            view[indices], soft_labels = augment(view[indices], labels.of(batch.sample[on_host]))
            all_indices.append(indices)
            all_labels.append(soft_labels)
        return TaskInputs(
            tokens=self._encode(view),
            action=torch.zeros_like(batch.action),
            patches=batch.context,
            task=task.to(device),
            indices=tuple(all_indices),
            labels=tuple(all_labels),
        )


def weighted_loss(
    logits: Sequence[Float[Tensor, "_ _"]], labels: Sequence[Float[Tensor, "_ _"]], weights: list[float]
) -> Float[Tensor, ""]:
    """Return the cross-entropy summed over images, each multiplied by the weight of its task."""
    losses = [functional.cross_entropy(*pair, reduction="sum") for pair in zip(logits, labels, strict=True)]
    return sum((loss * weight for loss, weight in zip(losses, weights, strict=True)), start=losses[0].new_zeros(()))
