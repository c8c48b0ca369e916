"""What predictors of one and of several tasks have learnt, as rows beside each other."""

from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool

from iwm_fast.config.finetuning import MultitaskConfig
from iwm_fast.evals.finetuning.run import task_folder
from iwm_fast.evals.multitask.task_list import MEAN, TaskSpec
from iwm_fast.evals.results import Result, Row, accuracy_row, bootstrap
from iwm_fast.pipelines.annotations.labels import Labels
from iwm_fast.training.train_state import TrainStats


@dataclass(frozen=True, kw_only=True)
class LabelledTask:
    """A task and the labels of both sets."""

    spec: TaskSpec
    train: Labels
    val: Labels

    @property
    def chance(self) -> float:
        """What a guess would give that takes each class for equally common."""
        return 1 / len(self.train.classes)

    @property
    def most_common(self) -> float:
        """Share of the validation images in the class that most training images have: what a better guess names."""
        return float((self.val.number == self.train.counts.argmax()).mean())


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What a predictor of one or several tasks has come to."""

    correct: Bool[np.ndarray, "images tasks"]
    """Whether it names each validation image rightly."""
    tuned: TrainStats


def report(
    config: MultitaskConfig, step: int, tasks: list[LabelledTask], together: Learnt, alone: list[Learnt]
) -> Result:
    """Return rows of each task and of their mean, in one predictor and alone.

    Args:
        config: settings.
        step: of the run's checkpoint.
        tasks: what was learnt.
        together: by one predictor.
        alone: by one predictor each; empty if there were none.
    """
    names, chances = [task.spec.name for task in tasks], [task.chance for task in tasks]
    single = [one.correct[:, 0] for one in alone]
    rows = [
        _row(name, together.correct[:, number], chances[number], config.seed, together.tuned,
             control=single[number] if alone else None)
        for number, name in enumerate(names)
    ]  # fmt: skip
    shares = np.mean(together.correct, axis=1)
    control = np.mean(single, axis=0) if alone else None
    chance = float(np.mean(chances))
    rows.append(_row(MEAN, shares, chance, config.seed, together.tuned, control=control))
    gain = {}
    if control is not None:
        # on the same images: their differences vary less than two means
        low, high = bootstrap(shares - control, config.seed)
        gain = {"gain_of_sharing": {"accuracy": float(np.mean(shares - control)), "low": low, "high": high}}
        found = zip(names, single, chances, alone, strict=True)
        rows += [_row(f"{name} alone", right, guess, config.seed, one.tuned) for name, right, guess, one in found]
        rows.append(_row(f"{MEAN} alone", control, chance, config.seed, _sum([one.tuned for one in alone])))
    return Result(
        task="multitask",
        name=task_folder(config.run, "multitask", config.name).name,
        rows=tuple(rows),
        step=step,
        seed=config.seed,
        settings=asdict(config),
        details={
            "num_classes": {task.spec.name: len(task.train.classes) for task in tasks},
            "most_common_class": {task.spec.name: task.most_common for task in tasks},
            "steps": together.tuned.steps,
            "images_of_each_task": together.tuned.steps * config.tune.global_batch_size // len(tasks),
            **gain,
        },
    )


def _row(
    subject: str, right: np.ndarray, chance: float, seed: int, tuned: TrainStats, *, control: np.ndarray | None = None
) -> Row:
    return accuracy_row(
        subject,
        right,
        seed,
        control=None if control is None else float(control.mean()),
        control_name="" if control is None else "alone",
        chance=chance,
        **tuned.columns(),
    )


def _sum(parts: list[TrainStats]) -> TrainStats:
    """Return what predictors of one task each have taken together; they have no speed in common."""
    return TrainStats(
        num_tuned=sum(part.num_tuned for part in parts),
        images_per_s=None,
        time_s=sum(part.time_s for part in parts),
        steps=sum(part.steps for part in parts),
    )
