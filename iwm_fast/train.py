"""Train a run: `python -m iwm_fast.train RUN.yaml key=value ...`, alone, under torchrun or the DeepSpeed launcher.

Signal handlers are installed before the slow imports, so that a signal during start-up is not lost.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iwm_fast.config.fingerprint import flat_settings
from iwm_fast.config.loading import format_settings, load_config
from iwm_fast.config.run import RunConfig
from iwm_fast.config.writable import require_writable
from iwm_fast.monitoring.metric_writer import require_logins
from iwm_fast.runtime.error_reporting import peer_failure_message, same_error_on_all_ranks
from iwm_fast.runtime.extras import require_training_packages
from iwm_fast.runtime.preemption import EXIT_PREEMPTED, PreemptedError, Preemption
from iwm_fast.runtime.process import (
    log_to_console,
    print_last_words,
    run_and_exit,
    watch_signals,
    without_local_rank,
)
from iwm_fast.runtime.run_lock import RunLock
from iwm_fast.runtime.run_status import read_status, write_status

if TYPE_CHECKING:
    from iwm_fast.world_model import WorldModel

log = logging.getLogger(__name__)


def main() -> None:
    """Train with the command line of this process, then exit."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        text = f"python -m iwm_fast.train RUN.yaml [key=value ...]\n\n{format_settings(RunConfig)}"
        run_and_exit(partial(print, text))
    run_and_exit(partial(train, sys.argv[1:], watch_signals()))


def train(arguments: Sequence[str], preemption: Preemption | None = None) -> None:
    """Train a run with the arguments of the command line: RUN.yaml key=value ...

    Raises:
        SystemExit: with code 75 if the run was asked to stop and has saved a checkpoint.
    """
    log_to_console()
    arguments = without_local_rank(arguments)
    with same_error_on_all_ranks():
        if not arguments:
            raise ValueError(
                "no run named; give its YAML file or a name that `iwm configs` lists, then key=value settings"
            )
        config = load_config(arguments[0], arguments[1:])
    try:
        run(config, preemption or Preemption())
        # After the run, so that no rank waits for it.
        if os.environ.get("RANK", "0") == "0":
            print(_describe_end(config))
    except PreemptedError as stopped:
        # All ranks stop, but one message is enough.
        if os.environ.get("RANK", "0") == "0":
            print_last_words(f"{stopped}; resume with resume=auto")
        raise SystemExit(EXIT_PREEMPTED) from None


def _describe_end(config: RunConfig) -> str:
    from iwm_fast.checkpoints import checkpoint as checkpoints  # noqa: PLC0415
    from iwm_fast.monitoring.metrics import read_metrics  # noqa: PLC0415
    from iwm_fast.monitoring.run_summary import summarize_run  # noqa: PLC0415

    folder = Path(config.output.folder)
    return summarize_run(config, read_metrics(folder), checkpoints.find_newest_folder(folder))


def run(config: RunConfig, preemption: Preemption | None = None) -> Any:
    """Join the process group, train, leave the group, and return the final `TrainState`.

    When one of several ranks fails, it stays in the group, and its process must end. Collective: every rank must call
    it.

    Raises:
        MissingPackageError: if a package that the settings need is not installed.
        PreemptedError: on every rank, if one of them was asked to stop.
    """
    _require_writable_folder_and_packages(config)
    preemption = preemption or Preemption()
    folder = Path(config.output.folder)
    # A failure recorded by an earlier start may be overwritten, one of this start may not.
    earlier = read_status(folder)

    def record_stop() -> None:
        write_status(folder, "preempted", earlier=earlier, reason=preemption.reason)

    # Replaced by the trainer once it is running.
    preemption.on_timeout = record_stop
    # Imported here, because they take seconds in which signals must be handled already.
    from iwm_fast.evals.online import OnlineEvaluation  # noqa: PLC0415
    from iwm_fast.monitoring.out_of_memory import TrainingMemoryError  # noqa: PLC0415
    from iwm_fast.runtime import distributed  # noqa: PLC0415
    from iwm_fast.training.components import build_components  # noqa: PLC0415
    from iwm_fast.training.pretraining import PretrainTask  # noqa: PLC0415
    from iwm_fast.training.trainer import Trainer  # noqa: PLC0415

    try:
        rank_info = distributed.start(config.runtime.device, config.runtime.rank_timeout_s, flat_settings(config))
    except distributed.ProcessGroupError as error:
        _record_failed_start(folder, str(error))
        raise
    try:
        with distributed.left_unless_failed():
            with _recorded_unless_shared(folder), same_error_on_all_ranks():
                components = build_components(config, rank_info)
            online = OnlineEvaluation(config, components.shards, rank_info)
            evaluators = [online] if config.output.evaluate_every else []
            return Trainer(PretrainTask(components), preemption=preemption, evaluators=evaluators).run()
    except RuntimeError as error:
        # A launcher that exits takes the rendezvous store of its ranks with it, so their next exchange fails. That is a
        # request to stop, not a failure of the run.
        if peer_failure_message(error) and preemption.launcher_exited():
            record_stop()
        if isinstance(error, TrainingMemoryError):
            _record_memory_error(folder, earlier, error)
        raise


