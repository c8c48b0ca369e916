"""One predictor for several tasks: a learned token names the task, and each task has a head and a loss of its own."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from iwm_fast.models.heads import AttentiveHead
from iwm_fast.models.predictor import Predictor
from pipelines.batch import RaggedIndex


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
    labels: tuple[Int64[Tensor, "_"], ...] = ()
    """Of each task: the classes of these images."""


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

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """Return what `forward` takes from a list that is never called: ZeRO-3 must fetch it."""
        return list(self.tokens)

    def forward(self, inputs: TaskInputs) -> list[Float[Tensor, "_ K"]]:
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


def task_rows(task: Int64[Tensor, "B"], num_tasks: int) -> tuple[Int64[Tensor, "_"], ...]:
    """Return of each task which images are its; waits for no device if `task` is on the host."""
    return tuple((task == number).nonzero().flatten() for number in range(num_tasks))


def task_losses(
    scores: list[Float[Tensor, "_ K"]], labels: tuple[Int64[Tensor, "_"], ...], label_smoothing: float = 0.0
) -> Float[Tensor, "tasks"]:
    """Return the cross-entropy of each task, summed over its images."""
    pairs = zip(scores, labels, strict=True)
    return torch.stack(
        [functional.cross_entropy(*pair, reduction="sum", label_smoothing=label_smoothing) for pair in pairs]
    )
