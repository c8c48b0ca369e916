"""Publish results in the documentation: `python -m benchmarks.publish [LAB.yaml | DEMO_FOLDER]`.

    docs/lab_cpu.json    what the claims, curves and correlations of a lab need, by seed, with command, machine, commit
    docs/lab_cpu.png     the figure of that lab; its curves, if it has any, are in lab_cpu_curves.png
    docs/demo.json       the summary of the demo's run
    docs/demo.png        what that run imagines

README.md and docs/reproduction.md hold the tables, each between the markers of its JSON file. Without an argument, only
the tables are rendered again from docs/.

A lab may run seed by seed, in several folders or on several machines: with --add, published numbers stay unless this
folder has them, too.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from iwm_fast.evaluate import EVALUATIONS
from iwm_fast.lab.claims import ClaimVerdict, judge, num_tuned_of, values_by_seed
from iwm_fast.lab.config import LabConfig, ResultSelector, parse_claim, parse_selector, read_lab
from iwm_fast.lab.correlations import Correlation, correlate, is_correlated
from iwm_fast.lab.report import curve_charts, format_difference, format_means, save_lab_figure
from iwm_fast.rendering.charts import save_plots

PROJECT = Path(__file__).parent.parent
DOCS = PROJECT / "docs"
PAGES = (PROJECT / "README.md", DOCS / "reproduction.md")
_FIELDS = ("cell", "result", "subject", "metric")
_VERDICTS = {"holds": "**holds**", "fails": "**fails**"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Publish the lab or the demo of the command line, if any, and update the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", type=Path, nargs="?", help="YAML file of a completed lab, or folder of the demo's run"
    )
    parser.add_argument("--add", action="store_true", help="keep the published numbers of a lab that this folder lacks")
    options = parser.parse_args(arguments)
    path: Path | None = options.results
    if path is not None and path.is_dir():
        shutil.copyfile(path / "summary.json", DOCS / "demo.json")
        shutil.copyfile(path / "imagine.png", DOCS / "demo.png")
    elif path is not None:
        lab = read_lab(path, set(EVALUATIONS))
        tree = {"command": f"iwm lab {path}", **collect_values(lab)}
        published = DOCS / f"{path.stem}.json"
        if options.add:
            tree = add_values(tree, json.loads(published.read_text(encoding="utf-8")))
        published.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        save_lab_figure(DOCS / f"{path.stem}.png", judge_outcomes(tree))
        charts = curve_charts(lab.curves, partial(published_values, tree))
        if charts:
            title = "mean over seeds, 95 % interval (Student)"
            save_plots(DOCS / f"{path.stem}_curves.png", charts, title)
    for page in PAGES:
        page.write_text(update_sections(page.read_text(encoding="utf-8")), encoding="utf-8")


def update_sections(text: str) -> str:
    """Return a page with its tables rendered from the JSON files in docs/."""
    for path in sorted(DOCS.glob("*.json")):
        tree = json.loads(path.read_text(encoding="utf-8"))
        if markers(path.stem)[0] in text:
            render = render_demo if path.stem == "demo" else render_claims
            text = update_section(text, path.stem, render(tree))
        if markers(f"{path.stem}, correlations")[0] in text:
            text = update_section(text, f"{path.stem}, correlations", render_correlations(tree))
    return text


def render_demo(summary: dict[str, Any]) -> str:
    """Return the table of the demo's results, each beside its controls."""
    low, high = summary["mrr_interval"]
    jitter = "/".join(f"{value:g}" for value in summary["mrr_bank"]["jitter"].values())
    chance = f"chance {summary['mrr_chance']:.3f}, untrained predictor"
    rows = [
        (f"MRR in a bank of {summary['mrr_bank']['size']}, jitter {jitter} as trained",
         f"**{summary['mrr']:.3f}** (95 %: {low:.3f} to {high:.3f})", f"{chance} {summary['mrr_untrained']:.3f}"),
        *_difference_row(summary, "mrr_difference", chance),
        ("MRR, weaker jitter 0.4/0.4/0.2/0.1",
         f"**{summary['mrr_default_bank']:.3f}**", f"{chance} {summary['mrr_default_bank_untrained']:.3f}"),
        *_difference_row(summary, "mrr_default_bank_difference", chance),
        ("k-NN accuracy, 17 photographs, disjoint regions", f"**{summary['knn']:.3f}**",
         f"chance {summary['knn_chance']:.3f}, untrained encoder {summary['knn_untrained']:.3f}"),
        *_decoded_row(summary),
        ("training on 2 ranks, ZeRO-1, DALI on the CPU", f"{summary['images_per_s']:.0f} images/s", ""),
        ("share of that time spent waiting for data", f"{100 * summary['wait_share']:.1f} %", ""),
        ("minutes of training; of evaluation and pictures",
         f"{summary['training_s'] / 60:.1f}; {summary['evaluation_s'] / 60:.1f}", ""),
    ]  # fmt: skip
    lines = ["| seed 0 | world model | control |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
    provenance = f"{summary['machine']}, 2 cores, commit {summary['commit']}. The interval is over images."
    return "\n".join([*lines, "", provenance, ""])


def _difference_row(summary: dict[str, Any], key: str, chance: str) -> list[tuple[str, str, str]]:
    """Return the row of a difference readout, if the demo has measured it."""
    if key not in summary:
        return []
    return [("the same, difference readout", f"**{summary[key]:.3f}**", f"{chance} {summary[f'{key}_untrained']:.3f}")]


def _decoded_row(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the row of the pixel decoder, if the demo has trained one."""
    psnr_db = summary.get("psnr_db")
    if not psnr_db:
        return []
    values = f"{psnr_db['clean']:.1f} dB; {psnr_db['changed']:.1f} dB"
    return [("PSNR of images decoded from the teacher's tokens: clean; changed", values, "")]


def collect_values(lab: LabConfig) -> dict[str, Any]:
    """Return the claims of a lab, as its YAML file has them, and the numbers for claims, curves and correlations.

    Raises:
        FileNotFoundError: if the lab has not run.
    """
    results = json.loads((lab.folder / "lab.json").read_text(encoding="utf-8"))
    rows = results["rows"]
    correlated = [ResultSelector(**{key: row[key] for key in _FIELDS}) for row in rows if is_correlated(row)]
    numbers = {str(number): number for number in (*lab.selectors, *correlated)}
    # JSON turns keys into strings; so do these lines, so that a tree equals the one that is read back.
    values = {
        name: {str(seed): value for seed, value in values_by_seed(num, rows).items()} for name, num in numbers.items()
    }
    measured = {name: by_seed for name, by_seed in values.items() if by_seed}
    tuned = {name: num_tuned_of(numbers[name], rows) for name in measured}
    claims = {
        claim.name: {"text": claim.text, "paper": claim.paper, "margin": claim.margin,
                     "compare": [[str(number) for number in pair] for pair in claim.compare]}
        for claim in lab.claims
    }  # fmt: skip
    provenance = {name: results[name] for name in ("machine", "commit")}
    return provenance | {"claims": claims, "tuned": tuned, "values": measured}


def add_values(tree: dict[str, Any], published: dict[str, Any]) -> dict[str, Any]:
    """Return a tree of `collect_values` with the numbers of a published one that it lacks, and the origin of both.

    Raises:
        ValueError: if the published numbers were compared by other claims.
    """
    if tree["claims"] != published["claims"]:
        raise ValueError("the claims of the lab differ from the published ones; publish without --add")
    names = published["values"] | tree["values"]
    values = {name: published["values"].get(name, {}) | tree["values"].get(name, {}) for name in names}
    origin = {key: sorted({*published[key], *tree[key]}) for key in ("machine", "commit")}
    return tree | origin | {"tuned": published["tuned"] | tree["tuned"], "values": values}


def judge_outcomes(tree: dict[str, Any]) -> list[ClaimVerdict]:
    """Judge the claims of a tree that `collect_values` returned."""
    claims = [parse_claim(name, row) for name, row in tree["claims"].items()]
    return [judge(claim, partial(published_values, tree)) for claim in claims]


def published_values(tree: dict[str, Any], selector: ResultSelector) -> dict[int, float]:
    """Return the values of a result by seed, from a tree that `collect_values` returned."""
    return {int(seed): value for seed, value in tree["values"].get(str(selector), {}).items()}


def markers(name: str) -> tuple[str, str]:
    """Return the lines of a page that enclose the table of a JSON file."""
    return f"<!-- {name}: written by python -m benchmarks.publish -->", f"<!-- end of {name} -->"


def update_section(text: str, name: str, section: str) -> str:
    """Return the page with the table of a JSON file replaced.

    Raises:
        ValueError: if the page does not contain both markers exactly once.
    """
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page must contain the lines {begin!r} and {end!r} exactly once")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{section}{end}{rest.split(end)[1]}"


def render_claims(tree: dict[str, Any]) -> str:
    """Return the table of claims, followed by command, seeds, machine and commit."""
    lines = [
        "| claim | here, mean over seeds | difference, 95 % interval | the paper | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for outcome in judge_outcomes(tree):
        claim = outcome.claim
        text, paper, verdict = claim.text, claim.paper, _VERDICTS.get(outcome.verdict, outcome.verdict)
        for comparison in outcome.comparisons:
            row = text, format_means(comparison, claim, tree["tuned"]), format_difference(comparison), paper, verdict
            lines.append(f"| {' | '.join(row)} |")
            # Further comparisons of the claim follow below the first one.
            text = paper = verdict = ""
    seeds = {seed for values in tree["values"].values() for seed in values}
    provenance = f"{', '.join(tree['machine'])}; commit {', '.join(tree['commit'])}"
    run = f"`{tree['command']}`, seeds {', '.join(sorted(seeds))}"
    return "\n".join([*lines, "", f"{run}; {provenance}. Student's interval, seeds paired.", ""])


def render_correlations(tree: dict[str, Any]) -> str:
    """Return the table of the correlations of MRR with accuracy, a column for each bank."""
    selectors = [(parse_selector(name, "values"), by_seed) for name, by_seed in tree["values"].items()]
    rows = [
        {**asdict(selector), "seed": int(seed), "value": value}
        for selector, by_seed in selectors
        for seed, value in by_seed.items()
    ]
    found = correlate(rows)
    banks = sorted({item.mrr for item in found})
    header = ["", *(f"with {bank}" for bank in banks), "the paper", "runs"]
    lines = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    for name in sorted({str(item) for item in found}):
        items = {item.mrr: item for item in found if str(item) == name}
        numbers = [_format_correlation(items[bank]) if bank in items else "" for bank in banks]
        first = next(iter(items.values()))
        paper = "" if first.paper is None else f"{first.paper:+.2f}"
        lines.append(f"| {' | '.join((name, *numbers, paper, str(first.num_runs)))} |")
    return "\n".join([*lines, ""])


def _format_correlation(item: Correlation) -> str:
    # Adding zero turns -0.00 into +0.00.
    return f"{round(item.coefficient, 2) + 0:+.2f} ({item.low:+.2f} to {item.high:+.2f})"


if __name__ == "__main__":
    main()
