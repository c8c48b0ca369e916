"""The report page of a lab: claims with verdicts and the paper's numbers, correlations with MRR, all numbers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iwm_fast.lab.claims import ClaimVerdict, Comparison, curve_points, num_tuned_of, values_by_seed
from iwm_fast.lab.config import Claim, Curves, LabConfig, ResultSelector
from iwm_fast.lab.correlations import MIN_RUNS, correlate
from iwm_fast.pipelines.storage.atomic import replace_file
from iwm_fast.rendering.charts import IntervalChart, IntervalPoint, draw_plot, draw_scatter_chart
from iwm_fast.rendering.forest_plot import ForestGroup, ForestRow, draw_forest_plot, save_forest_plot
from iwm_fast.rendering.html import card, collapsible, escape, metric_tiles, page, section, table
from iwm_fast.runtime.provenance import current_commit

FIGURE = "claims.png"
"""The figure of all claims in the folder of a lab."""

_NumTuned = dict[str, int]
"""Number of trained parameters by result."""


def write_lab_report(lab: LabConfig, judged: Sequence[ClaimVerdict], rows: Sequence[dict[str, Any]]) -> Path:
    """Write LAB/report.html and, if a claim was measured, LAB/claims.png, and return the path of the page."""
    path = lab.folder / "report.html"
    counts = {verdict: sum(claim.verdict == verdict for claim in judged) for verdict in ("holds", "undecided", "fails")}
    measured_cells = {(row["cell"], row["seed"]) for row in rows}
    num_tuned = {str(selector): num_tuned_of(selector, rows) for selector in lab.selectors}
    parts = [
        f"<h1>{escape(lab.folder.name)}</h1>",
        f'<p class="soft">commit {escape(current_commit())} · base {escape(lab.base)} · {len(lab.cells)} cells, seeds '
        f"{', '.join(map(str, lab.seeds))}</p>",
        metric_tiles({**{f"claims: {verdict}": str(count) for verdict, count in counts.items()},
               "runs measured": f"{len(measured_cells)} of {len(lab.cells) * len(lab.seeds)}"}),
        section("Claims", _rule(), *(_claim_card(outcome, num_tuned) for outcome in judged)),
        _curves_section(curve_charts(lab.curves, lambda selector: values_by_seed(selector, rows))),
        _correlation_section(rows),
        section("All numbers", _number_table(lab, rows)),
        section("Cells", table(["cell", "settings"], [(name, " ".join(own)) for name, own in lab.cells.items()]),
                collapsible("settings of all cells", "\n".join(lab.settings) + "\n\n" + lab.base.read_text("utf-8"))),
    ]  # fmt: skip
    html = page(f"iwm-fast: {lab.folder.name}", parts)
    replace_file(path, lambda draft: draft.write_text(html, encoding="utf-8"))
    save_lab_figure(lab.folder / FIGURE, judged)
    return path


def save_lab_figure(path: Path, judged: Sequence[ClaimVerdict]) -> None:
    """Write the forest plot of all measured claims as a PNG file; nothing if none was measured."""
    groups = [
        ForestGroup(
            title=outcome.claim.text,
            verdict=outcome.verdict,
            note=f"The paper: {outcome.claim.paper}",
            bound=-outcome.claim.margin,
            rows=_forest_rows(outcome),
        )
        for outcome in judged
        if outcome.verdict != "not measured"
    ]
    if groups:
        save_forest_plot(path, groups, unit="difference, mean over seeds and 95 % interval; dots are seeds")


def _rule() -> str:
    return (
        '<p class="soft">A comparison holds if the 95 % interval of its difference (Student, over seeds, paired) lies '
        "above zero. A claim holds if all of its comparisons hold, fails if the interval of one of them lies below "
        "zero, and is undecided otherwise. The rule is the same for every lab.</p>"
    )


def _claim_card(outcome: ClaimVerdict, num_tuned: _NumTuned) -> str:
    claim, verdict = outcome.claim, outcome.verdict
    numbers = [
        (format_means(pair, claim, num_tuned), format_difference(pair), len(pair.values[0]))
        for pair in outcome.comparisons
    ]
    return card(
        claim.text,
        f'<p class="small soft">{escape(claim.name)}</p>',
        f'<p class="small soft">The bound is {-claim.margin:g} instead of zero.</p>' if claim.margin else "",
        f'<p>This lab: <span class="verdict {verdict.replace(" ", "-")}">{verdict}</span>. '
        f'<span class="soft">The paper: {escape(claim.paper)}</span></p>',
        draw_forest_plot(rows, bound=-claim.margin, unit=_unit(outcome)) if (rows := _forest_rows(outcome)) else "",
        table(["means over seeds", "difference, 95 % interval", "seeds"], numbers),
    )


def format_means(comparison: Comparison, claim: Claim, num_tuned: _NumTuned) -> str:
    """Format the names and the means of both results of a comparison, for example "linear: large 0.23, small 0.25".

    Numbers of trained parameters follow if they differ.
    """
    shared, names = _labels(comparison, claim)
    selectors = (comparison.better, comparison.worse)
    counts = [num_tuned.get(str(selector), 0) for selector in selectors]
    sides = []
    for name, values, count in zip(names, comparison.values, counts, strict=True):
        mean = f"{sum(values) / len(values):.3f}" if values else "not measured"
        sides.append(f"{name} {mean}" + (f" ({count:,} tuned)" if count and len(set(counts)) > 1 else ""))
    return f"{shared}{', '.join(sides)}"


def format_difference(comparison: Comparison) -> str:
    """Format the mean difference of a comparison, its interval and, if that decides nothing, the seeds that would.

    Empty if no seed has both results.
    """
    interval = comparison.difference
    if interval is None:
        return ""
    ends = f"{interval.low:+.3f} to {interval.high:+.3f}" if math.isfinite(interval.low) else "one seed"
    if comparison.seeds_needed:
        ends += f"; {comparison.seeds_needed:,} seeds would decide"
    return f"{interval.mean:+.3f} ({ends})"


def _labels(comparison: Comparison, claim: Claim) -> tuple[str, tuple[str, str]]:
    """Return what both results of a comparison share, empty or with a colon, and what distinguishes each of them.

    Only those fields are named that distinguish the results of the claim.
    """
    selectors = {selector for pair in claim.compare for selector in pair}
    fields: list[str] = []
    for field in ("cell", "subject", "metric", "result"):
        is_unique = len({tuple(getattr(item, name) for name in fields) for item in selectors}) == len(selectors)
        if not is_unique and len({getattr(item, field) for item in selectors}) > 1:
            fields.append(field)
    better, worse = comparison.better, comparison.worse
    shared = [getattr(better, field) for field in fields if getattr(better, field) == getattr(worse, field)]
    own = [field for field in fields if getattr(better, field) != getattr(worse, field)]
    first, second = (", ".join(getattr(side, field) for field in own) for side in (better, worse))
    return f"{', '.join(shared)}: " if shared else "", (first, second)


def _unit(outcome: ClaimVerdict) -> str:
    """Return the label of the x axis: which metrics are compared, and of which result if there is only one."""
    selectors = [selector for pair in outcome.claim.compare for selector in pair]
    # Dictionaries instead of sets keep the order of the comparisons.
    metrics, results = ({getattr(item, field): None for item in selectors} for field in ("metric", "result"))
    return f"difference of {', '.join(metrics)}" + (f" ({selectors[0].result})" if len(results) == 1 else "")


def _forest_rows(outcome: ClaimVerdict) -> list[ForestRow]:
    """Return a row for each comparison that was measured."""
    rows = []
    for comparison in outcome.comparisons:
        if comparison.difference is None:
            continue
        shared, (better, worse) = _labels(comparison, outcome.claim)
        differences = [first - second for first, second in zip(*comparison.values, strict=True)]
        # A minus sign, which is wider than a hyphen.
        label = f"{shared}{better} \N{MINUS SIGN} {worse}"
        rows.append(ForestRow(label=label, differences=differences, **asdict(comparison.difference)))
    return rows


def curve_charts(curves: Sequence[Curves], values: Callable[[ResultSelector], dict[int, float]]) -> list[IntervalChart]:
    """Return a chart of all curves of which a point was measured; `values` returns a result's value for each seed."""
    charts = []
    for item in curves:
        series = {
            name: [IntervalPoint(x, interval.mean, interval.low, interval.high) for x, interval in points]
            for name, points in curve_points(item, values).items()
        }
        if series:
            charts.append(
                IntervalChart(
                    title=item.text, note="", x_label=item.x_label, y_label=item.y_label,
                    series=series,
                )
            )  # fmt: skip
    return charts


