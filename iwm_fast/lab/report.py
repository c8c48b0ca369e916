"""The page of a lab: each claim with its verdict, its figure and the paper's, then every number."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iwm_fast.lab.claims import Comparison, Outcome, tuned_for
from iwm_fast.lab.config import Claim, LabConfig, Number
from iwm_fast.rendering.charts import DotPlot, Dots, dot_plot, save_dot_plots
from iwm_fast.rendering.html import card, escape, folded, page, section, table, tiles
from iwm_fast.runtime.provenance import commit

_Tuned = dict[str, int]
"""Parameters trained for a number, by its name."""


def write_lab_report(lab: LabConfig, outcomes: Sequence[Outcome], rows: Sequence[dict[str, Any]]) -> Path:
    """Write LAB/report.html and LAB/claims.png, of what is there, and return the page."""
    path = lab.folder / "report.html"
    count = {verdict: sum(one.verdict == verdict for one in outcomes) for verdict in ("holds", "undecided", "fails")}
    done = {(row["cell"], row["seed"]) for row in rows}
    numbers = (number for one in outcomes for pair in one.claim.compare for number in pair)
    tuned = {str(number): tuned_for(number, rows) for number in numbers}
    parts = [
        f"<h1>{escape(lab.folder.name)}</h1>",
        f'<p class="soft">commit {escape(commit())} · base {escape(lab.base)} · {len(lab.cells)} cells, seeds '
        f"{', '.join(map(str, lab.seeds))}</p>",
        tiles({**{f"claims: {name}": str(number) for name, number in count.items()},
               "runs measured": f"{len(done)} of {len(lab.cells) * len(lab.seeds)}"}),
        section("Claims", _rule(), *(_claim(one, tuned) for one in outcomes)),
        section("Every number", _numbers(lab, rows)),
        section("Cells", table(["cell", "changes"], [(name, " ".join(own)) for name, own in lab.cells.items()]),
                folded("what all of them share", "\n".join(lab.settings) + "\n\n" + lab.base.read_text("utf-8"))),
    ]  # fmt: skip
    path.write_text(page(f"iwm-fast: {lab.folder.name}", parts), encoding="utf-8")
    measured = [one for one in outcomes if one.verdict != "not measured"]
    if measured:
        save_dot_plots(lab.folder / "claims.png", [
            DotPlot(title=f"{one.claim.name}: {one.verdict}", note=f"the paper: {one.claim.paper}", unit=_unit(one),
                    rows=_dots(one, tuned))
            for one in measured
        ])  # fmt: skip
    return path


def _rule() -> str:
    return (
        '<p class="soft">A comparison holds if the 95 % interval (Student, over seeds, paired) of its difference lies '
        "above zero. A claim holds if all its comparisons do, fails if one lies below zero, and is undecided "
        "otherwise. The rule is the same for every lab.</p>"
    )


def _claim(outcome: Outcome, tuned: _Tuned) -> str:
    claim, verdict = outcome.claim, outcome.verdict
    rows = [(means(one, claim, tuned), difference(one), len(one.values[0])) for one in outcome.comparisons]
    is_measured = any(one.difference for one in outcome.comparisons)
    return card(
        claim.name,
        f"<p>{escape(claim.text)}</p>",
        f'<p class="small soft">Holds above {-claim.margin:g}: no worse than.</p>' if claim.margin else "",
        f'<p>This lab: <span class="verdict {verdict.replace(" ", "-")}">{verdict}</span>. '
        f'<span class="soft">The paper: {escape(claim.paper)}</span></p>',
        dot_plot(_dots(outcome, tuned), unit=_unit(outcome)) if is_measured else "",
        table(["compared, mean over seeds", "difference, 95 % interval", "seeds"], rows),
    )


def means(one: Comparison, claim: Claim, tuned: _Tuned) -> str:
    """Return the names and means of both sides of a comparison."""
    sides = []
    for number, values in zip((one.better, one.worse), one.values, strict=True):
        mean = f"{sum(values) / len(values):.3f}" if values else "not measured"
        sides.append(f"{_label(number, claim, tuned, ', ')} {mean}")
    return ", ".join(sides)


def difference(one: Comparison) -> str:
    """Return the mean difference of a comparison and its interval; nothing if no seed has both sides."""
    found = one.difference
    if found is None:
        return ""
    ends = f"{found.low:+.3f} to {found.high:+.3f}" if math.isfinite(found.low) else "one seed"
    return f"{found.mean:+.3f} ({ends})"


def _label(number: Number, claim: Claim, tuned: _Tuned, between: str) -> str:
    """Return what tells a number from the others of its claim, and how many parameters were trained for it, if any."""
    numbers = {number for pair in claim.compare for number in pair}
    own: list[str] = []
    for part in ("cell", "subject", "metric", "result"):
        is_told = len({tuple(getattr(one, part) for part in own) for one in numbers}) == len(numbers)
        if not is_told and len({getattr(one, part) for one in numbers}) > 1:
            own.append(part)
    name = ", ".join(getattr(number, part) for part in own)
    num_tuned = tuned.get(str(number), 0)
    return f"{name}{between}{num_tuned:,} tuned" if num_tuned else name


def _unit(outcome: Outcome) -> str:
    numbers = [number for pair in outcome.claim.compare for number in pair]
    metrics, results = ({getattr(one, part): None for one in numbers} for part in ("metric", "result"))
    return ", ".join(metrics) + (f" ({numbers[0].result})" if len(results) == 1 else "")


def _dots(outcome: Outcome, tuned: _Tuned) -> list[Dots]:
    """Return one line for each number of a claim, in the order in which they come."""
    found: dict[str, Sequence[float]] = {}
    for one in outcome.comparisons:
        for number, values in zip((one.better, one.worse), one.values, strict=True):
            found.setdefault(_label(number, outcome.claim, tuned, "\n"), values)
    return [Dots(label=name, values=values) for name, values in found.items()]


def _numbers(lab: LabConfig, rows: Sequence[dict[str, Any]]) -> str:
    """Show mean and range over seeds of whatever was measured."""
    found: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        found.setdefault((row["cell"], row["result"], row["subject"], row["metric"]), []).append(row["value"])
    order = {name: place for place, name in enumerate(lab.cells)}
    keys = sorted(found, key=lambda key: (key[1], key[2], key[3], order[key[0]]))
    body = []
    for key in keys:
        values = found[key]
        numbers = sum(values) / len(values), min(values), max(values)
        body.append((*key[1:], key[0], *(f"{number:.4f}" for number in numbers)))
    return table(["result", "subject", "measured", "cell", "mean", "least", "most"], body)
