"""The fused operations' measurements: goals and tables."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks.harness import tables
from benchmarks.harness.goals import Goal, goal_table
from benchmarks.harness.records import BACKWARD, BOTH, FORWARD, Record, Shape
from benchmarks.harness.session import ROUNDING
from benchmarks.harness.tables import describe, figure, record_table, time

NEW_LENGTHS = "new lengths"


def sections(records: Sequence[Record], level: str = "###") -> str:
    """Return every table that has something in it, each under a heading, the goals first."""
    found = {"Goals": goal_table(GOALS, records)}
    for what in dict.fromkeys(record.what for record in records if record.pass_):
        chosen = [record for record in records if record.what == what]
        found[f"{what}, ms"] = new_lengths(chosen) if what == NEW_LENGTHS else timings(chosen)
    found["Relative errors to float64, of the output and of the worst"] = errors(records)
    return tables.sections(found, records, level)


def timings(records: Sequence[Record]) -> str:
    """Return medians in ms, a row for each task and pass, a column for each provider.

    In brackets the share of the time that the task's bytes take at the measured bandwidth.
    """
    timed = [record for record in records if record.pass_]
    names = list(dict.fromkeys(record.provider for record in timed))
    rows = []
    for found in _grouped(timed):
        any_record = next(iter(found.values()))
        cells = [_timing(found[name]) if name in found else "-" for name in names]
        rows.append([describe(any_record.shape), any_record.pass_, *cells])
    return tables.table(["shape", "pass", *names], rows)


def _grouped(records: Sequence[Record]) -> list[dict[str, Record]]:
    """Return the records that may be compared with each other, by provider."""
    groups: dict[Any, dict[str, Record]] = {}
    for record in records:
        groups.setdefault(record.group, {})[record.provider] = record
    return list(groups.values())


def _timing(record: Record) -> str:
    if record.failure is not None or record.median_ms is None:
        return "raises"
    share = "" if record.share_of_floor is None else f" ({100 * record.share_of_floor:.0f} %)"
    return f"{record.median_ms:.3f}{share}"


def new_lengths(records: Sequence[Record]) -> str:
    """Return what a call costs that brings a new length, in ms, and how many kernels were compiled for it."""
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


def _checks(records: Sequence[Record]) -> list[dict[str, Record]]:
    """Return the fused operation's and plain PyTorch's relative errors to float64, as "fused" and "plain"."""
    groups = _grouped([record for record in records if record.what.endswith(" error")])
    return [found for found in groups if {"fused", "plain"} <= found.keys()]


def errors(records: Sequence[Record]) -> str:
    """Return relative errors to float64 of the fused operation and of plain PyTorch in bfloat16."""
    rows = []
    for found in _checks(records):
        task, shape = found["fused"].what.removesuffix(" error"), describe(found["fused"].shape)
        fused, plain = found["fused"].figures, found["plain"].figures
        worst = max(fused, key=lambda name: fused[name] / max(plain[name], 1e-12))
        for name in dict.fromkeys([next(iter(fused)), worst]):
            rows.append([task, shape, name, f"{fused[name]:.1e}", f"{plain[name]:.1e}"])
    return tables.table(["task", "shape", "tensor", "fused", "plain bfloat16"], rows) if rows else ""


def worst_error(records: Sequence[Record]) -> float | None:
    """Return the largest error of a fused tensor to float64 over that of plain bfloat16, rounding left aside."""
    ratios = [
        value / max(found["plain"].figures[name], ROUNDING)
        for found in _checks(records)
        for name, value in found["fused"].figures.items()
    ]
    return max(ratios, default=None)


def _goal(
    text: str,
    wanted: float,
    task: tuple[str, Shape, str],
    value: Callable[[dict[str, Record]], float | None],
    *,
    is_at_most: bool = False,
) -> Goal:
    """Return a goal for a value of the records, by provider, of a task: what, some of its shape, and the pass."""
    what, shape, pass_ = task

    def measured(records: Sequence[Record]) -> float | None:
        fitting = [one for one in records if (one.what, one.pass_) == (what, pass_)]
        # one shape only, and records.latest() sees to one run
        found = {one.provider: one for one in fitting if shape.items() <= one.shape.items()}
        return value(found) if "fused" in found else None

    return Goal(text, wanted, measured, is_at_most, pass_)


def _over_fused(peer: str) -> Callable[[dict[str, Record]], float | None]:
    """Return how to find the ratio of a peer's median to that of the fused operation."""
    return lambda found: (found[peer].median_ms or 0.0) / (found["fused"].median_ms or 1.0) if peer in found else None


def _share_of_floor(found: dict[str, Record]) -> float | None:
    return found["fused"].share_of_floor


def _over_floor(found: dict[str, Record], bytes_factor: float = 1.0) -> float | None:
    share = found["fused"].share_of_floor
    return None if share is None else 1 / (bytes_factor * share)


def _attention_goals() -> Iterator[Goal]:
    for length, forward, backward in ((196, 1.3, 1.3), (197, 1.3, 1.3), (212, 1.3, 1.3), (256, 1.0, 1.2)):
        for head_dim in (32, 64):
            for pass_, wanted in ((FORWARD, forward), (BACKWARD, backward)):
                task = "attention", {"N": length, "d": head_dim, "B": 256}, pass_
                yield _goal(f"attention N={length} d={head_dim}: cuDNN / fused", wanted, task, _over_fused("cuDNN"))
    for head_dim in (32, 64):
        for pass_, wanted in ((FORWARD, 1.5), (BACKWARD, 1.8)):
            text, task = f"packed attention N=50-256 d={head_dim}", ("packed attention", {"d": head_dim}, pass_)
            yield _goal(f"{text}: varlen_attn / fused", wanted, task, _over_fused("varlen_attn"))
    text, shape = "attention N=196 d=64: fused / byte floor", {"N": 196, "d": 64, "B": 256}
    yield _goal(text, 1.4, ("attention", shape, FORWARD), _over_floor, is_at_most=True)
    # this goal was set for a backward pass that reads the output too, 8 tensors instead of 7
    value, text = partial(_over_floor, bytes_factor=8 / 7), f"{text} that reads the output"
    yield _goal(text, 1.7, ("attention", shape, BACKWARD), value, is_at_most=True)


def _other_goals() -> Iterator[Goal]:
    text, task = "new length every call: compilations", (NEW_LENGTHS, {}, BOTH)
    yield _goal(text, 0, task, lambda found: found["fused"].figures.get("compilations"), is_at_most=True)
    for kind in ("feature conditioning", "sequence conditioning"):
        for peer, wanted in (("eager", 5.0), ("compiled", 1.3)):
            yield _goal(f"{kind}: {peer} / fused", wanted, (kind, {"B": 256}, FORWARD), _over_fused(peer))
    for pass_, wanted in ((FORWARD, 0.7), (BACKWARD, 0.6)):
        task = "residual norm", {"D": 384}, pass_
        yield _goal("residual norm D=384: share of copy bandwidth", wanted, task, _share_of_floor)
    yield Goal("largest error to float64: fused / plain bfloat16", 2, worst_error, is_at_most=True)


GOALS = (*_attention_goals(), *_other_goals())
