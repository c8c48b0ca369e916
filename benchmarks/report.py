"""Turn the committed results into tables: `python -m benchmarks.report` writes benchmarks/README.md."""

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.features import report as feature_tables
from benchmarks.harness import goals, records, results, tables
from benchmarks.harness.machine import machine_line, processor
from benchmarks.harness.records import Record
from benchmarks.kernels import compiler_report
from benchmarks.pipelines import report as pipeline_tables
from benchmarks.train_step import report as step_tables

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

_PIPELINES_NOTE = """\
Everything reads the same shards of photographs in one run, in turns, one at a time: a turn opens a stream, leaves out
what was made ahead and counts images for some seconds. Images/s are the median over turns; "turns" has their 20th and
80th percentile; p50 and p99 tell how long a batch was waited for. From "memory": the kernel holds the shards; from
"disk": it was made to forget them before each turn, what the disk itself keeps is out of reach. Two views are what a
training gets: 224 x 224, jitter on both, gray, blur and solarize on the source, normalised. The peer draws from the
same ranges, with a worker for each core, its images decoded and changed as tensors or by Pillow.
"decode to views" is the graph as a GPU runs it, on a CPU and fed from memory: as it is, each operation only for the
samples that want it, and with all operations for all samples, where some change nothing. Both give the same pixels,
bit for bit.
"""

_STEPS_NOTE = """\
Everyone trains the same networks on the same batch; all are built first and then step in turns, one at a time.
Images/s follow from the median over turns, "turns" has their 20th and 80th percentile; "by" is the median over rounds
of how much longer a step is than that of "over" in the same round. The bare loop is forward, backward, clip and step as
anyone writes them, on one rank, without a look at what is not finite. "Wait" is what a step waits for its batch:
nothing with a cached one. On two ranks "backward" and "optimizer" hold their exchange. MFU counts what the model needs,
a multiply-add as two.
"""

_FEATURES_NOTE = """\
An untrained encoder in float32 looks at each photograph once. "Forward alone" has its batches in memory; an extraction
begins with a closed loader and ends with a published file. They take turns over all images; "over forward" is the
median over rounds of how much longer an extraction takes than the forward of the same round.
"""

_KERNELS_NOTE = """\
Times are medians of the device's, by events, out of the cache, providers in turns; in brackets the share of the time
that the task's fewest bytes take at the copy bandwidth measured in the same run. A backward pass has its own forward
before it, untimed. "eager" is the plain reference, "compiled" the same through torch.compile in its default mode.
Peers take queries, keys and values as views of one tensor and their gradients are put into one again, as in a model.
"""

_OFFLINE_NOTE = """\
Real output of the compiler, nothing was run: registers per thread, bytes per thread that did not fit into them, shared
memory per program, matrix instructions (fast: wgmma) and how many programs fit on a multiprocessor.
"""

_WASTE_NOTE = """\
Queries times keys that dense sequences of N cost in tiles, over N squared: by the shipped tables, and in the square
tiles of FlashAttention 2 (128) and of FlashAttention 3's forward pass at these head sizes (192). A backward pass of two
kernels counts by their mean.
"""

_FLOOR_NOTE = """\
No kernel is faster than its bytes at 4.3 TB/s and its products at 790 TFLOP/s, what one H200 copies and multiplies;
calculated, not measured.
"""


def main() -> None:
    """Write the README."""
    README.write_text(committed_readme(), encoding="utf-8")
    print(f"written to {README}")


def committed_readme() -> str:
    """Return the README of the committed results."""
    return render(
        results.committed_kernels(),
        results.committed(results.PIPELINES),
        results.committed(results.STEPS),
        results.committed(results.FEATURES),
    )


