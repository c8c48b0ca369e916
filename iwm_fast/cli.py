"""The `iwm` command: one subcommand per thing a user does; each imports its module when it is called."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from iwm_fast.evaluate import TASKS, listen_if_training, read_settings
from iwm_fast.evaluate import main as evaluate
from iwm_fast.runtime.error_reporting import be_the_process, errors_as_messages
from iwm_fast.runtime.preemption import OF_PROCESS


@dataclass(frozen=True, kw_only=True)
class Command:
    """One subcommand: what it takes, what it does."""

    usage: str
    summary: str
    act: Callable[[list[str]], None]
    settings: Callable[[], Any] | None = None
    """Returns the dataclass whose fields `--help` explains."""


def _settings(module: str, name: str) -> Callable[[], Any]:
    """Return what imports a class of settings when it is asked for."""
    return lambda: getattr(import_module(module), name)


_run_config = _settings("iwm_fast.config.run", "RunConfig")
_check_config = _settings("iwm_fast.config.commands", "CheckConfig")
_export_config = _settings("iwm_fast.config.commands", "ExportConfig")
_report_config = _settings("iwm_fast.config.commands", "ReportConfig")
_imagine_config = _settings("iwm_fast.config.evaluation", "ImagineConfig")
_replay_config = _settings("iwm_fast.config.commands", "ReplayConfig")
_pack_config = _settings("iwm_fast.pipelines.config", "PackConfig")


def _load(arguments: list[str]) -> Any:
    from iwm_fast.config.loading import load_config

    if not arguments:
        raise ValueError("which run? give the path of its YAML file, then settings as key=value")
    return load_config(arguments[0], arguments[1:])


def _train(arguments: list[str]) -> None:
    from iwm_fast.train import main as train

    train(arguments)


def _check(arguments: list[str]) -> None:
    from dataclasses import fields

    from iwm_fast.config.loading import build

    own = {one.name for one in fields(_check_config())}
    of_the_run = [argument for argument in arguments if argument.partition("=")[0] not in own]
    config = _load(of_the_run)
    asked = build(_check_config(), {}, [argument for argument in arguments if argument not in of_the_run])
    from iwm_fast.commands.check_run import check_run

    check_run(config, asked)


def _export(arguments: list[str]) -> None:
    config = read_settings(_export_config(), arguments)
    from iwm_fast.checkpoints.export import export

    print(export(config))


def _warmup(arguments: list[str]) -> None:
    config = _load(arguments)
    from iwm_fast.commands.compile_kernels import warm_up

    print(warm_up(config))


def _show(arguments: list[str]) -> None:
    config = _load(arguments)
    from iwm_fast.commands.show_batch import show

    print(show(config))


def _evaluate(name: str) -> Callable[[list[str]], None]:
    def act(arguments: list[str]) -> None:
        evaluate([name, *arguments])

    return act


def _imagine(arguments: list[str]) -> None:
    config = read_settings(_imagine_config(), arguments)
    from iwm_fast.evals.retrieval.visualize import imagine

    print(*imagine(config), sep="\n")


def _plan(arguments: list[str]) -> None:
    if not read_settings(TASKS["plan"].settings, arguments).source:
        return _evaluate("plan")(arguments)
    from iwm_fast.evals.planning.evaluate import plan_images

    print(plan_images(read_settings(TASKS["plan"].settings, arguments)))


def _replay(arguments: list[str]) -> None:
    config = read_settings(_replay_config(), arguments)
    from iwm_fast.commands.replay_step import replay

    print(replay(config))


def _lab(arguments: list[str]) -> None:
    (path,) = _exactly(arguments, "the lab's YAML file")
    import logging
    from pathlib import Path

    from iwm_fast.lab.runner import run_lab

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(run_lab(Path(path)))


def _report(arguments: list[str]) -> None:
    from pathlib import Path

    from iwm_fast.config.loading import build

    config = build(_report_config(), {}, arguments)
    if config.lab:
        from iwm_fast.lab.runner import report_lab

        print(report_lab(Path(config.lab)))
        return
    from iwm_fast.commands.report_run import write_run_report

    print(write_run_report(Path(config.run)))


def _shards_demo(arguments: list[str]) -> None:
    (folder,) = _exactly(arguments, "a folder to write to")
    from pathlib import Path

    from iwm_fast.pipelines.demo_data import write_demo_shards

    print(write_demo_shards(Path(folder)))


def _shards_pack(arguments: list[str]) -> None:
    source, folder = _exactly(arguments[:2], "an image folder", "a folder to write to")
    from pathlib import Path

    from iwm_fast.config.loading import build
    from iwm_fast.pipelines.storage.shard_writer import pack_folder

    for path in pack_folder(Path(source), Path(folder), build(_pack_config(), {}, arguments[2:])):
        print(path)


def _shards_check(arguments: list[str]) -> None:
    (spec,) = _exactly(arguments, "the shards: a path, pattern, folder or address")
    from iwm_fast.commands.check_shards import check_shards

    check_shards(spec)


def _demo(arguments: list[str]) -> None:
    from iwm_fast.commands.demo import demo

    demo(arguments)


COMMANDS = {
    "train": Command(usage="RUN.yaml [key=value ...]", act=_train, settings=_run_config,
                     summary="train a run, alone or under `deepspeed --module iwm_fast.train` or torchrun"),
    "check": Command(usage="RUN.yaml [key=value ...] [ranks=N] [gpu=NAME | images_per_s=R]", act=_check,
                     settings=_check_config,
                     summary="tell what a run will take and whether it can start: data, steps, memory, hours"),
    "warmup": Command(usage="RUN.yaml runtime.ops=fused [key=value ...]", act=_warmup, settings=_run_config,
                      summary="compile the kernels a run needs, once per machine, before its ranks start"),
    "show": Command(usage="RUN.yaml [key=value ...]", act=_show, settings=_run_config,
                    summary="draw what the model will see: views, masks and actions of a few samples"),
    **{f"evaluate {name}": Command(usage="run=DIR [key=value ...]", act=_evaluate(name),
                                   settings=partial(getattr, task, "settings"), summary=task.summary)
       for name, task in TASKS.items() if name != "plan"},
    "export": Command(usage="run=DIR to=DIR", act=_export, settings=_export_config,
                      summary="write encoder, world model and a model card as a folder for others"),
    "imagine": Command(usage="run=DIR [key=value ...]", act=_imagine, settings=_imagine_config,
                       summary="draw source, asked-for change and what the prediction retrieves"),
    "plan": Command(usage="run=DIR [source=IMAGE target=IMAGE] [key=value ...]", act=_plan,
                    settings=lambda: TASKS["plan"].settings, summary=TASKS["plan"].summary),
    "report": Command(usage="run=DIR | lab=DIR", act=_report, settings=_report_config,
                      summary="write one HTML page of a run or a lab: curves, tables, pictures, settings"),
    "lab": Command(usage="LAB.yaml", act=_lab,
                   summary="make a grid of small runs, measure them and judge the claims they are for; goes on"),
    "replay": Command(usage="run=DIR step=S [key=value ...]", act=_replay, settings=_replay_config,
                      summary="render the views of a logged step again, as training saw them"),
    "shards demo": Command(usage="FOLDER", act=_shards_demo,
                           summary="write the demo's shards from photographs bundled with its dependencies"),
    "shards pack": Command(usage="IMAGE_FOLDER FOLDER [key=value ...]", act=_shards_pack, settings=_pack_config,
                           summary="write shards from an image folder, with or without one subfolder per class"),
    "shards check": Command(usage="SHARDS", act=_shards_check,
                            summary="decode every sample once, report, and leave out what cannot be read"),
    "demo": Command(usage="[key=value ...]", act=_demo,
                    summary="photographs to a trained, measured world model; what `make demo` runs"),
}  # fmt: skip


def _exactly(arguments: list[str], *names: str) -> list[str]:
    if len(arguments) != len(names):
        raise ValueError(f"expected {len(names)} arguments ({'; '.join(names)}), got {arguments}")
    return arguments


def main(arguments: Sequence[str] | None = None) -> None:
    """Carry out the command in the arguments; without arguments given, in those of this process, which then ends."""
    if arguments is not None:
        _carry_out(list(arguments))
        return
    if sys.argv[1:2] == ["train"]:
        # before anything that takes time is imported
        OF_PROCESS.listen(has_launcher="RANK" in os.environ)
    if sys.argv[1:2] == ["evaluate"]:
        listen_if_training(sys.argv[2:])
    be_the_process(lambda: _carry_out(sys.argv[1:]))


def _carry_out(given: list[str]) -> None:
    with errors_as_messages():
        for length in (2, 1):
            name = " ".join(given[:length])
            if name in COMMANDS:
                rest = given[length:]
                return _help(name) if {"-h", "--help"} & set(rest) else COMMANDS[name].act(rest)
        if given and given[0] not in ("-h", "--help") and not _is_group(given):
            raise ValueError(f"unknown command {' '.join(given[:2])!r}; known are {', '.join(COMMANDS)}")
    _overview(given)


def _is_group(given: list[str]) -> bool:
    asks = len(given) == 1 or given[1] in ("-h", "--help")
    return asks and any(name.startswith(given[0] + " ") for name in COMMANDS)


def _overview(given: list[str]) -> None:
    prefix = given[0] + " " if given and _is_group(given) else ""
    print("iwm: train Image World Models and use them\n")
    for name, command in COMMANDS.items():
        if name.startswith(prefix):
            print(f"  iwm {name} {command.usage}\n      {command.summary}")
    print("\n`iwm COMMAND --help` explains the settings. IWM_TRACEBACK=1 shows where an error comes from.")


def _help(name: str) -> None:
    command = COMMANDS[name]
    print(f"iwm {name} {command.usage}\n\n{command.summary}")
    if command.settings is None:
        return
    from iwm_fast.config.loading import settings_text

    print("\n" + settings_text(command.settings()))


if __name__ == "__main__":
    main()
