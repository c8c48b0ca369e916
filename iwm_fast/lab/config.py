"""The YAML file of a lab: the runs, the evaluations of each run, and the claims that the results are compared with.

`iwm lab --help` explains the keys of its YAML file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from iwm_fast.config.strict_yaml import read_yaml, resolve
from iwm_fast.config.values import convert
from iwm_fast.pipelines.config import require

LAB_KEYS = {
    "like",
    "folder",
    "base",
    "demo_data",
    "settings",
    "seeds",
    "workers",
    "cells",
    "evaluations",
    "claims",
    "curves",
}
_CURVES_KEYS = {"text", "x_label", "y_label", "x", "lines"}
_REQUIRED_CLAIM_KEYS, _OPTIONAL_CLAIM_KEYS = {"text", "paper", "compare"}, {"margin"}


@dataclass(frozen=True, kw_only=True)
class ResultSelector:
    """Selects one result of a cell; its values are those of all seeds."""

    cell: str
    result: str
    """Name of the evaluation's result: mrr_default, knn, finetune, ..."""
    subject: str
    metric: str

    def __str__(self) -> str:
        return f"{self.cell} {self.result} {self.subject} {self.metric}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim: in every pair of results, the first is larger than the second."""

    name: str
    text: str
    paper: str
    compare: tuple[tuple[ResultSelector, ResultSelector], ...]
    margin: float = 0.0
    """Amount by which the first result may be smaller than the second."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Results over a quantity such as steps or labels, to be drawn with intervals over seeds."""

    name: str
    text: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    """Values of the quantity, above 0."""
    lines: dict[str, tuple[ResultSelector, ...]]
    """One result for each value of the quantity, by the name of the line."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation that is run on some cells."""

    task: str
    cells: tuple[str, ...]
    settings: tuple[str, ...]
    """Overrides of the form `key=value`."""


@dataclass(frozen=True, kw_only=True)
class LabConfig:
    """A grid of runs with its evaluations and claims."""

    folder: Path
    base: Path
    settings: tuple[str, ...]
    """Overrides of the form `key=value` that all cells share."""
    has_demo_data: bool
    seeds: tuple[int, ...]
    workers: int | None
    cells: dict[str, tuple[str, ...]]
    """Overrides of the form `key=value` of each cell, by the cell's name."""
    evaluations: tuple[Evaluation, ...]
    claims: tuple[Claim, ...]
    curves: tuple[Curves, ...]

    @property
    def selectors(self) -> tuple[ResultSelector, ...]:
        """The results that claims and curves select."""
        compared = (selector for claim in self.claims for pair in claim.compare for selector in pair)
        drawn = (selector for curves in self.curves for line in curves.lines.values() for selector in line)
        return (*compared, *drawn)


def read_lab(path: Path, tasks: set[str]) -> LabConfig:
    """Read the YAML file of a lab; `tasks` are the names of all evaluations.

    Raises:
        FileNotFoundError: if the file or its base run file does not exist.
        ValueError: if a key is missing or unknown, or a value is invalid.
    """
    tree = _read_tree(path)
    for key in ("folder", "base", "cells"):
        require(key in tree, str(path), sorted(tree), f"have the key {key}")
    cells = {name: _to_overrides(settings, f"cells.{name}") for name, settings in _mapping(tree, "cells").items()}
    require(len(cells) >= 1, "cells", cells, "hold at least one cell")
    seeds = convert("seeds", tuple[int, ...], tree.get("seeds", [0, 1, 2]))
    require(len(seeds) >= 1 and len(set(seeds)) == len(seeds), "seeds", seeds, "list at least one seed and none twice")
    workers = convert("workers", int | None, tree.get("workers"))
    require(workers is None or workers >= 1, "workers", workers, "be at least 1 or unset")
    base = Path(convert("base", str, tree["base"]))
    if not base.is_file():
        raise FileNotFoundError(f"base of {path}: the run file {str(base)!r} does not exist")
    entries = tree.get("evaluations") or []
    require(isinstance(entries, list), "evaluations", entries, "hold a list")
    evaluations = tuple(_parse_evaluation(entry, cells, tasks) for entry in entries)
    claims = tuple(parse_claim(name, entry) for name, entry in _mapping(tree, "claims").items())
    curves = tuple(parse_curves(name, entry) for name, entry in _mapping(tree, "curves").items())
    lab = LabConfig(
        folder=Path(convert("folder", str, tree["folder"])),
        base=base,
        settings=_to_overrides(tree.get("settings"), "settings"),
        has_demo_data=convert("demo_data", bool, tree.get("demo_data", False)),
        seeds=seeds,
        workers=workers,
        cells=cells,
        evaluations=evaluations,
        claims=claims,
        curves=curves,
    )
    for selector in lab.selectors:
        require(selector.cell in cells, "cell of claims or curves", str(selector), f"be among {', '.join(cells)}")
    return lab


