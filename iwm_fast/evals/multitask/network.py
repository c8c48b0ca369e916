"""One predictor for several tasks: a learned token names the task, and each task has a head and a loss of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from iwm_fast.config.finetuning import TuneTask
from iwm_fast.evals.finetuning.mixup import Mixing
from iwm_fast.evals.finetuning.networks import Encode
from iwm_fast.models.heads import AttentiveHead
from iwm_fast.models.predictor import Predictor
from iwm_fast.pipelines.annotations.labels import Labels
from iwm_fast.pipelines.batch import Batch, RaggedIndex
from iwm_fast.runtime.distributed import RankInfo


@dataclass(frozen=True, kw_only=True)
class TaskInputs:
    """Frozen tokens of a micro-batch's images, each of which belongs to one task."""

    tokens: Float[Tensor, "B N D"]
    """The encoder's, of all patches."""
    action: Float[Tensor, "B A"]
    """Null: nothing is to change."""
    everything: RaggedIndex
    """All patches: context and target alike."""
    task: Int64[Tensor, "B"]
    """Number of each image's task."""
    rows: tuple[Int64[Tensor, "_"], ...]
    """Of each task: which images are its."""
    labels: tuple[Float[Tensor, "_ _"], ...] = ()
    """Of each task, in training: these images' shares of its classes."""


class TaskPredictor(nn.Module):
    """A predictor with a token and a head for each task.

    Source: IWM section 5 (multitask predictor tuning).
    """

    def __init__(self, predictor: Predictor, num_classes: list[int]) -> None:
        """Take a predictor, pretrained or not, and the number of classes of each task."""
        super().__init__()
        self.predictor = predictor
        width, dim = predictor.mask_token.numel(), predictor.project.out_features
        # a vector each, not a matrix: what has one axis is not decayed
        self.tokens = nn.ParameterList(torch.zeros(width) for _ in num_classes)
        for token in self.tokens:
            nn.init.trunc_normal_(token, std=0.02)
        self.heads = nn.ModuleList(AttentiveHead(dim, classes) for classes in num_classes)

    def external_parameters(self) -> list[nn.Parameter]:
        """Return what `forward` takes from a list that is never called: ZeRO-3 must fetch it."""
        return list(self.tokens)

    def forward(self, inputs: TaskInputs) -> list[Float[Tensor, "_ _"]]:
        """Return of each task the scores of its images; the predictor sees all images in one pass."""
        predicted = self.predicted(inputs)
        return [head(predicted[rows]) for head, rows in zip(self.heads, inputs.rows, strict=True)]

    def predicted(self, inputs: TaskInputs) -> Float[Tensor, "B N D"]:
        """Return the predicted tokens of all patches, each image's under the token of its task."""
        named = torch.stack(list(self.tokens))[inputs.task][:, None]
        everything, (num_images, num_patches, _) = inputs.everything, inputs.tokens.shape
        context = inputs.tokens.flatten(0, 1)
        predicted = self.predictor(context, inputs.action, everything, everything, extra_tokens=named)
        return predicted.unflatten(0, (num_images, num_patches))


class Division:
    """Divides micro-batches between tasks, by slot, whatever the ranks; images are mixed with those of their task."""

    def __init__(self, labels: list[Labels], few: TuneTask, encode: Encode, rank_info: RankInfo) -> None:
        """Get ready.

        Args:
            labels: of each task.
            few: settings whose batches are a task's share.
            encode: the frozen encoder.
            rank_info: this process.
        """
        self._labels, self._encode = labels, encode
        self._mixings = [Mixing(few, len(labels.classes), rank_info.world_size) for labels in self._labels]

    def __call__(self, batch: Batch) -> TaskInputs:
        """Return the frozen encoder's tokens of the changed images, and each task's rows and labels."""
        task, device = batch.slot % len(self._labels), batch.source_view.device
        view, all_rows, all_labels = batch.source_view.clone(), [], []
        for number, (labels, mixing) in enumerate(zip(self._labels, self._mixings, strict=True)):
            chosen = (task == number).nonzero().flatten()
            rows = chosen.to(device)
            view[rows], shares = mixing(view[rows], labels.of(batch.sample[chosen]))
            all_rows.append(rows)
            all_labels.append(shares)
        return TaskInputs(
            tokens=self._encode(view),
            action=torch.zeros_like(batch.action),
            everything=batch.context,
            task=task.to(device),
            rows=tuple(all_rows),
            labels=tuple(all_labels),
        )


def weighted_loss(
    scores: Sequence[Float[Tensor, "_ _"]], labels: Sequence[Float[Tensor, "_ _"]], weights: list[float]
) -> Float[Tensor, ""]:
    """Return the sum over images of each one's cross-entropy times the weight of its task."""
    losses = [functional.cross_entropy(*pair, reduction="sum") for pair in zip(scores, labels, strict=True)]
    return sum((loss * weight for loss, weight in zip(losses, weights, strict=True)), start=losses[0].new_zeros(()))