def render(
    found: Sequence[Record],
    pipelines: Sequence[Record] = (),
    steps: Sequence[Record] = (),
    features: Sequence[Record] = (),
) -> str:
    """Return the README for records of fused operations, of the data line, the training step and frozen features."""
    parts = [_HEAD, "# Data line\n", _PIPELINES_NOTE]
    parts += _of_machines(pipelines, pipeline_tables.sections, pipeline_tables.goal_rows)
    parts += ["# Training step\n", _STEPS_NOTE, *_of_machines(steps, step_tables.sections, step_tables.goal_rows)]
    if features:
        parts += ["# Frozen features\n", _FEATURES_NOTE]
        parts += _of_machines(features, feature_tables.sections, lambda _: [])
    parts += ["# Fused operations\n", _KERNELS_NOTE]
    gpus = list(dict.fromkeys(record.machine["gpu"] for record in found if record.machine.get("gpu")))
    for gpu in gpus:
        parts += _of_gpu(gpu, records.latest(record for record in found if record.machine.get("gpu") == gpu))
    if not gpus:
        headings = ["goal", "pass", "wanted", "measured", "met"]
        parts += ["## Times\n", f"On a GPU: {goals.NOT_YET}.\n", tables.table(headings, goals.rows([])) + "\n"]
    parts += _offline([record for record in found if not record.machine.get("gpu")])
    return "\n".join(parts)


def _of_machines(
    found: Sequence[Record],
    sections: Callable[[Sequence[Record]], str],
    goal_rows: Callable[[Sequence[Record]], list[list[str]]],
) -> list[str]:
    if not found:
        return [
            f"On any machine: {goals.NOT_YET}.\n",
            tables.table(goals.HEADINGS, goal_rows([])) + "\n",
        ]
    parts = []
    for name in dict.fromkeys(processor(record.machine) for record in found):
        own = records.latest(record for record in found if processor(record.machine) == name)
        parts += [f"## {name}\n", *_machine_lines(own), "", sections(own) + "\n"]
    return parts


def _machine_lines(found: Sequence[Record]) -> list[str]:
    runs = {str(record.machine.get("run")): record.machine for record in found}
    return [f"- {machine_line(about)}" for _, about in sorted(runs.items())]


def _of_gpu(gpu: str, found: list[Record]) -> list[str]:
    parts = [f"## {gpu}\n", *_machine_lines(found), ""]
    headings = ["goal", "pass", "wanted", "measured", "met"]
    parts += ["### Goals\n", tables.table(headings, goals.rows(found)) + "\n"]
    checks = [record for record in found if record.what.endswith(" error")]
    for what in dict.fromkeys(record.what for record in found if record.pass_):
        chosen = [record for record in found if record.what == what]
        parts += [f"### {what}, ms\n", tables.section(what, chosen) + "\n"]
    if checks:
        parts += ["### Relative errors to float64, of the output and of the worst\n", tables.errors(checks) + "\n"]
    raised = tables.failures(found)
    if raised:
        parts += ["### Raised\n", *(f"- {line}" for line in raised), ""]
    return parts


def _offline(found: list[Record]) -> list[str]:
    if not found:
        return ["## Without a GPU\n", f"Offline figures: {goals.NOT_YET}.\n"]
    parts = ["## Without a GPU\n", machine_line(found[0].machine) + "\n"]
    for module in compiler_report.MODULES:
        table = compiler_report.launch_table(found, ARCH, module)
        parts += [f"### {module} on sm_{ARCH}\n", _folded(table)]
    parts.insert(2, _OFFLINE_NOTE)
    parts.insert(3, spill_line(found) + "\n")
    parts += [f"### Scores computed per score needed, sm_{ARCH}\n", _WASTE_NOTE]
    parts += [compiler_report.waste_table(found, ARCH) + "\n", compiler_report.binaries_line(found, ARCH) + "\n"]
    parts += ["### Floors\n", _FLOOR_NOTE, compiler_report.floor_table(found) + "\n"]
    return parts


def _folded(table: str) -> str:
    return f"<details><summary>{table.count(chr(10)) - 1} launches</summary>\n\n{table}\n\n</details>\n"


def spill_line(found: Sequence[Record]) -> str:
    """Return per architecture how many launches there are and how many of them spill, in words."""
    parts = []
    launches = [record for record in found if record.what == "launch"]
    for arch in dict.fromkeys(record.shape["arch"] for record in launches):
        own = [record for record in launches if record.shape["arch"] == arch]
        spilled = sum(record.figures["spill_bytes"] > 0 for record in own)
        parts.append(f"sm_{arch}: {len(own)} launches, {spilled} spill")
    return "; ".join(parts) + "."


if __name__ == "__main__":
    main()
