"""Turn the committed results into tables: `python -m benchmarks.report` writes benchmarks/README.md."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.features import report as features_report
from benchmarks.harness import records, results
from benchmarks.harness.goals import NOT_YET, goal_table
from benchmarks.harness.machine import machine_line, processor
from benchmarks.harness.records import Record
from benchmarks.kernels import compiler_report
from benchmarks.kernels import report as kernels_report
from benchmarks.pipelines import report as pipelines_report
from benchmarks.train_step import report as steps_report

README = Path(__file__).parent / "README.md"
ARCH = 90

_HEAD = """\
# Benchmarks

Written by `python -m benchmarks.report` from `results/*.jsonl`; do not edit.

```
python -m benchmarks.gpu_check           on a GPU: tests first, then every timing
python -m benchmarks.pipelines           the data line, on a GPU or a CPU; --quick: in a minute or two
python -m benchmarks.train_step          the step under every engine, on a GPU or a CPU; --quick: does it run?
python -m benchmarks.features            frozen features beside the encoder's forward, on a GPU or a CPU
python -m benchmarks.kernels             the fused operations; without a GPU the offline figures
python -m benchmarks.kernels --sweep   other settings of the attention tables
python -m benchmarks.kernels --only offline --arch 80 90 100 --write
python -m benchmarks.report              this file
```
"""


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
    parts = [_HEAD]
    for report, found in ((pipelines_report, pipelines), (steps_report, steps), (features_report, features)):
        parts += [f"# {report.TITLE}\n", report.NOTE, *_of_machines(report, found)]
    parts += [f"# {kernels_report.TITLE}\n", kernels_report.NOTE]
    on_gpu = [record for record in kernels if record.machine.get("gpu")]
    parts += ["## Times\n"] * (not on_gpu)
    parts += _of_machines(kernels_report, on_gpu, lambda about: about["gpu"], "a GPU")
    return "\n".join(parts + _offline([record for record in kernels if not record.machine.get("gpu")]))


def _of_machines(
    report: Any,
    found: Sequence[Record],
    name_of: Callable[[dict[str, Any]], str] = processor,
    where: str = "any machine",
) -> list[str]:
    """Return what the module `report` makes of the records of each machine."""
    if not found:
        return [f"On {where}: {NOT_YET}.\n", goal_table(report.GOALS, []) + "\n"]
    parts = []
    for name in dict.fromkeys(name_of(record.machine) for record in found):
        own = records.latest(record for record in found if name_of(record.machine) == name)
        runs = {str(record.machine.get("run")): record.machine for record in own}
        lines = [f"- {machine_line(about)}" for _, about in sorted(runs.items())]
        parts += [f"## {name}\n", *lines, "", report.sections(own) + "\n"]
    return parts


def _offline(found: list[Record]) -> list[str]:
    if not found:
        return ["## Without a GPU\n", f"Offline figures: {NOT_YET}.\n"]
    tables = compiler_report.sections(found, [ARCH], level="###", is_folded=True)
    about = machine_line(found[0].machine), compiler_report.NOTE.rstrip(), compiler_report.spill_line(found)
    return ["## Without a GPU\n", "\n\n".join((*about, tables)) + "\n"]


if __name__ == "__main__":
    main()
