"""Evaluate a run: `python -m iwm_fast.evaluate TASK run=DIR key=value ...`, alone or under a launcher.

`iwm evaluate TASK` is the same for one process. On many ranks the outcome is that of one; what trains networks also
trains on all of them, with the engine, the checkpoints and the pipelines of pretraining.
"""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from iwm_fast.runtime.error_reporting import be_the_process, errors_as_messages, found_by_every_rank
from iwm_fast.runtime.preemption import EXIT_PREEMPTED, OF_PROCESS, PreemptedError


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of evaluation, named so that nothing is imported before it is wanted."""

    summary: str
    module: str
    """Module below `iwm_fast.evals` with the function `evaluate_NAME`."""
    config: str
    """Class of its settings in `iwm_fast.config.evaluation`, or in `iwm_fast.config.finetuning` if it trains."""
    trains: bool = False
    """Whether it trains networks for long: then it goes on where it was stopped."""

    @property
    def settings(self) -> Any:
        """The class of its settings."""
        return getattr(import_module(f"iwm_fast.config.{'finetuning' if self.trains else 'evaluation'}"), self.config)


_PIPE_WIDTH = 160

TASKS = {
    "mrr": Task(
        module="retrieval.mrr",
        config="MrrConfig",
        summary="mean reciprocal rank of the world model, beside chance and untrained",
    ),
    "knn": Task(
        module="probing.knn",
        config="KnnConfig",
        summary="k nearest neighbours on frozen features, beside an untrained encoder",
    ),
    "linear": Task(
        module="probing.linear",
        config="LinearConfig",
        summary="linear probe on frozen features, beside an untrained encoder",
    ),
    "attentive": Task(
        module="probing.attentive", config="AttentiveConfig", summary="attentive probe on frozen tokens, likewise"
    ),
    "plan": Task(
        module="planning.evaluate",
        config="PlanConfig",
        summary="find the change between two images through the world model",
    ),
    "finetune": Task(
        module="finetuning.classification",
        config="FinetuneConfig",
        trains=True,
        summary="five arms: encoder, world model, new predictor, head alone, end to end",
    ),
    "multitask": Task(
        module="multitask.evaluate",
        config="MultitaskConfig",
        trains=True,
        summary="one predictor for several tasks, beside one predictor each",
    ),
    "segment": Task(
        module="segmentation.evaluate",
        config="SegmentConfig",
        trains=True,
        summary="segmentation from encoder or predictor tokens by a linear head, mean IoU",
    ),
}
"""By name."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate as the arguments say: TASK run=DIR key=value ...; launchers may add --local_rank.

    Without arguments given, those of this process are taken, which then ends and, if the task trains, listens to
    signals.
    """
    if arguments is not None:
        _evaluate(list(arguments))
        return
    listen_if_training(sys.argv[1:])
    be_the_process(lambda: _evaluate(sys.argv[1:]))


def listen_if_training(arguments: list[str]) -> None:
    """Take notice of signals from now on if the task named is one that saves before it ends."""
    if any(TASKS[word].trains for word in arguments if word in TASKS):
        OF_PROCESS.listen(has_launcher="RANK" in os.environ)


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


def _evaluate(given: list[str]) -> None:
    given = [argument for argument in given if not argument.startswith("--local_rank")]
    with errors_as_messages():
        with found_by_every_rank():
            if not given or given[0] not in TASKS:
                raise ValueError(f"which task? it must be one of {', '.join(TASKS)}, got {given[:1]}")
            config = read_settings(TASKS[given[0]].settings, given[1:])
        try:
            _run(given[0], config)
        except PreemptedError as stopped:
            if os.environ.get("RANK", "0") == "0":
                print(f"{stopped}; the same command goes on", file=sys.stderr)
            raise SystemExit(EXIT_PREEMPTED) from None


def _run(name: str, config: Any) -> None:
    # seconds, in which a signal must not be lost
    from rich.console import Console  # noqa: PLC0415

    from iwm_fast.evals.results import table  # noqa: PLC0415
    from iwm_fast.runtime import distributed  # noqa: PLC0415

    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_first else logging.WARNING, format="%(message)s")
    act = getattr(import_module(f"iwm_fast.evals.{TASKS[name].module}"), f"evaluate_{name}")
    runtime = getattr(config, "runtime", None)
    waiting = {} if runtime is None else {"timeout_s": runtime.rank_timeout_s}
    distributed.start(config.device if runtime is None else runtime.device, **waiting)
    try:
        result = act(config)
    finally:
        distributed.stop()
    if is_first:
        # in a pipe rich would fold everything into 80 columns
        Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table(result))


if __name__ == "__main__":
    main()
