"""The `iwm` command. Subcommands import their modules only when they are called, so that `--help` is fast."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import iwm_fast
from iwm_fast.evaluate import (
    EVALUATIONS,
    evaluate,
    import_object,
    read_settings,
    refuse_checkpoint_folder,
    watch_signals_if_training,
)
from iwm_fast.pipelines.errors import printable
from iwm_fast.runtime.error_reporting import user_facing_errors
from iwm_fast.runtime.extras import DEMO_PACKAGES, require_packages
from iwm_fast.runtime.preemption import EXIT_PREEMPTED
from iwm_fast.runtime.process import log_to_console, run_and_exit, watch_signals, without_local_rank

RUN_CONFIG = "iwm_fast.config.run:RunConfig"


@dataclass(frozen=True)
class Command:
    """A subcommand. Functions and settings are given as "module:name", so that they are imported only when needed."""

    usage: str
    """Arguments, for `--help`."""
    summary: str
    """Description, for `--help`."""
    target: str | Callable[..., Any]
    """An address "module:name" is called with the settings, and its result is printed; a function is called with the
    list of arguments."""
    settings: str = ""
    """Dataclass of the settings, which `--help` explains."""
    explanation: str = ""
    """Function that returns a longer text for `--help`."""


def _read(settings: str, arguments: list[str]) -> Any:
    """Return the settings of a run from its YAML file and overrides, all other settings from overrides alone."""
    if settings != RUN_CONFIG:
        return read_settings(import_object(settings), arguments)
    if not arguments:
        raise ValueError("no run named; give its YAML file or a name that `iwm configs` lists, then key=value settings")
    return import_object("iwm_fast.config.loading:load_config")(arguments[0], arguments[1:])


def _build(command: str, arguments: list[str]) -> Any:
    """Return the settings of a command that reads no run, from `key=value` arguments."""
    return import_object("iwm_fast.config.loading:build")(import_object(COMMANDS[command].settings), {}, arguments)


def _check(arguments: list[str]) -> None:
    check_class = import_object(COMMANDS["check"].settings)
    names = {setting.name for setting in fields(check_class)}
    run_arguments = [argument for argument in arguments if argument.partition("=")[0] not in names]
    check_arguments = [argument for argument in arguments if argument not in run_arguments]
    config = _read(RUN_CONFIG, run_arguments)
    check_config = _build("check", check_arguments)
    if not import_object("iwm_fast.commands.check_run:check_run")(config, check_config):
        raise SystemExit(1)


def _doctor(arguments: list[str]) -> None:
    import_object("iwm_fast.commands.doctor:doctor")(arguments)


def _plan(arguments: list[str]) -> None:
    config = read_settings(EVALUATIONS["plan"].settings, arguments)
    # Without images of the user, planning is an evaluation like the others.
    if not config.source:
        return evaluate(["plan", *arguments])
    print(import_object("iwm_fast.evals.planning.evaluate:plan_images")(config))


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
    config = _build("report", arguments)
    if config.lab:
        print(import_object("iwm_fast.lab.runner:report_lab")(Path(config.lab)))
    else:
        refuse_checkpoint_folder(config.run)
        print(import_object("iwm_fast.commands.report_run:write_run_report")(Path(config.run)))


def _shards_demo(arguments: list[str]) -> None:
    (folder,) = _exactly(arguments, "a folder to write to")
    print(import_object("iwm_fast.pipelines.demo_data:write_demo_shards")(Path(folder)))


def _shards_pack(arguments: list[str]) -> None:
    source, folder = _exactly(arguments[:2], "an image folder", "a folder to write to")
    config = _build("shards pack", arguments[2:])
    packed_sets = import_object("iwm_fast.pipelines.storage.shard_writer:pack_folder")(
        Path(source), Path(folder), config
    )
    print(*(printable(str(path)) for packed in packed_sets for path in packed.shards), sep="\n")
    print(*packed_sets, sep="; ")


def _shards_check(arguments: list[str]) -> None:
    (spec,) = _exactly(arguments[:1], "the shards: a path, pattern, folder or address")
    config = _build("shards check", arguments[1:])
    import_object("iwm_fast.commands.check_shards:check_shards")(spec, config)


def _shards_resize(arguments: list[str]) -> None:
    spec, folder = _exactly(arguments[:2], "the shards: a path, pattern, folder or address", "a folder to write to")
    config = _build("shards resize", arguments[2:])
    import_object("iwm_fast.commands.resize_shards:resize")(spec, Path(folder), config)


def _configs(arguments: list[str]) -> None:
    _exactly(arguments)
    print(import_object("iwm_fast.commands.init_config:list_configs")())


def _init(arguments: list[str]) -> None:
    name, path = _exactly(arguments[:2], "a name that `iwm configs` lists", "the YAML file to write")
    print(import_object("iwm_fast.commands.init_config:write_starter")(name, Path(path), arguments[2:]))


def _demo(arguments: list[str]) -> None:
    require_packages(DEMO_PACKAGES)
    import_object("iwm_fast.commands.demo:demo")(arguments)


def _exactly(arguments: list[str], *names: str) -> list[str]:
    if len(arguments) != len(names):
        noun = "argument" if len(names) == 1 else "arguments"
        raise ValueError(f"expected {len(names)} {noun} ({'; '.join(names)}), got {arguments}")
    for argument, name in zip(arguments, names, strict=True):
        # Otherwise "to=shards" would be the name of a new folder.
        if argument.partition("=")[0].isidentifier() and "=" in argument:
            raise ValueError(f"expected {name}, got the setting {argument!r}; write ./{argument} if that is a path")
    return arguments


_EVALUATION_USAGE = "run=DIR [key=value ...]"
COMMANDS = {
    "train": Command(
        "RUN [key=value ...]",
        "train a run, alone or under `deepspeed --module iwm_fast.train` or torchrun",
        "iwm_fast.train:train", RUN_CONFIG),
    "check": Command(
        "RUN [key=value ...] [ranks=N] [gpu=NAME] [gpu_memory_gb=G] [images_per_s=R]",
        "check that a run can start and fits on its GPU, and estimate its memory and time",
        _check, "iwm_fast.config.commands:CheckConfig"),
    "warmup": Command(
        "RUN runtime.ops=fused [key=value ...]",
        "compile the kernels that a run needs, once per machine, before its ranks start",
        "iwm_fast.commands.compile_kernels:compile_kernels", RUN_CONFIG),
    "show": Command(
        "RUN [key=value ...]", "draw the views, masks and actions of a few samples, as the model sees them",
        "iwm_fast.commands.show_batch:show_batch", RUN_CONFIG),
    "doctor": Command(
        "[RUN] [data.train=SHARDS] [output.folder=DIR] [key=value ...]",
        "look at GPUs, packages, kernels, DALI, ranks and disk of a new machine or cluster, alone or under a launcher",
        _doctor),
    **{f"evaluate {name}": Command(_EVALUATION_USAGE, evaluation.summary, evaluate, evaluation.config)
       for name, evaluation in EVALUATIONS.items() if name not in ("plan", "decode")},
    "embed": Command(
        "run=DIR [data.val=SHARDS | images=FOLDER] to=FILE [key=value ...]",
        "write the features of images to a Parquet or NumPy file, one row per image",
        "iwm_fast.commands.embed:embed", "iwm_fast.config.commands:EmbedConfig"),
    "export": Command(
        "run=DIR to=DIR [key=value ...]",
        "write encoder, world model and a model card to a folder that others can load",
        "iwm_fast.checkpoints.export:export", "iwm_fast.config.commands:ExportConfig"),
    "decode": Command(_EVALUATION_USAGE, EVALUATIONS["decode"].summary, evaluate, EVALUATIONS["decode"].config),
    "imagine": Command(
        _EVALUATION_USAGE, "draw source images, requested changes and the images that predictions retrieve",
        "iwm_fast.evals.retrieval.visualize:imagine", "iwm_fast.config.evaluation:ImagineConfig"),
    "pca": Command(
        "run=DIR [images=FILE_OR_FOLDER] [key=value ...]",
        "draw patch features as colours, their first three principal components, beside an untrained encoder",
        "iwm_fast.evals.probing.pca:draw_pca", "iwm_fast.config.evaluation:PcaConfig"),
    "play": Command(
        "run=DIR [to=FILE.html] [key=value ...]",
        "serve a page with sliders that shows what the world model imagines, or write it to a file",
        "iwm_fast.evals.playing.play:play", "iwm_fast.config.evaluation:PlayConfig"),
    "plan": Command(
        "run=DIR [source=IMAGE target=IMAGE] [key=value ...]", EVALUATIONS["plan"].summary,
        _plan, EVALUATIONS["plan"].config),
    "report": Command(
        "run=DIR | lab=DIR", "write one HTML page about a run or a lab: curves, tables, pictures, settings",
        _report, "iwm_fast.config.commands:ReportConfig"),
    "lab": Command(
        "LAB.yaml", "train and evaluate a grid of small runs and judge the claims; resumes if stopped", _lab,
        explanation="iwm_fast.commands.help_texts:lab_help"),
    "replay": Command(
        "run=DIR step=S [key=value ...]", "render the views of a logged step again, exactly as in training",
        "iwm_fast.commands.replay_step:replay_step", "iwm_fast.config.commands:ReplayConfig"),
    "configs": Command("", "list the packaged configurations, whose names can be used instead of RUN.yaml", _configs),
    "init": Command(
        "NAME FILE.yaml [key=value ...]",
        "write a YAML file based on a packaged configuration, with the settings to change first",
        _init),
    "shards demo": Command(
        "FOLDER", "write the demo's shards from photographs bundled with its dependencies", _shards_demo),
    "shards pack": Command(
        "IMAGE_FOLDER FOLDER [key=value ...]",
        "write shards from an image folder, with or without one subfolder per class, or from its folders train and val",
        _shards_pack, "iwm_fast.pipelines.config:PackConfig"),
    "shards resize": Command(
        "SHARDS FOLDER [key=value ...]",
        "write shards again with smaller images, to read fewer bytes and decode faster; resumes if stopped",
        _shards_resize, "iwm_fast.pipelines.config:ResizeConfig"),
    "shards check": Command(
        "SHARDS [key=value ...]", "decode every sample once, report, and exclude unreadable samples from the index",
        _shards_check, "iwm_fast.config.commands:CheckShardsConfig"),
    "demo": Command(
        "[key=value ...]", "train and evaluate a world model on bundled photographs, as `make demo` does", _demo,
        explanation="iwm_fast.commands.help_texts:demo_help"),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command: with `arguments` within this process; with None, that of the command line, and exit."""
    words = without_local_rank(sys.argv[1:] if arguments is None else arguments)
    name = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), "")
    is_process = arguments is None
    action: Callable[[], None]
    if words == ["--version"]:
        action = partial(print, "iwm-fast", iwm_fast.__version__)
    elif not name:
        action = partial(_overview, words)
    elif {"-h", "--help"} & set(words):
        action = partial(_help, name)
    elif name == "train":
        # Signal handlers are installed before the slow imports, so that a signal during start-up is not lost.
        preemption = watch_signals() if is_process else None
        action = partial(import_object("iwm_fast.train:train"), words[1:], preemption)
    elif COMMANDS[name].target is evaluate:
        evaluate_arguments = words[1:] if words[0] == "evaluate" else words
        action = partial(evaluate, evaluate_arguments, watch_signals_if_training(words) if is_process else None)
    else:
        action = partial(_run, COMMANDS[name], words[len(name.split()) :])
    if is_process:
        run_and_exit(action)
    with user_facing_errors():
        action()


