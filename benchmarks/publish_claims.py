"""Publish the results of a lab: `python -m benchmarks.publish_claims iwm_fast/configs/lab_cpu.yaml`.

    docs/lab_cpu.json    the numbers that the claims compare, by seed, with command, machine and commit
    docs/lab_cpu.png     the lab's figure
    README.md            the table of claims, between the markers of this lab

Without an argument, only the tables are rendered again from docs/.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iwm_fast.evaluate import EVALUATIONS
from iwm_fast.lab.claims import ClaimVerdict, judge, num_tuned_of, values_by_seed
from iwm_fast.lab.config import LabConfig, parse_claim, read_lab
from iwm_fast.lab.report import format_difference, format_means

PROJECT = Path(__file__).parent.parent
README = PROJECT / "README.md"
DOCS = PROJECT / "docs"
FIGURE = "claims.png"
_VERDICTS = {"holds": "**holds**", "fails": "**fails**"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Publish the lab of the command line, if any, and update the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", type=Path, nargs="?", help="YAML file of a completed lab")
    path = parser.parse_args(arguments).lab
    if path is not None:
        lab = read_lab(path, set(EVALUATIONS))
        tree = {"command": f"iwm lab {path}", **collect_values(lab)}
        (DOCS / f"{path.stem}.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        shutil.copyfile(lab.folder / FIGURE, DOCS / f"{path.stem}.png")
    README.write_text(update_sections(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written to {README}")


def update_sections(text: str) -> str:
    """Return the README with the tables of all labs in docs/."""
    for path in sorted(DOCS.glob("lab_*.json")):
        text = update_section(text, path.stem, json.loads(path.read_text(encoding="utf-8")))
    return text


def collect_values(lab: LabConfig) -> dict[str, Any]:
    """Return the claims of a lab, as they are written in its YAML file, and the numbers that they compare.

    Raises:
        FileNotFoundError: if the lab has not run.
    """
    results = json.loads((lab.folder / "lab.json").read_text(encoding="utf-8"))
    numbers = {str(number): number for claim in lab.claims for pair in claim.compare for number in pair}
    rows = results["rows"]
    # JSON turns keys into strings; so do these lines, so that a tree equals the one that is read back.
    values = {
        name: {str(seed): value for seed, value in values_by_seed(num, rows).items()} for name, num in numbers.items()
    }
    measured = {name: by_seed for name, by_seed in values.items() if by_seed}
    tuned = {name: num_tuned_of(numbers[name], rows) for name in measured}
    claims = {
        claim.name: {
            "text": claim.text,
            "paper": claim.paper,
            "margin": claim.margin,
            "compare": [[str(number) for number in pair] for pair in claim.compare],
        }
        for claim in lab.claims
    }
    provenance = {name: results[name] for name in ("machine", "commit")}
    return provenance | {"claims": claims, "tuned": tuned, "values": measured}


def judge_outcomes(tree: dict[str, Any]) -> list[ClaimVerdict]:
    """Judge the claims of a tree that `collect_values` returned."""
    claims = [parse_claim(name, row) for name, row in tree["claims"].items()]
    values = tree["values"]
    return [
        judge(claim, lambda number: {int(seed): value for seed, value in values.get(str(number), {}).items()})
        for claim in claims
    ]


def markers(lab: str) -> tuple[str, str]:
    """Return the lines of the README that enclose the table of a lab."""
    return f"<!-- {lab}: written by python -m benchmarks.publish_claims -->", f"<!-- end of {lab} -->"


def update_section(text: str, lab: str, tree: dict[str, Any]) -> str:
    """Return the README with the table of claims of a lab replaced.

    Raises:
        ValueError: if the README does not contain both markers exactly once.
    """
    begin, end = markers(lab)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"README must contain the lines {begin!r} and {end!r} exactly once")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{render_section(tree)}{end}{rest.split(end)[1]}"


def render_section(tree: dict[str, Any]) -> str:
    """Return the table of claims, followed by command, seeds, machine and commit."""
    lines = [
        "| claim | here, mean over seeds | difference, 95 % interval | the paper | |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [_line(outcome, tree["tuned"]) for outcome in judge_outcomes(tree)]
    seeds = {seed for values in tree["values"].values() for seed in values}
    provenance = f"{', '.join(tree['machine'])}; commit {', '.join(tree['commit'])}"
    run = f"`{tree['command']}`, seeds {', '.join(sorted(seeds))}"
    return "\n".join([*lines, "", f"{run}; {provenance}. Student's interval, seeds paired.", ""])


def _line(outcome: ClaimVerdict, tuned: dict[str, int]) -> str:
    claim = outcome.claim
    cells = (
        claim.text,
        "; ".join(format_means(comparison, claim, tuned) for comparison in outcome.comparisons),
        "; ".join(format_difference(comparison) for comparison in outcome.comparisons),
        claim.paper,
        _VERDICTS.get(outcome.verdict, outcome.verdict),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
