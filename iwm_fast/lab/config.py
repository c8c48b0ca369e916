"""A lab's settings: which runs, what is measured on each, and which claims the numbers have to bear out.

`iwm lab --help` explains the keys of its YAML file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from iwm_fast.pipelines.config import check

_TOP = {"like", "folder", "base", "demo_data", "settings", "seeds", "workers", "cells", "evaluations", "claims"}
_CLAIM, _MAY = {"text", "paper", "compare"}, {"margin"}


@dataclass(frozen=True, kw_only=True)
class Number:
    """One figure of the lab, over its seeds."""

    cell: str
    result: str
    """Name of the evaluation's result: mrr_default, knn, finetune, ..."""
    subject: str
    metric: str

    def __str__(self) -> str:
        return f"{self.cell} {self.result} {self.subject} {self.metric}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the lab has to show: in every pair the first number is above the second."""

    name: str
    text: str
    paper: str
    compare: tuple[tuple[Number, Number], ...]
    margin: float = 0.0
    """By how much the first may be below the second all the same."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One task, measured on some cells."""

    task: str
    cells: tuple[str, ...]
    settings: tuple[str, ...]
    """As `key=value`."""


@dataclass(frozen=True, kw_only=True)
class LabConfig:
    """A grid of runs and what it is for."""

    folder: Path
    base: Path
    settings: tuple[str, ...]
    """As `key=value`."""
    has_demo_data: bool
    seeds: tuple[int, ...]
    workers: int | None
    cells: dict[str, tuple[str, ...]]
    """Name of each cell and its settings as `key=value`."""
    evaluations: tuple[Evaluation, ...]
    claims: tuple[Claim, ...]


def read_lab(path: Path, tasks: set[str]) -> LabConfig:
    """Read a lab's YAML file.

    Args:
        path: the file.
        tasks: names of the evaluations there are.

    Raises:
        FileNotFoundError: if there is no such file, or no base run.
        ValueError: for what is missing, unknown or of the wrong kind.
    """
    tree = _tree(path)
    for name in ("folder", "base", "cells"):
        check(name in tree, str(path), sorted(tree), f"name {name}")
    cells = {str(name): _settings(changes or {}, f"cells.{name}") for name, changes in tree["cells"].items()}
    seeds = tuple(tree.get("seeds", (0, 1, 2)))
    check(len(seeds) >= 1 and len(set(seeds)) == len(seeds), "seeds", seeds, "name at least one seed, each once")
    if not Path(tree["base"]).is_file():
        raise FileNotFoundError(f"base of {path}: no run file {tree['base']!r}")
    evaluations = tuple(_evaluation(row, cells, tasks) for row in tree.get("evaluations", []))
    claims = tuple(parse_claim(name, row) for name, row in (tree.get("claims") or {}).items())
    for claim in claims:
        unknown = sorted({number.cell for pair in claim.compare for number in pair} - cells.keys())
        check(not unknown, f"cells of claims.{claim.name}", unknown, f"be among {', '.join(cells)}")
    return LabConfig(
        folder=Path(tree["folder"]),
        base=Path(tree["base"]),
        settings=_settings(tree.get("settings", {}), "settings"),
        has_demo_data=bool(tree.get("demo_data", False)),
        seeds=seeds,
        workers=tree.get("workers"),
        cells=cells,
        evaluations=evaluations,
        claims=claims,
    )


def _tree(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no lab file {str(path)!r}; give the path of a YAML file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    check(isinstance(tree, dict), str(path), type(tree).__name__, "hold `key: value` lines")
    unknown = sorted(set(tree) - _TOP)
    check(not unknown, f"keys of {path}", unknown, f"be among {', '.join(sorted(_TOP))}")
    if "like" not in tree:
        return tree
    other = _tree(Path(tree["like"]))
    return other | tree | {"settings": other.get("settings", {}) | tree.get("settings", {})}


def _settings(changes: Any, where: str) -> tuple[str, ...]:
    check(isinstance(changes, dict), where, changes, "hold `group.key: value` lines")
    return tuple(f"{name}={_written(value)}" for name, value in changes.items())


def _written(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    )


def _evaluation(row: Any, cells: dict[str, Any], tasks: set[str]) -> Evaluation:
    check(isinstance(row, dict) and row.get("task") in tasks, "task of evaluations", row, f"be one of {sorted(tasks)}")
    chosen = tuple(row.get("cells", cells))
    unknown = [name for name in chosen if name not in cells]
    check(not unknown, f"cells of evaluation {row['task']}", unknown, f"be among {', '.join(cells)}")
    return Evaluation(task=row["task"], cells=chosen, settings=_settings(row.get("settings", {}), "settings"))


def parse_claim(name: str, row: Any) -> Claim:
    """Read a claim of a lab's YAML file.

    Raises:
        ValueError: for what is missing, unknown or of the wrong kind.
    """
    is_whole = isinstance(row, dict) and _CLAIM <= set(row) <= _CLAIM | _MAY
    check(is_whole, f"claims.{name}", row, f"have {', '.join(sorted(_CLAIM))}, and may have margin")
    margin = row.get("margin", 0.0)
    check(isinstance(margin, int | float) and margin >= 0, f"claims.{name}.margin", margin, "be at least 0")
    pairs = tuple(tuple(_number(text, name) for text in pair) for pair in row["compare"])
    check(all(len(pair) == 2 for pair in pairs), f"claims.{name}.compare", row["compare"], "hold pairs: better, worse")
    return Claim(name=name, text=row["text"], paper=row["paper"], compare=pairs, margin=float(margin))  # type: ignore[arg-type]


def _number(text: str, claim: str) -> Number:
    parts = str(text).split()
    check(len(parts) >= 4, f"claims.{claim}.compare", text, "be CELL RESULT SUBJECT METRIC")
    cell, result, *subject, metric = parts
    return Number(cell=cell, result=result, subject=" ".join(subject), metric=metric)