def _run(command: Command, arguments: list[str]) -> None:
    if callable(command.target):
        command.target(arguments)
        return
    # Settings are read first, so that mistakes in them are reported before the slow imports.
    config = _read(command.settings, arguments)
    result = import_object(command.target)(config)
    print(*result, sep="\n") if isinstance(result, tuple | list) else print(result)


def _is_group(words: list[str]) -> bool:
    """Return whether the words are the first one of several commands, such as `shards`, or ask for its help."""
    is_alone = len(words) == 1 or words[1] in ("-h", "--help")
    return is_alone and any(name.startswith(words[0] + " ") for name in COMMANDS)


def _overview(words: list[str]) -> None:
    if words and words[0] not in ("-h", "--help") and not _is_group(words):
        raise ValueError(f"unknown command {' '.join(words[:2])!r}; the commands are {', '.join(COMMANDS)}")
    prefix = words[0] + " " if words and _is_group(words) else ""
    print("iwm: train Image World Models and use them\n")
    for name, command in COMMANDS.items():
        if name.startswith(prefix):
            print(f"  iwm {name} {command.usage}\n      {command.summary}")
    print(
        "\n`iwm COMMAND --help` explains the settings of a command, `iwm --version` prints the version. "
        "IWM_TRACEBACK=1 prints the traceback of an error."
    )


def _help(name: str) -> None:
    command = COMMANDS[name]
    print(f"iwm {name} {command.usage}\n\n{command.summary}")
    if command.explanation:
        print("\n" + import_object(command.explanation)())
    if command.settings:
        print("\n" + import_object("iwm_fast.config.loading:format_settings")(import_object(command.settings)))


if __name__ == "__main__":
    main()
