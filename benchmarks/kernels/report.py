"""Report of the fused operations: goals and tables."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks.harness import tables
from benchmarks.harness.goals import Goal, goal_table
from benchmarks.harness.records import BACKWARD, BOTH, FORWARD, Record, Shape
from benchmarks.harness.session import ROUNDING_ERROR
from benchmarks.harness.tables import describe, figure, record_table, time

NEW_LENGTHS = "new lengths"


def sections(records: Sequence[Record], level: str = "###") -> str:
    """Return the non-empty tables under headings of this level, the goals first."""
    texts = {"Goals": goal_table(GOALS, records)}
    for what in dict.fromkeys(record.what for record in records if record.pass_):
        selected = [record for record in records if record.what == what]
        texts[f"{what}, ms"] = new_lengths(selected) if what == NEW_LENGTHS else timings(selected)
    texts["Relative errors of the output and of the worst tensor, against float64"] = errors(records)
    return tables.sections(texts, records, level)


def timings(records: Sequence[Record]) -> str:
    """Return medians in ms with a row per shape and pass, and a column per provider.

    The percentage in brackets is the time that the minimum bytes take at the measured bandwidth, over the median.
    """
    timed = [record for record in records if record.pass_]
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


def new_lengths(records: Sequence[Record]) -> str:
    """Return a table of the milliseconds per call with a new length, and of the number of compiled kernels."""
    return record_table(
        [record for record in records if record.failure is None],
        {
            "shape": lambda record: describe(record.shape),
            "provider": tables.provider,
            "median": time("median_ms", ".2f"),
            "p80": time("p80_ms", ".2f"),
            "mean": figure("mean_ms", ".2f"),
            "longest": figure("longest_ms", ".2f"),
            "first five": figure("first_calls_ms", ".2f"),
            "calls": figure("calls"),
            "Triton compilations": figure("compilations"),
        },
    )


def _error_groups(records: Sequence[Record]) -> list[dict[str, Record]]:
    """Return the records of relative errors against float64, with the keys "fused" and "plain"."""
    groups = _grouped([record for record in records if record.what.endswith(" error")])
    return [group for group in groups if {"fused", "plain"} <= group.keys()]


def errors(records: Sequence[Record]) -> str:
    """Return a table of the relative errors against float64 of the fused operation and of plain bfloat16."""
    rows = []
    for group in _error_groups(records):
        operation, shape = group["fused"].what.removesuffix(" error"), describe(group["fused"].shape)
        fused, plain = group["fused"].figures, group["plain"].figures
        worst = max(fused, key=lambda name: fused[name] / max(plain[name], 1e-12))
        for name in dict.fromkeys([next(iter(fused)), worst]):
            rows.append([operation, shape, name, f"{fused[name]:.1e}", f"{plain[name]:.1e}"])
    return tables.table(["operation", "shape", "tensor", "fused", "plain bfloat16"], rows) if rows else ""


def worst_error(records: Sequence[Record]) -> float | None:
    """Return the largest ratio of a fused tensor's error to the plain one's, or to rounding if that is larger."""
    ratios = [
        value / max(group["plain"].figures[name], ROUNDING_ERROR)
        for group in _error_groups(records)
        for name, value in group["fused"].figures.items()
    ]
    return max(ratios, default=None)


def _goal(
    text: str,
    target: float,
    selection: tuple[str, Shape, str],
    value: Callable[[dict[str, Record]], float | None],
    *,
    is_at_most: bool = False,
) -> Goal:
    """Return a goal for a value of the records, by provider, selected by `what`, part of the shape, and pass."""
    what, shape, pass_ = selection

    def metric(records: Sequence[Record]) -> float | None:
        # The selected entries identify one shape, and records.latest() leaves one run of it.
        by_provider = {
            record.provider: record
            for record in records
            if (record.what, record.pass_) == (what, pass_) and shape.items() <= record.shape.items()
        }
        return value(by_provider) if "fused" in by_provider else None

    return Goal(text, target, metric, is_at_most, pass_)


def _over_fused(peer: str) -> Callable[[dict[str, Record]], float | None]:
    """Return a function that divides the median of a peer by that of the fused operation."""
    return lambda group: (group[peer].median_ms or 0.0) / (group["fused"].median_ms or 1.0) if peer in group else None


def _over_floor(group: dict[str, Record], bytes_factor: float = 1.0) -> float | None:
    share = group["fused"].share_of_floor
    return None if share is None else 1 / (bytes_factor * share)


def _attention_goals() -> Iterator[Goal]:
    for length, forward, backward in ((196, 1.3, 1.3), (197, 1.3, 1.3), (212, 1.3, 1.3), (256, 1.0, 1.2)):
        for head_dim in (32, 64):
            for pass_, target in ((FORWARD, forward), (BACKWARD, backward)):
                selection = "attention", {"N": length, "d": head_dim, "B": 256}, pass_
                text = f"attention N={length} d={head_dim}: cuDNN / fused"
                yield _goal(text, target, selection, _over_fused("cuDNN"))
    for head_dim in (32, 64):
        for pass_, target in ((FORWARD, 1.5), (BACKWARD, 1.8)):
            text, selection = f"packed attention N=50-256 d={head_dim}", ("packed attention", {"d": head_dim}, pass_)
            yield _goal(f"{text}: varlen_attn / fused", target, selection, _over_fused("varlen_attn"))
    text, shape = "attention N=196 d=64: fused / byte floor", {"N": 196, "d": 64, "B": 256}
    yield _goal(text, 1.4, ("attention", shape, FORWARD), _over_floor, is_at_most=True)
    # This goal was set for a backward pass that also reads the output: 8 tensors instead of 7.
    value, text = partial(_over_floor, bytes_factor=8 / 7), f"{text} that reads the output"
    yield _goal(text, 1.7, ("attention", shape, BACKWARD), value, is_at_most=True)


def _other_goals() -> Iterator[Goal]:
    text, selection = "new length in each call: compilations", (NEW_LENGTHS, {}, BOTH)
    yield _goal(text, 0, selection, lambda group: group["fused"].figures.get("compilations"), is_at_most=True)
    for kind in ("feature conditioning", "sequence conditioning"):
        for peer, target in (("eager", 5.0), ("compiled", 1.3)):
            yield _goal(f"{kind}: {peer} / fused", target, (kind, {"B": 256}, FORWARD), _over_fused(peer))
    for pass_, target in ((FORWARD, 0.7), (BACKWARD, 0.6)):
        text, selection = "residual norm D=384: share of copy bandwidth", ("residual norm", {"D": 384}, pass_)
        yield _goal(text, target, selection, lambda group: group["fused"].share_of_floor)
    yield Goal("largest error against float64: fused / plain bfloat16", 2, worst_error, is_at_most=True)


GOALS = (*_attention_goals(), *_other_goals())
