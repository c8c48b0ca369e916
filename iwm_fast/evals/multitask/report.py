"""What predictors of one and of several tasks have learnt, as rows beside each other."""

from typing import Any, NamedTuple

import numpy as np

from iwm_fast.evals.datasets import LabelledSets
from iwm_fast.evals.finetuning.run import FinetuneContext, Learnt
from iwm_fast.evals.multitask.task_list import MEAN, TaskSpec
from iwm_fast.evals.results import Result, accuracy_gain, mean_row
from iwm_fast.training.train_state import TrainStats


class LabelledTask(NamedTuple):
    """A task and the labels of both sets."""

    spec: TaskSpec
    sets: LabelledSets


def report(context: FinetuneContext, tasks: list[LabelledTask], together: Learnt, alone: list[Learnt]) -> Result:
    """Return rows of each task and of their mean, in one predictor and alone.

    Args:
        context: what all predictors were trained with.
        tasks: what was learnt.
        together: by one predictor.
        alone: by one predictor each; empty if there were none.
    """
    seed, steps = context.task.seed, together.tuned.steps
    chances = {task.spec.name: task.sets.chance for task in tasks}
    shared = dict(zip(chances, together.measured.T, strict=True))
    single = {task.spec.name: one.measured[:, 0] for task, one in zip(tasks, alone, strict=False)}
    chances[MEAN] = float(np.mean(list(chances.values())))
    shared[MEAN] = together.measured.mean(axis=1)
    details: dict[str, Any] = {
        "num_classes": {task.spec.name: len(task.sets.classes) for task in tasks},
        "most_common_class": {task.spec.name: task.sets.most_common for task in tasks},
        "steps": steps,
        "images_of_each_task": steps * context.task.tune.global_batch_size // len(tasks),
    }
    costs = [one.tuned for one in alone]
    if alone:
        single[MEAN] = np.mean(list(single.values()), axis=0)
        costs.append(_sum(costs))
        details["gain_of_sharing"] = accuracy_gain(shared[MEAN], single[MEAN], seed)
    rows = [
        mean_row(name, "accuracy", correct, seed, control=single.get(name), control_name="alone",
                 chance=chances[name], **together.tuned.columns())
        for name, correct in shared.items()
    ]  # fmt: skip
    rows += [
        mean_row(f"{name} alone", "accuracy", correct, seed, chance=chances[name], **cost.columns())
        for (name, correct), cost in zip(single.items(), costs, strict=True)
    ]
    return context.result("multitask", rows, details)


def _sum(parts: list[TrainStats]) -> TrainStats:
    """Return what predictors of one task each have taken together; they have no speed in common."""
    return TrainStats(
        num_tuned=sum(part.num_tuned for part in parts),
        images_per_s=None,
        time_s=sum(part.time_s for part in parts),
        steps=sum(part.steps for part in parts),
    )
