"""Turn the committed results into tables: `python -m benchmarks.report` writes benchmarks/README.md.

What stands between the tables is in `README.template.md`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import Any

from benchmarks.features import report as features_report
from benchmarks.harness import records, results, tables
from benchmarks.harness.goals import NOT_YET, goal_table
from benchmarks.harness.machine import machine_line, processor
from benchmarks.harness.records import Record
from benchmarks.kernels import compiler_report
from benchmarks.kernels import report as kernels_report
from benchmarks.pipelines import report as pipelines_report
from benchmarks.train_step import report as steps_report

README = Path(__file__).parent / "README.md"
TEMPLATE = README.with_suffix(".template.md")
ARCH = 90


def main() -> None:
    """Write the README."""
    README.write_text(committed_readme(), encoding="utf-8")
    print(f"written to {README}")


def committed_readme() -> str:
    """Return the README of the committed results."""
    of_lines = (results.committed(ending) for ending in (results.PIPELINES, results.STEPS, results.FEATURES))
    return render(results.committed_kernels(), *of_lines)


def render(
    kernels: Sequence[Record],
    pipelines: Sequence[Record] = (),
    steps: Sequence[Record] = (),
    features: Sequence[Record] = (),
) -> str:
    """Return the README for records of fused operations, of the data line, the training step and frozen features."""
    on_gpu = [record for record in kernels if record.machine.get("gpu")]
    times = _of_machines(kernels_report, on_gpu, lambda about: about["gpu"], "a GPU")
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        pipelines=_of_machines(pipelines_report, pipelines),
        steps=_of_machines(steps_report, steps),
        features=_of_machines(features_report, features),
        kernels=times if on_gpu else f"## Times\n\n{times}",
        **_offline([record for record in kernels if not record.machine.get("gpu")]),
    )


def _of_machines(
    report: Any,
    found: Sequence[Record],
    name_of: Callable[[dict[str, Any]], str] = processor,
    where: str = "any machine",
) -> str:
    """Return what the module `report` makes of the records of each machine."""
    if not found:
        return f"On {where}: {NOT_YET}.\n\n{goal_table(report.GOALS, [])}"
    parts = []
    for name in dict.fromkeys(name_of(record.machine) for record in found):
        own = records.latest(record for record in found if name_of(record.machine) == name)
        runs = {str(record.machine.get("run")): record.machine for record in own}
        lines = "\n".join(f"- {machine_line(about)}" for _, about in sorted(runs.items()))
        parts.append(f"## {name}\n\n{lines}\n\n{report.sections(own)}")
    return "\n\n".join(parts)


def _offline(found: list[Record]) -> dict[str, str]:
    """Return what the template says without a GPU."""
    launches = compiler_report.launch_tables(found, ARCH)
    return {
        "machine": machine_line(found[0].machine) if found else f"Offline figures: {NOT_YET}.",
        "spills": compiler_report.spill_line(found),
        "launches": tables.sections({heading: _folded(text) for heading, text in launches.items()}, [], "###"),
        "tile_waste": compiler_report.waste_table(found, ARCH),
        "binaries": compiler_report.binaries_line(found, ARCH),
        "floors": compiler_report.floor_table(found),
    }


def _folded(table: str) -> str:
    return f"<details><summary>{table.count(chr(10)) - 1} launches</summary>\n\n{table}\n\n</details>"


if __name__ == "__main__":
    main()