def _require_writable_folder_and_packages(config: RunConfig) -> None:
    with same_error_on_all_ranks():
        require_writable("output.folder", config.output.folder)
    with _recorded_unless_shared(Path(config.output.folder)), same_error_on_all_ranks():
        require_training_packages(config.runtime.loader, config.runtime.engine, config.output.loggers)
        require_logins(config.output.loggers)


@contextmanager
def _recorded_unless_shared(folder: Path) -> Iterator[None]:
    """Write the status of a run that fails because of a rank's own error, such as a file missing on its machine.

    The launcher then ends rank 0 with a signal. Without this, rank 0 would report that the run was preempted.
    """
    try:
        yield
    # Those errors that `same_error_on_all_ranks` expects; a gone rank is none of them.
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("RANK", "0") != "0":
            _record_failed_start(folder, str(error))
        raise


def _record_memory_error(folder: Path, earlier: dict[str, Any], error: RuntimeError) -> None:
    """Write the status of a run whose networks did not fit; in later phases the trainer has written it."""
    # A run that is in the folder already may be that of another process, or finished.
    if read_status(folder) == earlier and earlier.get("state") not in ("running", "finished"):
        write_status(folder, "failed", reason=f"{type(error).__name__}: {error}")


def _record_failed_start(folder: Path, reason: str) -> None:
    """Write the status of a run whose ranks did not find each other, before the launcher ends the other ranks."""
    # In a folder in use the status belongs to another run, which may be the one that has the port.
    with suppress(ValueError):
        lock = RunLock(folder)
        write_status(folder, "failed", reason=reason)
        lock.close()


def pretrain(
    shards: str | Path | Sequence[str], config: str | Path = "vit_s16", *, output: str | Path, **settings: Any
) -> "WorldModel":
    """Train a run in this process, for instance in a notebook, and return the trained model.

    It does the same as `iwm train CONFIG data.train=SHARDS output.folder=OUTPUT ...`.

    Args:
        shards: training shards, written like data.train, or a folder of images, which is packed into shards first, in
            the folder OUTPUT_shards, unless an earlier call has done so.
        config: path of a YAML file, or the name of a file in `iwm_fast/configs` without its ending.
        output: folder of the run.
        settings: further settings, nested such as `optim={"epochs": 4}`, or dotted such as `**{"optim.epochs": 4}`.

    Raises:
        FileNotFoundError: if there is no such configuration, or there are no images or shards.
        ValueError: if a setting is unknown or out of range, or this process is one of several of a launcher.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("pretrain trains in one process; launch several ranks with `torchrun -m iwm_fast.train`")
    log_to_console()
    train = "::".join(shards) if isinstance(shards, list | tuple) else str(shards)
    overrides = _overrides(settings | {"data.train": train, "output.folder": str(output)})
    named = Path(__file__).parent / "configs" / f"{config}.yaml"
    run_config = load_config(named if named.is_file() else config, overrides)
    run(replace(run_config, data=replace(run_config.data, train=_pack_images(run_config))))
    # Imported here, because `iwm train --help` need not wait for torch.
    from iwm_fast.world_model import load  # noqa: PLC0415

    return load(output)


def _overrides(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """Return nested settings as texts `group.key=value`."""
    texts = []
    for name, value in settings.items():
        if isinstance(value, dict):
            texts += _overrides(value, f"{prefix}{name}.")
        else:
            # JSON is valid YAML, which overrides are written in. Strings are used verbatim.
            text = str(value) if isinstance(value, str | Path) else json.dumps(value)
            texts.append(f"{prefix}{name}={text}")
    return texts


def _pack_images(config: RunConfig) -> str:
    """Return the training shards of a run; a folder of images is packed into shards next to the run's folder."""
    source, folder = Path(config.data.train), Path(config.output.folder).absolute()
    if not source.is_dir() or any(source.glob("*.tar")):
        return config.data.train
    from iwm_fast.pipelines.storage.shard_writer import pack_folder  # noqa: PLC0415

    shards = folder.with_name(f"{folder.name}_shards")
    if shards.is_dir():
        log.info("using the shards in %s, which were packed earlier; remove it to pack %s again", shards, source)
    else:
        log.info("packing the images of %s into shards in %s", source, shards)
        pack_folder(source, shards)
    return str(shards)


if __name__ == "__main__":
    main()
