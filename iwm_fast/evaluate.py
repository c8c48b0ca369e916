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


@dataclass(frozen=True)
class Task:
    """One kind of evaluation; names are "module:name" and imported when they are needed."""

    summary: str
    target: str
    """Function that takes settings and ranks, and the preemption too if it trains, and returns a result."""
    config: str
    """Class of its settings."""
    trains: bool = False
    """Whether it trains networks for long: then it resumes where it was stopped."""

    @property
    def settings(self) -> Any:
        """The class of its settings."""
        return load(self.config)


def load(name: str) -> Any:
    """Import what "module:name" names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


_PIPE_WIDTH = 160

_EVALS, _QUICK, _TRAINING = "iwm_fast.evals", "iwm_fast.config.evaluation", "iwm_fast.config.finetuning"
TASKS = {
    "mrr": Task("mean reciprocal rank of the world model, beside chance and untrained",
                f"{_EVALS}.retrieval.mrr:evaluate_mrr", f"{_QUICK}:MrrConfig"),
    "knn": Task("k nearest neighbours on frozen features, beside an untrained encoder",
                f"{_EVALS}.probing.knn:evaluate_knn", f"{_QUICK}:KnnConfig"),
    "linear": Task("linear probe on frozen features, beside an untrained encoder",
                   f"{_EVALS}.probing.linear:evaluate_linear", f"{_QUICK}:LinearConfig"),
    "attentive": Task("attentive probe on frozen tokens, likewise",
                      f"{_EVALS}.probing.attentive:evaluate_attentive", f"{_QUICK}:AttentiveConfig"),
    "plan": Task("find the change between two images through the world model",
                 f"{_EVALS}.planning.evaluate:evaluate_plan", f"{_QUICK}:PlanConfig"),
    "finetune": Task("five arms: encoder, world model, new predictor, head alone, end to end",
                     f"{_EVALS}.finetuning.classification:evaluate_finetune", f"{_TRAINING}:FinetuneConfig", True),
    "multitask": Task("one predictor for several tasks, beside one predictor each",
                      f"{_EVALS}.multitask.evaluate:evaluate_multitask", f"{_TRAINING}:MultitaskConfig", True),
    "segment": Task("segmentation from encoder or predictor tokens by a linear head, mean IoU",
                    f"{_EVALS}.segmentation.evaluate:evaluate_segment", f"{_TRAINING}:SegmentConfig", True),
}  # fmt: skip
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
    evaluation = load(task.target)
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
