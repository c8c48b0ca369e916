"""The fused operations' measurements: goals and tables."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from benchmarks.harness import tables
from benchmarks.harness.goals import Goal, goal_table
from benchmarks.harness.records import BACKWARD, BOTH, FORWARD, Record
from benchmarks.harness.session import ROUNDING
from benchmarks.harness.tables import describe, figure, record_table, time

TITLE = "Fused operations"
NOTE = """\
Times are medians of the device's, by events, out of the cache, providers in turns; in brackets the share of the time
that the task's fewest bytes take at the copy bandwidth measured in the same run. A backward pass has its own forward
before it, untimed. "eager" is the plain reference, "compiled" the same through torch.compile in its default mode.
Peers take queries, keys and values as views of one tensor and their gradients are put into one again, as in a model.
"""
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


class Timed(NamedTuple):
    """A pass of a task."""

    what: str
    shape: dict[str, int | str]
    """What the records' shape says, among other things."""
    pass_: str

    def by(self, provider: str, records: Sequence[Record]) -> Record | None:
        """Return a provider's record."""
        fitting = [
            record
            for record in records
            if (record.provider, record.what, record.pass_) == (provider, self.what, self.pass_)
            and self.shape.items() <= record.shape.items()
        ]
        return fitting[-1] if fitting else None


def beside_peer(timed: Timed, peer: str, wanted: float, label: str) -> Goal:
    """Return a goal for a peer's median over that of the fused operation."""

    def measured(records: Sequence[Record]) -> float | None:
        # one shape only, and records.latest() sees to one run
        other, fused = timed.by(peer, records), timed.by("fused", records)
        return None if other is None or fused is None else (other.median_ms or 0.0) / (fused.median_ms or 1.0)

    return Goal(f"{label}: {peer} / fused", wanted, measured, pass_=timed.pass_)


def of_fused(
    timed: Timed, text: str, wanted: float, value: Callable[[Record], float | None], *, is_at_most: bool
) -> Goal:
    """Return a goal for a value of the fused operation's record."""

    def measured(records: Sequence[Record]) -> float | None:
        record = timed.by("fused", records)
        return None if record is None else value(record)

    return Goal(text, wanted, measured, is_at_most, timed.pass_)


def _over_floor(record: Record, bytes_factor: float = 1.0) -> float | None:
    return None if record.share_of_floor is None else 1 / (bytes_factor * record.share_of_floor)


def _share_of_floor(record: Record) -> float | None:
    return record.share_of_floor


def _attention_goals() -> Iterator[Goal]:
    for length, forward, backward in ((196, 1.3, 1.3), (197, 1.3, 1.3), (212, 1.3, 1.3), (256, 1.0, 1.2)):
        for head_dim in (32, 64):
            for pass_, wanted in ((FORWARD, forward), (BACKWARD, backward)):
                timed = Timed("attention", {"N": length, "d": head_dim, "B": 256}, pass_)
                yield beside_peer(timed, "cuDNN", wanted, f"attention N={length} d={head_dim}")
    for head_dim in (32, 64):
        for pass_, wanted in ((FORWARD, 1.5), (BACKWARD, 1.8)):
            timed = Timed("packed attention", {"d": head_dim}, pass_)
            yield beside_peer(timed, "varlen_attn", wanted, f"packed attention N=50-256 d={head_dim}")
    shape: dict[str, int | str] = {"N": 196, "d": 64, "B": 256}
    text = "attention N=196 d=64: fused / byte floor"
    yield of_fused(Timed("attention", shape, FORWARD), text, 1.4, _over_floor, is_at_most=True)
    # this goal was set for a backward pass that reads the output too, 8 tensors instead of 7
    value = partial(_over_floor, bytes_factor=8 / 7)
    text = f"{text} that reads the output"
    yield of_fused(Timed("attention", shape, BACKWARD), text, 1.7, value, is_at_most=True)


def _other_goals() -> Iterator[Goal]:
    calls, text = Timed(NEW_LENGTHS, {}, BOTH), "new length every call: compilations"
    yield of_fused(calls, text, 0, lambda record: record.figures.get("compilations"), is_at_most=True)
    for kind in ("feature conditioning", "sequence conditioning"):
        for peer, wanted in (("eager", 5.0), ("compiled", 1.3)):
            yield beside_peer(Timed(kind, {"B": 256}, FORWARD), peer, wanted, kind)
    for pass_, wanted in ((FORWARD, 0.7), (BACKWARD, 0.6)):
        timed, text = Timed("residual norm", {"D": 384}, pass_), "residual norm D=384: share of copy bandwidth"
        yield of_fused(timed, text, wanted, _share_of_floor, is_at_most=False)
    yield Goal("largest error to float64: fused / plain bfloat16", 2, worst_error, is_at_most=True)


GOALS = (*_attention_goals(), *_other_goals())
