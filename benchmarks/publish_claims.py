"""Bring a lab's outcome into the repository: `python -m benchmarks.publish_claims iwm_fast/configs/lab_cpu.yaml`.

    docs/lab_cpu.json    every number that a claim compares, by seed, with command, machine and commit
    docs/lab_cpu.png     the lab's figure
    README.md            the table of claims, between the marks of this lab

Without a lab the tables are written anew from what docs/ holds.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iwm_fast.evaluate import TASKS
from iwm_fast.lab.claims import Outcome, judge, tuned_for, values_of
from iwm_fast.lab.config import LabConfig, parse_claim, read_lab
from iwm_fast.lab.report import difference, means

PROJECT = Path(__file__).parent.parent
README = PROJECT / "README.md"
DOCS = PROJECT / "docs"
FIGURE = "claims.png"
_VERDICTS = {"holds": "**holds**", "fails": "**fails**"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", type=Path, nargs="?", help="YAML file of a lab that has run")
    path = parser.parse_args(arguments).lab
    if path is not None:
        lab = read_lab(path, set(TASKS))
        tree = {"command": f"iwm lab {path}", **numbers_of(lab)}
        (DOCS / f"{path.stem}.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        shutil.copyfile(lab.folder / FIGURE, DOCS / f"{path.stem}.png")
    README.write_text(with_sections(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written to {README}")


def with_sections(text: str) -> str:
    """Return a README with the tables of all labs that docs/ holds."""
    for path in sorted(DOCS.glob("lab_*.json")):
        text = with_section(text, path.stem, json.loads(path.read_text(encoding="utf-8")))
    return text


def numbers_of(lab: LabConfig) -> dict[str, Any]:
    """Return what is kept of a lab: its claims as they were written down, and the numbers that they compare.

    Raises:
        FileNotFoundError: if it has not run.
    """
    found = json.loads((lab.folder / "lab.json").read_text(encoding="utf-8"))
    numbers = {str(number): number for claim in lab.claims for pair in claim.compare for number in pair}
    rows = found["rows"]
    # keys as JSON has them
    values = {name: {str(seed): value for seed, value in values_of(one, rows).items()} for name, one in numbers.items()}
    measured = {name: by_seed for name, by_seed in values.items() if by_seed}
    tuned = {name: tuned_for(numbers[name], rows) for name in measured}
    claims = {
        claim.name: {
            "text": claim.text,
            "paper": claim.paper,
            "margin": claim.margin,
            "compare": [[str(number) for number in pair] for pair in claim.compare],
        }
        for claim in lab.claims
    }
    about = {name: found[name] for name in ("machine", "commit")}
    return about | {"claims": claims, "tuned": tuned, "values": measured}


def outcomes_of(tree: dict[str, Any]) -> list[Outcome]:
    """Judge the claims by the numbers that were kept."""
    claims = [parse_claim(name, row) for name, row in tree["claims"].items()]
    values = tree["values"]
    return [
        judge(claim, lambda number: {int(seed): value for seed, value in values.get(str(number), {}).items()})
        for claim in claims
    ]


def marks(lab: str) -> tuple[str, str]:
    """Return the lines of a README between which a lab's table stands."""
    return f"<!-- {lab}: written by python -m benchmarks.publish_claims -->", f"<!-- end of {lab} -->"


def with_section(text: str, lab: str, tree: dict[str, Any]) -> str:
    """Return a README with a lab's table of claims between its marks.

    Raises:
        ValueError: if the marks are not there.
    """
    begin, end = marks(lab)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"README must hold the lines {begin!r} and {end!r}, each once")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{section(tree)}{end}{rest.split(end)[1]}"


def section(tree: dict[str, Any]) -> str:
    """Return the table of claims and what made it."""
    lines = [
        "| claim | here, mean over seeds | difference, 95 % interval | the paper | |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [_line(outcome, tree["tuned"]) for outcome in outcomes_of(tree)]
    seeds = {seed for values in tree["values"].values() for seed in values}
    where = f"{', '.join(tree['machine'])}; commit {', '.join(tree['commit'])}"
    about = f"`{tree['command']}`, seeds {', '.join(sorted(seeds))}; {where}. Student's interval, seeds paired."
    return "\n".join([*lines, "", about, ""])


def _line(outcome: Outcome, tuned: dict[str, int]) -> str:
    claim = outcome.claim
    cells = (
        claim.text,
        "; ".join(means(one, claim, tuned) for one in outcome.comparisons),
        "; ".join(difference(one) for one in outcome.comparisons),
        claim.paper,
        _VERDICTS.get(outcome.verdict, outcome.verdict),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
