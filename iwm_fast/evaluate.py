"""Evaluate a run: `python -m iwm_fast.evaluate TASK run=DIR key=value ...`, alone or under a launcher.

`iwm evaluate TASK` is the same for one process. On many ranks the outcome is that of one; what trains networks also
trains on all of them, with the engine, the checkpoints and the pipelines of pretraining.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.runtime.preemption import EXIT_PREEMPTED, PreemptedError, Preemption
from iwm_fast.runtime.process import log_to_console, run_and_exit, watch_signals


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of evaluation, named so that nothing is imported before it is wanted."""

    summary: str
    module: str
    """Module below `iwm_fast.evals` with the function `evaluate_NAME`."""
    config: str
    """Class of its settings, as "module:name"."""
    trains: bool = False
    """Whether it trains networks for long: then it resumes where it was stopped."""

    @property
    def settings(self) -> Any:
        """The class of its settings."""
        module, _, name = self.config.partition(":")
        return getattr(import_module(module), name)


_PIPE_WIDTH = 160

TASKS = {
    "mrr": Task(
        module="retrieval.mrr",
        config="iwm_fast.config.evaluation:MrrConfig",
        summary="mean reciprocal rank of the world model, beside chance and untrained",
    ),
    "knn": Task(
        module="probing.knn",
        config="iwm_fast.config.evaluation:KnnConfig",
        summary="k nearest neighbours on frozen features, beside an untrained encoder",
    ),
    "linear": Task(
        module="probing.linear",
        config="iwm_fast.config.evaluation:LinearConfig",
        summary="linear probe on frozen features, beside an untrained encoder",
    ),
    "attentive": Task(
        module="probing.attentive",
        config="iwm_fast.config.evaluation:AttentiveConfig",
        summary="attentive probe on frozen tokens, likewise",
    ),
    "plan": Task(
        module="planning.evaluate",
        config="iwm_fast.config.evaluation:PlanConfig",
        summary="find the change between two images through the world model",
    ),
    "finetune": Task(
        module="finetuning.classification",
        config="iwm_fast.config.finetuning:FinetuneConfig",
        trains=True,
        summary="five arms: encoder, world model, new predictor, head alone, end to end",
    ),
    "multitask": Task(
        module="multitask.evaluate",
        config="iwm_fast.config.finetuning:MultitaskConfig",
        trains=True,
        summary="one predictor for several tasks, beside one predictor each",
    ),
    "segment": Task(
        module="segmentation.evaluate",
        config="iwm_fast.config.finetuning:SegmentConfig",
        trains=True,
        summary="segmentation from encoder or predictor tokens by a linear head, mean IoU",
    ),
}
"""By name."""


def main() -> None:
    """Evaluate as the command line of this process says, then end the process."""
    run_and_exit(partial(evaluate, sys.argv[1:], watch_signals_if_training(sys.argv[1:])))


def watch_signals_if_training(arguments: Sequence[str]) -> Preemption:
    """Watch for signals from now on if the task named is one that saves before it ends."""
    is_training = any(TASKS[word].trains for word in arguments if word in TASKS)
    return watch_signals() if is_training else Preemption()


def read_settings(kind: Any, arguments: list[str]) -> Any:
    """Build a task's settings.

    Raises:
        ValueError: for an unknown or unfit setting, or if no run is named.
    """
    # a third of a second
    from iwm_fast.config.loading import build  # noqa: PLC0415

    config = build(kind, {}, arguments)
    if not config.run and not getattr(config, "timm", ""):
        raise ValueError("run must name the folder of a training run, got ''; for example run=runs/demo")
    return config


def evaluate(arguments: Sequence[str], preemption: Preemption | None = None) -> None:
    """Evaluate a run and print the result: TASK run=DIR key=value ...; launchers may add --local_rank.

    Raises:
        SystemExit: with code 75 if a task that trains was told to stop and has written a checkpoint.
    """
    log_to_console()
    given = [argument for argument in arguments if not argument.startswith("--local_rank")]
    with same_error_on_all_ranks():
        if not given or given[0] not in TASKS:
            raise ValueError(f"which task? it must be one of {', '.join(TASKS)}, got {given[:1]}")
        config = read_settings(TASKS[given[0]].settings, given[1:])
    try:
        _run(given[0], config, preemption or Preemption())
    except PreemptedError as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"{stopped}; the same command goes on", file=sys.stderr)
        raise SystemExit(EXIT_PREEMPTED) from None


def _run(name: str, config: Any, preemption: Preemption) -> None:
    # seconds, in which a signal must not be lost
    from rich.console import Console  # noqa: PLC0415

    from iwm_fast.evals.results import table  # noqa: PLC0415
    from iwm_fast.runtime import distributed  # noqa: PLC0415

    task = TASKS[name]
    evaluation = getattr(import_module(f"iwm_fast.evals.{task.module}"), f"evaluate_{name}")
    runtime = getattr(config, "runtime", None)
    waiting = {} if runtime is None else {"timeout_s": runtime.rank_timeout_s}
    rank_info = distributed.start(config.device if runtime is None else runtime.device, **waiting)
    try:
        result = evaluation(config, rank_info, preemption) if task.trains else evaluation(config, rank_info)
    finally:
        distributed.stop()
    if rank_info.rank == 0:
        # in a pipe rich would fold everything into 80 columns
        Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table(result))


if __name__ == "__main__":
    main()
