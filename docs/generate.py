"""Write docs/configuration.md and docs/command_line.md from the dataclasses of the settings."""

from pathlib import Path
from typing import Any

from iwm_fast.cli import COMMANDS, RUN_CONFIG
from iwm_fast.config.loading import iter_settings
from iwm_fast.config.run import RunConfig
from iwm_fast.evaluate import import_object

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
        "the fingerprint of the run. `runtime` and `output` do not change the result."
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
    return "\n\n".join(parts) + "\n"


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."


def _table(rows: list[str]) -> str:
    return "\n".join(["| setting | type | default | meaning |", "| --- | --- | --- | --- |", *rows])


def _row(name: str, type_name: str, default: Any, explanation: str) -> str:
    cells = (f"`{name}`", f"`{type_name}`", f"`{default!r}`", " ".join(explanation.split()))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


PAGES = {"configuration.md": configuration, "command_line.md": command_line}


def main() -> None:
    """Write the pages."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
