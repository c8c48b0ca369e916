"""Train one run: `python -m iwm_fast.train RUN.yaml key=value ...`, alone, under torchrun or the DeepSpeed launcher.

It listens to signals before it imports anything that takes time.
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iwm_fast.config.loading import load_config, settings_text
from iwm_fast.config.run import RunConfig
from iwm_fast.runtime.error_reporting import be_the_process, errors_as_messages, found_by_every_rank, lost_rank
from iwm_fast.runtime.preemption import EXIT_PREEMPTED, OF_PROCESS, PreemptedError, Preemption
from iwm_fast.runtime.run_status import read_status, write_status


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the arguments say: RUN.yaml key=value ...; launchers may add --local_rank.

    Without arguments given, those of this process are taken, which then listens to signals and ends.
    """
    if arguments is not None:
        _train(list(arguments))
        return
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"python -m iwm_fast.train RUN.yaml [key=value ...]\n\n{settings_text(RunConfig)}")
        return
    OF_PROCESS.listen(has_launcher="RANK" in os.environ)
    be_the_process(lambda: _train(sys.argv[1:]))


def run(config: RunConfig, preemption: Preemption | None = None) -> Any:
    """Start the process group, train, stop; return the `Progress` at the end.

    Raises:
        PreemptedError: on every rank, if one was told to stop.
    """
    # seconds, in which a signal must not be lost
    from iwm_fast.evals.online import OnlineEvaluation  # noqa: PLC0415
    from iwm_fast.runtime import distributed  # noqa: PLC0415
    from iwm_fast.training.components import build_components  # noqa: PLC0415
    from iwm_fast.training.trainer import train  # noqa: PLC0415

    rank = os.environ.get("RANK", "0")
    level, mark = (logging.INFO, "") if rank == "0" else (logging.WARNING, f"[rank {rank}] ")
    logging.basicConfig(level=level, format=f"{mark}%(message)s")
    rank_info = distributed.start(config.runtime.device, config.runtime.rank_timeout_s)
    try:
        with found_by_every_rank():
            components = build_components(config, rank_info)
        online = OnlineEvaluation(config, components.shards, rank_info)
        return train(components, preemption, [online] if config.output.evaluate_every else [])
    finally:
        distributed.stop()


def _train(given: list[str]) -> None:
    given = [argument for argument in given if not argument.startswith("--local_rank")]
    with errors_as_messages():
        with found_by_every_rank():
            if not given:
                raise ValueError("which run? give the path of its YAML file, then settings as key=value")
            config = load_config(given[0], given[1:])
        folder = Path(config.output.folder)
        earlier = read_status(folder)
        OF_PROCESS.before_giving_up = lambda: _note_stop(folder, earlier)
        try:
            run(config, OF_PROCESS)
        except PreemptedError as stopped:
            if os.environ.get("RANK", "0") == "0":
                print(f"{stopped}; go on with resume=auto", file=sys.stderr)
            raise SystemExit(EXIT_PREEMPTED) from None
        except RuntimeError as error:
            # a launcher takes with it what ranks meet through
            if lost_rank(error) and OF_PROCESS.has_lost_launcher():
                _note_stop(folder, earlier)
            raise


def _note_stop(folder: Path, earlier: dict[str, Any]) -> None:
    write_status(folder, "preempted", earlier=earlier, reason=OF_PROCESS.reason)


if __name__ == "__main__":
    main()
