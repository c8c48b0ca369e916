"""Evaluate a run: `python -m iwm_fast.evaluate NAME run=DIR key=value ...`, alone or under a launcher.

`iwm evaluate NAME` does the same in one process. The number of ranks does not change the results. Evaluations that
train networks use the engine, checkpoints and data pipeline of pretraining, on all ranks.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.runtime.extras import require_training_packages
from iwm_fast.runtime.preemption import EXIT_PREEMPTED, PreemptedError, Preemption
from iwm_fast.runtime.process import (
    log_to_console,
    print_last_words,
    run_and_exit,
    watch_signals,
    without_local_rank,
)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation, whose function and settings are given as "module:name" and imported only when needed."""

    summary: str
    """Description for `iwm --help`."""
    target: str
    """Function that takes the settings and the `RankInfo`, and a `Preemption` if `trains`; returns a `Result`."""
    config: str
    """Dataclass of the settings."""
    trains: bool = False
    """Whether it trains networks for long, and therefore saves checkpoints and can be resumed."""

    @property
    def settings(self) -> Any:
        """Dataclass of the settings, imported."""
        return import_object(self.config)


def import_object(name: str) -> Any:
    """Import and return an object from its address "module:name"."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


# Columns of a table that is not printed on a terminal; rich would assume 80 and wrap every cell.
_PIPE_WIDTH = 160

_EVALS = "iwm_fast.evals"
_QUICK = "iwm_fast.config.evaluation"
_TRAINING = "iwm_fast.config.finetuning"
EVALUATIONS = {
    "mrr": Evaluation("mean reciprocal rank of the world model, compared with chance and an untrained predictor",
                      f"{_EVALS}.retrieval.mrr:evaluate_mrr", f"{_QUICK}:MrrConfig"),
    "rollout": Evaluation("several actions in a row, compared with one action that does the same",
                          f"{_EVALS}.retrieval.rollout:evaluate_rollout", f"{_QUICK}:RolloutConfig"),
    "sensitivity": Evaluation("how far transformations move the features, compared with an untrained encoder",
                              f"{_EVALS}.retrieval.sensitivity:evaluate_sensitivity", f"{_QUICK}:SensitivityConfig"),
    "knn": Evaluation("k nearest neighbours on frozen features, compared with an untrained encoder",
                      f"{_EVALS}.probing.knn:evaluate_knn", f"{_QUICK}:KnnConfig"),
    "linear": Evaluation("linear probe on frozen features, compared with an untrained encoder",
                         f"{_EVALS}.probing.linear:evaluate_linear", f"{_QUICK}:LinearConfig"),
    "attentive": Evaluation("attentive probe on frozen tokens, compared with an untrained encoder",
                            f"{_EVALS}.probing.attentive:evaluate_attentive", f"{_QUICK}:AttentiveConfig"),
    "plan": Evaluation("find the change between two images with the world model",
                       f"{_EVALS}.planning.evaluate:evaluate_plan", f"{_QUICK}:PlanConfig"),
    "finetune": Evaluation("finetune encoder, world model, random predictor, head alone, or everything end to end",
                           f"{_EVALS}.finetuning.classification:evaluate_finetune", f"{_TRAINING}:FinetuneConfig",
                           True),
    "multitask": Evaluation("one predictor for several tasks, compared with one predictor per task",
                            f"{_EVALS}.multitask.evaluate:evaluate_multitask", f"{_TRAINING}:MultitaskConfig", True),
    "segment": Evaluation("segmentation from encoder or predictor tokens by a linear head, mean IoU",
                          f"{_EVALS}.segmentation.evaluate:evaluate_segment", f"{_TRAINING}:SegmentConfig", True),
    "decode": Evaluation("train a decoder from tokens to pixels, to look at them; PSNR and SSIM beside its controls",
                         f"{_EVALS}.decoding.evaluate:evaluate_decode", f"{_TRAINING}:DecodeConfig", True),
}  # fmt: skip
"""Evaluations by name."""


def main() -> None:
    """Evaluate with the command line of this process, then exit."""
    run_and_exit(partial(evaluate, sys.argv[1:], watch_signals_if_training(sys.argv[1:])))


def watch_signals_if_training(arguments: Sequence[str]) -> Preemption:
    """Install signal handlers if the arguments name an evaluation that saves a checkpoint before it stops."""
    is_training = any(EVALUATIONS[word].trains for word in arguments if word in EVALUATIONS)
    return watch_signals() if is_training else Preemption()


def read_settings(config_class: Any, arguments: list[str]) -> Any:
    """Build the settings of an evaluation from `key=value` arguments.

    Raises:
        ValueError: for an unknown setting, a value of the wrong type or out of range, or if no run is named, or a
            checkpoint in its place.
    """
    # Imported here, because it takes a third of a second, which `iwm --help` need not wait for.
    from iwm_fast.config.loading import build  # noqa: PLC0415
    from iwm_fast.config.writable import require_writable  # noqa: PLC0415

    config = build(config_class, {}, arguments)
    if not config.run and not getattr(config, "timm", ""):
        raise ValueError("run must name the folder of a training run, got ''; for example run=runs/demo")
    refuse_checkpoint_folder(config.run)
    to = getattr(config, "to", "")
    if to:
        # The command that writes a file checks itself that it does not exist.
        require_writable("to", str(Path(to).parent) if to.endswith((".parquet", ".npz")) else to)
    return config


def refuse_checkpoint_folder(run: str) -> None:
    """Check that `run` does not name the folder of a checkpoint, into which results would be written.

    Raises:
        ValueError: if it does, naming the run and the step.
    """
    folder = Path(run)
    if folder.parent.name == "checkpoints" and (folder / "state.json").is_file():
        step = folder.name.removeprefix("step-").lstrip("0")
        raise ValueError(
            f"run must name the folder of a run, got that of a checkpoint; set run={folder.parents[1]}, and "
            f"checkpoint={step} where the command has that setting"
        )


def evaluate(arguments: Sequence[str], preemption: Preemption | None = None) -> None:
    """Evaluate a run with the arguments of the command line, NAME run=DIR key=value ..., and print the result.

    Raises:
        SystemExit: with code 75 if an evaluation that trains was asked to stop and has saved a checkpoint.
    """
    log_to_console()
    arguments = without_local_rank(arguments)
    with same_error_on_all_ranks():
        if not arguments or arguments[0] not in EVALUATIONS:
            raise ValueError(f"the first argument must be one of {', '.join(EVALUATIONS)}, got {arguments[:1]}")
        config = read_settings(EVALUATIONS[arguments[0]].settings, arguments[1:])
    try:
        _run(arguments[0], config, preemption or Preemption())
    except PreemptedError as stopped:
        # All ranks stop, but one message is enough.
        if os.environ.get("RANK", "0") == "0":
            print_last_words(f"{stopped}; run the same command again to resume")
        raise SystemExit(EXIT_PREEMPTED) from None


def _run(name: str, config: Any, preemption: Preemption) -> None:
    # Only evaluations that train have runtime settings.
    runtime = getattr(config, "runtime", None)
    if runtime is not None:
        require_training_packages(runtime.loader, runtime.engine)
    # Imported here, because they take seconds in which signals must be handled already.
    from rich.console import Console  # noqa: PLC0415

    from iwm_fast.config.fingerprint import flat_settings  # noqa: PLC0415
    from iwm_fast.evals.results import result_table  # noqa: PLC0415
    from iwm_fast.runtime import distributed  # noqa: PLC0415

    evaluation = EVALUATIONS[name]
    run = import_object(evaluation.target)
    shared = {"evaluation": name, **flat_settings(config)}
    if runtime is None:
        rank_info = distributed.start(config.device, settings=shared)
    else:
        rank_info = distributed.start(runtime.device, runtime.rank_timeout_s, shared)
    with distributed.left_unless_failed():
        result = run(config, rank_info, preemption) if evaluation.trains else run(config, rank_info)
    if rank_info.rank == 0:
        Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(result_table(result))


if __name__ == "__main__":
    main()
