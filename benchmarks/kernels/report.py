"""Report of the fused operations: goals and tables."""

from collections.abc import Sequence
from typing import Any

from benchmarks.harness import tables
from benchmarks.harness.goals import Goal, Metric, goal_table
from benchmarks.harness.records import BACKWARD, BOTH, FORWARD, Record, Shape
from benchmarks.harness.session import ROUNDING_ERROR
from benchmarks.harness.tables import describe
from benchmarks.kernels.tile_sweep import SHIPPED, SWEEP


def sections(records: Sequence[Record], level: str = "###") -> str:
    """Return the non-empty tables under headings of this level, the goals first."""
    texts = {"Goals": goal_table(GOALS, records)}
    timed = [record for record in records if record.pass_]
    for what in dict.fromkeys(record.what for record in timed):
        table = sweep_table if what == SWEEP else timings
        texts[f"{what}, ms"] = table([record for record in timed if record.what == what])
    texts["Relative errors of the output and of the worst tensor, against float64"] = errors(records)
    return tables.sections(texts, [record for record in records if record.what != SWEEP], level)


def timings(timed: Sequence[Record]) -> str:
    """Return medians in ms with a row per shape and pass, and a column per provider.

    The percentage in brackets is the time that the minimum bytes take at the measured bandwidth, over the median.
    """
    names = list(dict.fromkeys(record.provider for record in timed))
    rows = []
    for group in _grouped(timed):
        first = next(iter(group.values()))
        cells = [_timing(group[name]) if name in group else "-" for name in names]
        rows.append([describe(first.shape), first.pass_, *cells])
    return tables.table(["shape", "pass", *names], rows)


def _grouped(records: Sequence[Record]) -> list[dict[str, Record]]:
    """Return groups of comparable records, each by provider."""
    groups: dict[Any, dict[str, Record]] = {}
    for record in records:
        groups.setdefault(record.group, {})[record.provider] = record
    return list(groups.values())


def _timing(record: Record) -> str:
    if record.failure is not None or record.median_ms is None:
        return "error"
    share = "" if record.share_of_floor is None else f" ({100 * record.share_of_floor:.0f} %)"
    return f"{record.median_ms:.3f}{share}"


def sweep_table(timed: Sequence[Record]) -> str:
    """Return the shipped launches' time beside the three fastest candidates."""
    rows = []
    for group in _grouped(timed):
        times_ms = {name: record.median_ms for name, record in group.items() if record.median_ms is not None}
        first, shipped = next(iter(group.values())), times_ms.pop(SHIPPED, float("nan"))
        cells = [f"{ms:.3f}: {name}" for ms, name in sorted((ms, name) for name, ms in times_ms.items())[:3]]
        rows.append([describe(first.shape), first.pass_, f"{shipped:.3f}", *cells, *[""] * (3 - len(cells))])
    return tables.table(["shape", "pass", SHIPPED, "best", "second", "third"], rows)


def _error_groups(records: Sequence[Record]) -> list[dict[str, Record]]:
    """Return the records of relative errors against float64, with the keys "fused" and "plain"."""
    groups = _grouped([record for record in records if record.what.endswith(" error")])
    return [group for group in groups if {"fused", "plain"} <= group.keys()]


def errors(records: Sequence[Record]) -> str:
    """Return a table of the relative errors against float64 of the fused operation and of the plain one."""
    rows = []
    for group in _error_groups(records):
        first = group["fused"]
        fused, plain = first.figures, group["plain"].figures
        worst = max(fused, key=lambda name: fused[name] / max(plain[name], 1e-12))
        verdict = "wrong" if first.failure else ""
        for name in dict.fromkeys([next(iter(fused)), worst]):
            cells = first.what.removesuffix(" error"), f"{describe(first.shape)} {first.dtype}", name
            rows.append([*cells, f"{fused[name]:.1e}", f"{plain[name]:.1e}", verdict])
    return tables.table(["operation", "shape", "tensor", "fused", "plain", ""], rows) if rows else ""


def worst_error(records: Sequence[Record]) -> float | None:
    """Return the largest ratio of a fused tensor's error to the plain one's, or to rounding if that is larger."""
    ratios = [
        value / max(group["plain"].figures[name], ROUNDING_ERROR[group["fused"].dtype])
        for group in _error_groups(records)
        for name, value in group["fused"].figures.items()
    ]
    return max(ratios, default=None)


def _metric(what: str, shape: Shape, pass_: str, peer: str) -> Metric:
    """Return the ratio of a peer's median to that of the fused operation; without a peer, the share of the floor."""

    def metric(records: Sequence[Record]) -> float | None:
        # The selected entries identify one shape, and records.latest() leaves one run of it.
        selected = [each for each in records if (each.what, each.pass_) == (what, pass_)]
        group = {each.provider: each for each in selected if shape.items() <= each.shape.items()}
        if not {"fused", peer or "fused"} <= group.keys():
            return None
        return (
            (group[peer].median_ms or 0.0) / (group["fused"].median_ms or 1.0)
            if peer
            else group["fused"].share_of_floor
        )

    return metric


_TARGETS = (
    ("attention N=196 d=64: cuDNN / fused", "attention", {"N": 196, "d": 64, "B": 256}, "cuDNN",
     {FORWARD: (1.3, "35 %"), BACKWARD: (1.3, "50 %")}),
    ("attention N=196 d=32: cuDNN / fused", "attention", {"N": 196, "d": 32, "B": 256}, "cuDNN",
     {FORWARD: (1.3, "50 %"), BACKWARD: (1.3, "35 %")}),
    ("attention N=256 d=64: cuDNN / fused", "attention", {"N": 256, "d": 64, "B": 256}, "cuDNN",
     {FORWARD: (1.0, ""), BACKWARD: (1.2, "")}),
    ("attention N=256 d=32: cuDNN / fused", "attention", {"N": 256, "d": 32, "B": 256}, "cuDNN",
     {FORWARD: (1.0, ""), BACKWARD: (1.2, "")}),
    ("attention of contexts d=64: varlen_attn / fused", "packed attention", {"N": "contexts", "d": 64}, "varlen_attn",
     {FORWARD: (1.5, "55 %"), BACKWARD: (1.8, "45 %")}),
    ("attention N=196 d=64: share of copy bandwidth", "attention", {"N": 196, "d": 64, "B": 256}, "",
     {FORWARD: (0.71, "25 %"), BACKWARD: (0.59, "below 10 %")}),
    ("feature conditioning: eager / fused", "feature conditioning", {"B": 256}, "eager",
     {BOTH: (2.5, "bytes allow 2.5")}),
    ("residual norm D=384: share of copy bandwidth", "residual norm", {"D": 384}, "",
     {FORWARD: (0.7, "85 %"), BACKWARD: (0.6, "70 %")}),
)  # fmt: skip
"""Text; `what`, part of the shape and peer of the records; by pass, the lower bound and the odds of reaching it."""

GOALS = (
    *(Goal(text, target, _metric(what, shape, pass_, peer), pass_=pass_, expected=odds)
      for text, what, shape, peer, targets in _TARGETS for pass_, (target, odds) in targets.items()),
    Goal("largest error against float64: fused / plain", 2, worst_error, is_at_most=True),
)  # fmt: skip