def _curves_section(charts: Sequence[IntervalChart]) -> str:
    cards = "".join(card(chart.title, draw_plot(chart)) for chart in charts)
    note = '<p class="soft">Means over seeds with Student\'s 95 % interval.</p>'
    return section("Curves", note, f'<div class="grid">{cards}</div>') if charts else ""


def _correlation_section(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table and a chart for each correlation with MRR; empty if there is none."""
    correlations = correlate(rows)
    if not correlations:
        return ""
    note = (
        f'<p class="soft">Pearson\'s coefficient over all runs that have both numbers, {MIN_RUNS} or more, and '
        "Fisher's 95 % interval. Runs of a cell differ in their seed only; the interval takes them as independent, so "
        "it is too narrow if cells differ more than seeds.</p>"
    )
    cells = [
        (item.mrr, item, f"{item.coefficient:+.2f}", f"{item.low:+.2f} to {item.high:+.2f}", item.num_runs,
         item.num_cells, "" if item.paper is None else f"{item.paper:+.2f}")
        for item in correlations
    ]  # fmt: skip
    columns = ["MRR of jitter", "with", "correlation", "95 % interval", "runs", "cells", "the paper"]
    charts = (
        card(f"{item}: {item.coefficient:+.2f}", draw_scatter_chart(item.points, x_label=item.mrr, y_label=item.metric))
        for item in correlations
    )
    charts_grid = f'<div class="grid">{"".join(charts)}</div>'
    return section("Correlation of the world model's MRR with accuracy", note, table(columns, cells), charts_grid)


def _number_table(lab: LabConfig, rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of all results with their mean and range over seeds."""
    by_result: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        by_result.setdefault((row["result"], row["subject"], row["metric"], row["cell"]), []).append(row["value"])
    order = {name: number for number, name in enumerate(lab.cells)}
    body = []
    for *key, cell in sorted(by_result, key=lambda key: (*key[:3], order[key[3]])):
        values = by_result[(*key, cell)]
        numbers = sum(values) / len(values), min(values), max(values)
        body.append((*key, cell, *(f"{number:.4f}" for number in numbers)))
    return table(["result", "subject", "metric", "cell", "mean", "minimum", "maximum"], body)
