"""Report of the fused operations: goals and tables."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.harness import tables
from benchmarks.harness.goals import Goal, goal_table
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


Value = Callable[[dict[str, Record]], float | None]


def _goal(text: str, target: float, select: tuple[str, Shape, str], value: Value, expected: str, **bound: bool) -> Goal:
    """Return a goal for a value of the records, by provider, selected by `what`, part of the shape, and pass."""
    what, shape, pass_ = select

    def metric(records: Sequence[Record]) -> float | None:
        # The selected entries identify one shape, and records.latest() leaves one run of it.
        by_provider = {
            record.provider: record
            for record in records
            if (record.what, record.pass_) == (what, pass_) and shape.items() <= record.shape.items()
        }
        return value(by_provider) if "fused" in by_provider else None

    return Goal(text, target, metric, pass_=pass_, expected=expected, **bound)


def _over_fused(peer: str) -> Value:
    """Return a function that divides the median of a peer by that of the fused operation."""
    return lambda group: (group[peer].median_ms or 0.0) / (group["fused"].median_ms or 1.0) if peer in group else None


def _share(group: dict[str, Record]) -> float | None:
    return group["fused"].share_of_floor


def _goals() -> Iterator[Goal]:
    for length, forward, backward in ((196, 1.3, 1.3), (256, 1.0, 1.2)):
        for head_dim in (64, 32):
            for pass_, target in ((FORWARD, forward), (BACKWARD, backward)):
                odds = "55-60 %" if pass_ == BACKWARD else "35 %" if head_dim == 64 else "50 %"
                select = "attention", {"N": length, "d": head_dim, "B": 256}, pass_
                text = f"attention N={length} d={head_dim}: cuDNN / fused"
                yield _goal(text, target, select, _over_fused("cuDNN"), odds if length == 196 else "")
    for pass_, target, odds in ((FORWARD, 1.5, "55 %"), (BACKWARD, 1.8, "45 %")):
        select = "packed attention", {"N": "contexts", "d": 64}, pass_
        yield _goal("attention of contexts d=64: varlen_attn / fused", target, select, _over_fused("varlen_attn"), odds)
    for pass_, target, odds in ((FORWARD, 0.71, "25 %"), (BACKWARD, 0.59, "below 10 %")):
        select = "attention", {"N": 196, "d": 64, "B": 256}, pass_
        yield _goal("attention N=196 d=64: share of copy bandwidth", target, select, _share, odds)
    select = "feature conditioning", {"B": 256}, BOTH
    yield _goal("feature conditioning: eager / fused", 2.5, select, _over_fused("eager"), "bytes allow 2.5")
    for pass_, target, odds in ((FORWARD, 0.7, "85 %"), (BACKWARD, 0.6, "70 %")):
        select = "residual norm", {"D": 384}, pass_
        yield _goal("residual norm D=384: share of copy bandwidth", target, select, _share, odds)
    yield Goal("largest error against float64: fused / plain", 2, worst_error, is_at_most=True)


GOALS = (*_goals(),)
