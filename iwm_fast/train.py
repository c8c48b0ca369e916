"""Train one run: `python -m iwm_fast.train RUN.yaml key=value ...`, alone, under torchrun or the DeepSpeed launcher.

Signals are watched for before anything is imported that takes time.
"""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from iwm_fast.config.loading import load_config, format_settings
from iwm_fast.config.run import RunConfig
from iwm_fast.runtime.error_reporting import peer_failure_message, same_error_on_all_ranks
from iwm_fast.runtime.preemption import EXIT_PREEMPTED, PreemptedError, Preemption
from iwm_fast.runtime.process import log_to_console, run_and_exit, watch_signals
from iwm_fast.runtime.run_status import read_status, write_status


def main() -> None:
    """Train as the command line of this process says, then end the process."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"python -m iwm_fast.train RUN.yaml [key=value ...]\n\n{format_settings(RunConfig)}")
        return
    run_and_exit(partial(train, sys.argv[1:], watch_signals()))


def train(arguments: Sequence[str], preemption: Preemption | None = None) -> None:
    """Train a run: RUN.yaml key=value ...; launchers may add --local_rank.

    Raises:
        SystemExit: with code 75 if the run was told to stop and has written a checkpoint.
    """
    log_to_console()
    given = [argument for argument in arguments if not argument.startswith("--local_rank")]
    with same_error_on_all_ranks():
        if not given:
            raise ValueError("which run? give the path of its YAML file, then settings as key=value")
        config = load_config(given[0], given[1:])
    try:
        run(config, preemption or Preemption())
    except PreemptedError as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"{stopped}; go on with resume=auto", file=sys.stderr)
        raise SystemExit(EXIT_PREEMPTED) from None


def run(config: RunConfig, preemption: Preemption | None = None) -> Any:
    """Join the process group, train and leave it; return the `TrainState` at the end.

    Raises:
        PreemptedError: on every rank, if one was told to stop.
    """
    preemption = preemption or Preemption()
    folder = Path(config.output.folder)
    earlier = read_status(folder)

    def record_stop() -> None:
        write_status(folder, "preempted", earlier=earlier, reason=preemption.reason)

    preemption.on_timeout = record_stop
    # seconds, in which a signal must not be lost
    from iwm_fast.evals.online import OnlineEvaluation  # noqa: PLC0415
    from iwm_fast.runtime import distributed  # noqa: PLC0415
    from iwm_fast.training.components import build_components  # noqa: PLC0415
    from iwm_fast.training.pretraining import PretrainTask  # noqa: PLC0415
    from iwm_fast.training.trainer import Trainer  # noqa: PLC0415

    rank_info = distributed.start(config.runtime.device, config.runtime.rank_timeout_s)
    try:
        with same_error_on_all_ranks():
            components = build_components(config, rank_info)
        online = OnlineEvaluation(config, components.shards, rank_info)
        evaluators = [online] if config.output.evaluate_every else []
        return Trainer(PretrainTask(components), preemption=preemption, evaluators=evaluators).run()
    except RuntimeError as error:
        # a launcher that ends takes with it what its ranks meet through
        if peer_failure_message(error) and preemption.launcher_exited():
            record_stop()
        raise
    finally:
        distributed.stop()


if __name__ == "__main__":
    main()
