"""Train one run: `python -m iwm_fast.train RUN.yaml key=value ...`, alone, under torchrun or the DeepSpeed launcher.

It listens to signals before it imports anything that takes time.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iwm_fast.messages import be_the_process, errors_as_messages, found_by_every_rank, lost_rank
from iwm_fast.preemption import EXIT_PREEMPTED, OF_PROCESS, PreemptedError, read_status, write_status
from iwm_fast.settings import load_config


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the arguments say: RUN.yaml key=value ...; launchers may add --local_rank.

    Without arguments given, those of this process are taken, which then listens to signals and ends.
    """
    if arguments is not None:
        _train(list(arguments))
        return
    OF_PROCESS.listen(has_launcher="RANK" in os.environ)
    be_the_process(lambda: _train(sys.argv[1:]))


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
        from iwm_fast.loop import run  # noqa: PLC0415 (seconds, in which a signal must not be lost)

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
