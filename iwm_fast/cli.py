"""The `iwm` command: one subcommand per thing a user does; each imports its module when it is called."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from iwm_fast.evaluate import TASKS, evaluate, load, read_settings, watch_signals_if_training
from iwm_fast.runtime.error_reporting import user_facing_errors
from iwm_fast.runtime.preemption import EXIT_PREEMPTED
from iwm_fast.runtime.process import log_to_console, run_and_exit, watch_signals
from iwm_fast.train import train

RUN_CONFIG = "iwm_fast.config.run:RunConfig"


@dataclass(frozen=True)
class Command:
    """One subcommand; functions and settings are named as "module:name" and imported when they are needed."""

    usage: str
    summary: str
    target: str | Callable[..., Any]
    """Called with the settings, its result is printed; a function of this file is called with the arguments."""
    settings: str = ""
    """Class whose fields `--help` explains."""


def _read(settings: str, arguments: list[str]) -> Any:
    """Return checked settings: of a run from its YAML file and overrides, of anything else from overrides alone."""
    if settings != RUN_CONFIG:
        return read_settings(load(settings), arguments)
    if not arguments:
        raise ValueError("which run? give the path of its YAML file, then settings as key=value")
    return load("iwm_fast.config.loading:load_config")(arguments[0], arguments[1:])


def _check(arguments: list[str]) -> None:
    kind = load(COMMANDS["check"].settings)
    names = {one.name for one in fields(kind)}
    of_the_run = [argument for argument in arguments if argument.partition("=")[0] not in names]
    of_the_check = [argument for argument in arguments if argument not in of_the_run]
    config = _read(RUN_CONFIG, of_the_run)
    load("iwm_fast.commands.check_run:check_run")(config, load("iwm_fast.config.loading:build")(kind, {}, of_the_check))


def _plan(arguments: list[str]) -> None:
    config = read_settings(TASKS["plan"].settings, arguments)
    if not config.source:
        return evaluate(["plan", *arguments])
    print(load("iwm_fast.evals.planning.evaluate:plan_images")(config))


def _lab(arguments: list[str]) -> None:
    (path,) = _exactly(arguments, "the lab's YAML file")
    runner = import_module("iwm_fast.lab.runner")
    log_to_console()
    try:
        print(runner.run_lab(Path(path)))
    except runner.LabStoppedError as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(EXIT_PREEMPTED) from None


def _report(arguments: list[str]) -> None:
    config = load("iwm_fast.config.loading:build")(load(COMMANDS["report"].settings), {}, arguments)
    if config.lab:
        print(load("iwm_fast.lab.runner:report_lab")(Path(config.lab)))
    else:
        print(load("iwm_fast.commands.report_run:write_run_report")(Path(config.run)))


def _shards_demo(arguments: list[str]) -> None:
    (folder,) = _exactly(arguments, "a folder to write to")
    print(load("iwm_fast.pipelines.demo_data:write_demo_shards")(Path(folder)))


def _shards_pack(arguments: list[str]) -> None:
    source, folder = _exactly(arguments[:2], "an image folder", "a folder to write to")
    config = load("iwm_fast.config.loading:build")(load(COMMANDS["shards pack"].settings), {}, arguments[2:])
    for path in load("iwm_fast.pipelines.storage.shard_writer:pack_folder")(Path(source), Path(folder), config):
        print(path)


def _shards_check(arguments: list[str]) -> None:
    (spec,) = _exactly(arguments, "the shards: a path, pattern, folder or address")
    load("iwm_fast.commands.check_shards:check_shards")(spec)


def _demo(arguments: list[str]) -> None:
    load("iwm_fast.commands.demo:demo")(arguments)


def _exactly(arguments: list[str], *names: str) -> list[str]:
    if len(arguments) != len(names):
        raise ValueError(f"expected {len(names)} arguments ({'; '.join(names)}), got {arguments}")
    return arguments


_TASK = "run=DIR [key=value ...]"
COMMANDS = {
    "train": Command(
        "RUN.yaml [key=value ...]",
        "train a run, alone or under `deepspeed --module iwm_fast.train` or torchrun", train, RUN_CONFIG),
    "check": Command(
        "RUN.yaml [key=value ...] [ranks=N] [gpu=NAME | images_per_s=R]",
        "tell what a run will take and whether it can start: data, steps, memory, hours",
        _check, "iwm_fast.config.commands:CheckConfig"),
    "warmup": Command(
        "RUN.yaml runtime.ops=fused [key=value ...]",
        "compile the kernels a run needs, once per machine, before its ranks start",
        "iwm_fast.commands.compile_kernels:warm_up", RUN_CONFIG),
    "show": Command(
        "RUN.yaml [key=value ...]", "draw what the model will see: views, masks and actions of a few samples",
        "iwm_fast.commands.show_batch:show", RUN_CONFIG),
    **{f"evaluate {name}": Command(_TASK, task.summary, evaluate, task.config)
       for name, task in TASKS.items() if name != "plan"},
    "export": Command(
        "run=DIR to=DIR", "write encoder, world model and a model card as a folder for others",
        "iwm_fast.checkpoints.export:export", "iwm_fast.config.commands:ExportConfig"),
    "imagine": Command(
        _TASK, "draw source, asked-for change and what the prediction retrieves",
        "iwm_fast.evals.retrieval.visualize:imagine", "iwm_fast.config.evaluation:ImagineConfig"),
    "plan": Command(
        "run=DIR [source=IMAGE target=IMAGE] [key=value ...]", TASKS["plan"].summary, _plan, TASKS["plan"].config),
    "report": Command(
        "run=DIR | lab=DIR", "write one HTML page of a run or a lab: curves, tables, pictures, settings",
        _report, "iwm_fast.config.commands:ReportConfig"),
    "lab": Command(
        "LAB.yaml", "run a grid of small trainings, evaluate them and judge the claims; resumes if stopped", _lab),
    "replay": Command(
        "run=DIR step=S [key=value ...]", "render the views of a logged step again, as training saw them",
        "iwm_fast.commands.replay_step:replay", "iwm_fast.config.commands:ReplayConfig"),
    "shards demo": Command(
        "FOLDER", "write the demo's shards from photographs bundled with its dependencies", _shards_demo),
    "shards pack": Command(
        "IMAGE_FOLDER FOLDER [key=value ...]",
        "write shards from an image folder, with or without one subfolder per class",
        _shards_pack, "iwm_fast.pipelines.config:PackConfig"),
    "shards check": Command(
        "SHARDS", "decode every sample once, report, and leave out what cannot be read", _shards_check),
    "demo": Command(
        "[key=value ...]", "photographs to a trained, measured world model; what `make demo` runs", _demo),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command in the arguments; without arguments given, the one this process was started with, then exit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = next((name for name in (" ".join(given[:2]), *given[:1]) if name in COMMANDS), "")
    is_process = arguments is None
    act: Callable[[], None]
    if not name:
        act = partial(_overview, given)
    elif {"-h", "--help"} & set(given):
        act = partial(_help, name)
    elif name == "train":
        # signals are watched for before anything that takes time is imported
        act = partial(train, given[1:], watch_signals() if is_process else None)
    elif name.startswith("evaluate "):
        act = partial(evaluate, given[1:], watch_signals_if_training(given) if is_process else None)
    else:
        act = partial(_run, COMMANDS[name], given[len(name.split()) :])
    if is_process:
        run_and_exit(act)
    with user_facing_errors():
        act()


def _run(command: Command, arguments: list[str]) -> None:
    if callable(command.target):
        command.target(arguments)
        return
    # settings are read first: a mistake in them is told before anything that takes time is imported
    config = _read(command.settings, arguments)
    result = load(command.target)(config)
    print(*result, sep="\n") if isinstance(result, tuple | list) else print(result)


def _is_group(given: list[str]) -> bool:
    asks = len(given) == 1 or given[1] in ("-h", "--help")
    return asks and any(name.startswith(given[0] + " ") for name in COMMANDS)


def _overview(given: list[str]) -> None:
    if given and given[0] not in ("-h", "--help") and not _is_group(given):
        raise ValueError(f"unknown command {' '.join(given[:2])!r}; known are {', '.join(COMMANDS)}")
    prefix = given[0] + " " if given and _is_group(given) else ""
    print("iwm: train Image World Models and use them\n")
    for name, command in COMMANDS.items():
        if name.startswith(prefix):
            print(f"  iwm {name} {command.usage}\n      {command.summary}")
    print("\n`iwm COMMAND --help` explains the settings. IWM_TRACEBACK=1 shows where an error comes from.")


def _help(name: str) -> None:
    command = COMMANDS[name]
    print(f"iwm {name} {command.usage}\n\n{command.summary}")
    if command.settings:
        print("\n" + load("iwm_fast.config.loading:format_settings")(load(command.settings)))


if __name__ == "__main__":
    main()