def _read_tree(path: Path, dependents: tuple[Path, ...] = ()) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"the lab file {str(path)!r} does not exist; name a YAML file")
    files = (*dependents, path.resolve())
    require(path.resolve() not in dependents, "like", " -> ".join(map(str, files)), "not lead back to the same file")
    tree = resolve(read_yaml(path)) or {}
    require(isinstance(tree, dict), str(path), tree, "hold `key: value` lines")
    unknown = sorted(set(tree) - LAB_KEYS)
    require(not unknown, f"keys of {path}", unknown, f"be among {', '.join(sorted(LAB_KEYS))}")
    if "like" not in tree:
        return tree
    parent = _read_tree(Path(convert("like", str, tree["like"])), files)
    return parent | tree | {"settings": _mapping(parent, "settings") | _mapping(tree, "settings")}


def _mapping(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the mapping of a key, which is empty if the key is missing or all its lines are commented out."""
    value = tree.get(key) or {}
    require(isinstance(value, dict), key, value, "hold `key: value` lines")
    return value


def _to_overrides(settings: Any, address: str) -> tuple[str, ...]:
    require(isinstance(settings, dict | None), address, settings, "hold `group.key: value` lines")
    return tuple(f"{name}={_to_yaml(value)}" for name, value in (settings or {}).items())


def _to_yaml(value: Any) -> str:
    if isinstance(value, str):
        return value
    # A scalar is followed by the mark "..." for the end of a document.
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _parse_evaluation(entry: Any, cells: dict[str, Any], tasks: set[str]) -> Evaluation:
    is_known = isinstance(entry, dict) and isinstance(entry.get("task"), str) and entry["task"] in tasks
    require(is_known, "task of evaluations", entry, f"be one of {sorted(tasks)}")
    selected = convert(f"cells of evaluation {entry['task']}", tuple[str, ...], entry.get("cells", [*cells]))
    unknown = [name for name in selected if name not in cells]
    require(not unknown, f"cells of evaluation {entry['task']}", unknown, f"be among {', '.join(cells)}")
    return Evaluation(task=entry["task"], cells=selected, settings=_to_overrides(entry.get("settings"), "settings"))


def parse_claim(name: str, entry: Any) -> Claim:
    """Parse a claim of a lab's YAML file.

    Raises:
        ValueError: if a key is missing or unknown, or a value is invalid.
    """
    keys = set(entry) if isinstance(entry, dict) else set()
    has_keys = _REQUIRED_CLAIM_KEYS <= keys <= _REQUIRED_CLAIM_KEYS | _OPTIONAL_CLAIM_KEYS
    require(has_keys, f"claims.{name}", entry, f"have {', '.join(sorted(_REQUIRED_CLAIM_KEYS))} and optionally margin")
    margin = convert(f"claims.{name}.margin", float, entry.get("margin", 0.0))
    require(margin >= 0, f"claims.{name}.margin", margin, "be at least 0")
    compare = entry["compare"]
    is_paired = isinstance(compare, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in compare)
    require(is_paired, f"claims.{name}.compare", compare, "hold pairs [better, worse]")
    pairs = tuple(tuple(parse_selector(text, f"claims.{name}.compare") for text in pair) for pair in compare)
    return Claim(name=name, text=str(entry["text"]), paper=str(entry["paper"]), compare=pairs, margin=margin)  # type: ignore[arg-type]


def parse_curves(name: str, entry: Any) -> Curves:
    """Parse curves of a lab's YAML file.

    Raises:
        ValueError: if a key is missing or unknown, or a value is invalid.
    """
    address = f"curves.{name}"
    is_complete = isinstance(entry, dict) and set(entry) == _CURVES_KEYS and isinstance(entry["lines"], dict)
    require(is_complete, address, entry, f"have {', '.join(sorted(_CURVES_KEYS))}, where lines holds lists of results")
    x = convert(f"{address}.x", tuple[float, ...], entry["x"])
    require(len(x) >= 1 and min(x, default=0) > 0, f"{address}.x", x, "list values above 0")
    lines = {
        line: tuple(parse_selector(text, f"{address}.lines") for text in convert(address, tuple[str, ...], texts))
        for line, texts in entry["lines"].items()
    }
    lengths = {line: len(selectors) for line, selectors in lines.items()}
    require(set(lengths.values()) == {len(x)}, f"{address}.lines", lengths, f"hold one result for each of {len(x)} x")
    texts = {key: str(entry[key]) for key in ("text", "x_label", "y_label")}
    return Curves(name=name, x=x, lines=lines, **texts)


def parse_selector(text: str, address: str) -> ResultSelector:
    """Parse the name of a result, CELL RESULT SUBJECT METRIC; `address` is its place in the file, for the error.

    Raises:
        ValueError: if a word is missing.
    """
    words = str(text).split()
    require(len(words) >= 4, address, text, "be of the form CELL RESULT SUBJECT METRIC")
    # Only subjects contain spaces, such as "mean alone".
    cell, result, *subject, metric = words
    return ResultSelector(cell=cell, result=result, subject=" ".join(subject), metric=metric)
