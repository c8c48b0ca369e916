"""Render the committed results as tables: `python -m benchmarks.report` writes benchmarks/README.md.

The text between the tables is in `README.template.md`.
"""

from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from benchmarks.features import report as features_report
from benchmarks.harness import records, results, tables
from benchmarks.harness.goals import NOT_MEASURED, goal_table
from benchmarks.harness.machine import describe_in_words, processor_name
from benchmarks.harness.records import Record
from benchmarks.kernels import compiler_report
from benchmarks.kernels import report as kernels_report
from benchmarks.pipelines import report as pipelines_report
from benchmarks.train_step import report as train_step_report

README = Path(__file__).parent / "README.md"
TEMPLATE = README.with_suffix(".template.md")
ARCH = 90
"""Compute capability of the offline figures in the README: sm_90, an H100 or H200."""


def main() -> None:
    """Write the README."""
    README.write_text(committed_readme(), encoding="utf-8")
    print(f"written to {README}")


def committed_readme() -> str:
    """Return the README for the committed results."""
    suffixes = (results.KERNELS, results.PIPELINES, results.STEPS, results.FEATURES)
    return render(*map(results.read, suffixes), offline=results.read("offline-*"))


def render(
    kernels: Sequence[Record] = (),
    pipelines: Sequence[Record] = (),
    steps: Sequence[Record] = (),
    features: Sequence[Record] = (),
    offline: Sequence[Record] = (),
) -> str:
    """Return the README for records of fused operations, data pipeline, training step and frozen features."""
    on_gpu = [record for record in kernels if record.machine.get("gpu")]
    times = _machine_sections(kernels_report, on_gpu, where="a GPU")
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        pipelines=_machine_sections(pipelines_report, pipelines),
        steps=_machine_sections(train_step_report, steps),
        features=_machine_sections(features_report, features),
        kernels=times if on_gpu else f"## Times\n\n{times}",
        **_offline_sections(offline),
    )


def _machine_sections(report: Any, measured: Sequence[Record], where: str = "any machine") -> str:
    """Return the sections of the module `report` for the records of each machine."""
    if not measured:
        return f"On {where}: {NOT_MEASURED}.\n\n{goal_table(report.GOALS, [])}"
    sections = []
    for name in dict.fromkeys(processor_name(record.machine) for record in measured):
        latest = records.latest(record for record in measured if processor_name(record.machine) == name)
        runs = {str(record.machine.get("run")): record.machine for record in latest}
        lines = "\n".join(f"- {describe_in_words(machine)}" for _, machine in sorted(runs.items()))
        sections.append(f"## {name}\n\n{lines}\n\n{report.sections(latest)}")
    return "\n\n".join(sections)


def _offline_sections(offline: Sequence[Record]) -> dict[str, str]:
    """Return the template's sections about figures that need no GPU."""
    launches = compiler_report.launch_tables(offline, ARCH)
    machines = {record.machine.get("triton"): record.machine for record in offline}

    def collapsed(table: str) -> str:
        return f"<details><summary>{table.count(chr(10)) - 1} launches</summary>\n\n{table}\n\n</details>"

    return {
        "machine": "\n".join(f"- {describe_in_words(each)}" for _, each in sorted(machines.items()))
        or f"Offline figures: {NOT_MEASURED}.",
        "spills": compiler_report.spill_summary(offline),
        "launches": tables.sections({heading: collapsed(text) for heading, text in launches.items()}, [], "###"),
        "tile_waste": compiler_report.waste_table(ARCH),
        "floors": compiler_report.floor_table(),
    }


if __name__ == "__main__":
    main()
