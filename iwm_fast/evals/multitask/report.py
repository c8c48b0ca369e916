"""Result of the multitask evaluation: accuracies of the shared predictor and of predictors for single tasks."""

from typing import Any, NamedTuple

import numpy as np

from iwm_fast.evals.datasets import LabelledSets
from iwm_fast.evals.finetuning.run import FinetuneContext, TrainedVariant
from iwm_fast.evals.multitask.task_list import MEAN, TaskSpec
from iwm_fast.evals.results import Result, accuracy_gain, mean_row
from iwm_fast.training.train_state import TrainStats


class LabelledTask(NamedTuple):
    """A task with the labels of its training and validation samples."""

    spec: TaskSpec
    sets: LabelledSets


def make_result(
    context: FinetuneContext, tasks: list[LabelledTask], multitask: TrainedVariant, single_tasks: list[TrainedVariant]
) -> Result:
    """Return a row for each task and one for their mean, first of the shared predictor, then of single tasks.

    `single_tasks` holds a predictor for each task, in the same order, or is empty.
    """
    seed, steps = context.settings.seed, multitask.stats.steps
    chances = {task.spec.name: task.sets.chance for task in tasks}
    shared = dict(zip(chances, multitask.per_image.T, strict=True))
    single = {task.spec.name: variant.per_image[:, 0] for task, variant in zip(tasks, single_tasks, strict=False)}
    chances[MEAN] = float(np.mean(list(chances.values())))
    shared[MEAN] = multitask.per_image.mean(axis=1)
    details: dict[str, Any] = {
        "num_classes": {task.spec.name: len(task.sets.classes) for task in tasks},
        "most_common_class": {task.spec.name: task.sets.most_common for task in tasks},
        "steps": steps,
        "images_of_each_task": steps * context.settings.tune.global_batch_size // len(tasks),
    }
    costs = [variant.stats for variant in single_tasks]
    if single_tasks:
        single[MEAN] = np.mean(list(single.values()), axis=0)
        costs.append(_sum(costs))
        details["gain_of_sharing"] = accuracy_gain(shared[MEAN], single[MEAN], seed)
    rows = [
        mean_row(name, "accuracy", correct, seed, control=single.get(name), control_name="alone",
                 chance=chances[name], **multitask.stats.columns())
        for name, correct in shared.items()
    ]  # fmt: skip
    rows += [
        mean_row(f"{name} alone", "accuracy", correct, seed, chance=chances[name], **cost.columns())
        for (name, correct), cost in zip(single.items(), costs, strict=True)
    ]
    return context.make_result("multitask", rows, details)


def _sum(costs: list[TrainStats]) -> TrainStats:
    """Return the total cost of several predictors; they were trained one after the other, so it has no speed."""
    return TrainStats(
        num_tuned=sum(cost.num_tuned for cost in costs),
        images_per_s=None,
        time_s=sum(cost.time_s for cost in costs),
        steps=sum(cost.steps for cost in costs),
    )
