"""Write docs/configuration.md, docs/command_line.md and docs/transformations.md from the code."""

import dataclasses
from pathlib import Path
from typing import Any

from iwm_fast.cli import COMMANDS, RUN_CONFIG
from iwm_fast.config.loading import iter_settings
from iwm_fast.config.run import RunConfig
from iwm_fast.evaluate import import_object
from iwm_fast.pipelines.transforms.base import PixelOperation, Transformation
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.pipelines.transforms.operations.crop import Crop
from iwm_fast.pipelines.transforms.operations.flip import Flip

DOCS = Path(__file__).parent
GENERATED = "*Generated from the code by `python docs/generate.py`.*"


def configuration() -> str:
    """Return the page of a run's settings: one table for each group."""
    groups: dict[str, list[str]] = {}
    for name, type_name, default, explanation in iter_settings(RunConfig):
        group = name.partition(".")[0] if "." in name else "general"
        groups.setdefault(group, []).append(_row(name, type_name, default, explanation))
    introduction = (
        "A run is a YAML file of differences from these defaults, plus `key=value` arguments on the command line. The "
        "groups `data`, `views`, `mask`, `model`, `objective` and `optim`, and `seed`, decide what is trained and form "
        "the fingerprint of the run, except for `data.val`. `runtime` and `output` do not change the result, except "
        "for `runtime.micro_batch_size` with VICReg's terms (`model.predictor.depth=0`)."
    )
    tables = [f"## {group}\n\n{_table(rows)}" for group, rows in groups.items()]
    return "\n\n".join(["# Configuration", introduction, GENERATED, *tables]) + "\n"


def command_line() -> str:
    """Return the page of all commands with their settings."""
    parts = ["# Command line", "`iwm COMMAND --help` prints the same.", GENERATED]
    for name, command in COMMANDS.items():
        parts += [f"## iwm {name}", f"```\niwm {name} {command.usage}\n```", _sentence(command.summary)]
        if command.settings == RUN_CONFIG:
            parts.append("Settings: see [Configuration](configuration.md).")
        elif command.settings:
            parts.append(_table([_row(*setting) for setting in iter_settings(import_object(command.settings))]))
        if command.explanation:
            text = import_object(command.explanation)().replace(f"{DOCS.parent}/", "")
            parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def transformations() -> str:
    """Return the page of all transformations and their entries of the action."""
    # With the settings that add entries.
    views = ViewConfig(crop=Crop(source_scale=(0.3, 1.0)), flip=Flip(source_probability=0.5))
    groups = [getattr(views, item.name) for item in dataclasses.fields(views)]
    known = [group for group in groups if isinstance(group, Transformation)]
    introduction = (
        "Transformations are applied in this order; neighbouring colour maps are applied in one pass. Settings are in "
        "[Configuration](configuration.md); [Extending](extending.md) shows how to add one. The action that the "
        "predictor receives has the entries of those that are on. All entries are 0 where nothing changes. "
        "`model.action(brightness=0.4)` takes natural units, which the vector divides by the scale."
    )
    head = "| transformation | applied to | default | retrieval and planning |\n| --- | --- | --- | --- |"
    rows = [
        f"| `views.{item.name}` | {_place(item)} | {'on' if item.is_on else 'off'} | {_role(item)} |" for item in known
    ]
    entries = [(entry, item) for item in known for entry in item.entries]
    entry_head = (
        "| entry | of | asked for as | scale | a value of 1 in the vector means |\n| --- | --- | --- | --- | --- |"
    )
    entry_rows = [
        f"| `{entry.name}` | `views.{item.name}` | {', '.join(item.describe({entry.name: entry.scale}))} | "
        f"{entry.scale:.3g} | {entry.one_means} |"
        for entry, item in entries
    ]
    tables = ["\n".join([head, *rows]), "## Entries of the action", "With the default strengths, "
              "`views.crop.source_scale=[0.3,1.0]` and `views.flip.source_probability=0.5`:",
              "\n".join([entry_head, *entry_rows])]  # fmt: skip
    return "\n\n".join(["# Transformations", introduction, GENERATED, *tables]) + "\n"


def _place(transformation: Transformation) -> str:
    if not isinstance(transformation, PixelOperation):
        return "both views alike; the source's own is part of the action"
    return "source" if transformation.is_source_only else "each view on its own"


def _role(transformation: Transformation) -> str:
    if not isinstance(transformation, PixelOperation):
        return "not evaluated"
    return {
        "forward": "a changed image is predicted from the clean one",
        "inverse": "another version of an image is predicted from the destroyed one",
    }[transformation.family]


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."


def _table(rows: list[str]) -> str:
    return "\n".join(["| setting | type | default | meaning |", "| --- | --- | --- | --- |", *rows])


def _row(name: str, type_name: str, default: Any, explanation: str) -> str:
    cells = (f"`{name}`", f"`{type_name}`", f"`{default!r}`", " ".join(explanation.split()))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


PAGES = {"configuration.md": configuration, "command_line.md": command_line, "transformations.md": transformations}


def main() -> None:
    """Write the pages."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
