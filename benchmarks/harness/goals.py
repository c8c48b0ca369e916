"""What the fused operations are meant to reach, beside what was measured."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.harness.records import BACKWARD, BOTH, FORWARD, Record
from benchmarks.harness.session import ROUNDING

NOT_YET = "not yet measured"
HEADINGS = ["goal", "wanted", "measured", "met"]


class Goal(NamedTuple):
    """A ratio of medians, or a share, that is to be reached."""

    text: str
    what: str
    shape: dict[str, int | str]
    """What the record's shape must say."""
    pass_: str
    wanted: float
    peer: str | None = None
    """Whose median over the fused one counts; None: see `value`."""
    is_at_most: bool = False
    value: Callable[[Record], float | None] = lambda record: record.share_of_floor


def _over_floor(record: Record, bytes_factor: float = 1.0) -> float | None:
    return None if record.share_of_floor is None else 1 / (bytes_factor * record.share_of_floor)


def _over_floor_with_output(record: Record) -> float | None:
    # the goal was set for a backward pass that reads the output too, 8 tensors instead of 7
    return _over_floor(record, 8 / 7)


def _compilations(record: Record) -> float | None:
    return record.figures.get("compilations")


def _attention_goals() -> list[Goal]:
    goals = []
    for length, forward, backward in ((196, 1.3, 1.3), (197, 1.3, 1.3), (212, 1.3, 1.3), (256, 1.0, 1.2)):
        for head_dim in (32, 64):
            for pass_, wanted in ((FORWARD, forward), (BACKWARD, backward)):
                shape: dict[str, int | str] = {"N": length, "d": head_dim, "B": 256}
                text = f"attention N={length} d={head_dim}: cuDNN / fused"
                goals.append(Goal(text, "attention", shape, pass_, wanted, "cuDNN"))
    for head_dim in (32, 64):
        for pass_, wanted in ((FORWARD, 1.5), (BACKWARD, 1.8)):
            text = f"packed attention N=50-256 d={head_dim}: varlen_attn / fused"
            goals.append(Goal(text, "packed attention", {"d": head_dim}, pass_, wanted, "varlen_attn"))
    return goals


_FLOOR: dict[str, int | str] = {"N": 196, "d": 64, "B": 256}

GOALS = [
    *_attention_goals(),
    Goal("attention N=196 d=64: fused / byte floor", "attention", _FLOOR, FORWARD, 1.4, None, True, _over_floor),
    Goal(
        "attention N=196 d=64: fused / byte floor that reads the output",
        "attention",
        _FLOOR,
        BACKWARD,
        1.7,
        None,
        True,
        _over_floor_with_output,
    ),
    Goal("new length every call: compilations", "new lengths", {}, BOTH, 0, None, True, _compilations),
    *(
        Goal(f"{kind} conditioning: {peer} / fused", f"{kind} conditioning", {"B": 256}, FORWARD, wanted, peer)
        for kind in ("feature", "sequence")
        for peer, wanted in (("eager", 5.0), ("compiled", 1.3))
    ),
    Goal("residual norm D=384: share of copy bandwidth", "residual norm", {"D": 384}, FORWARD, 0.7),
    Goal("residual norm D=384: share of copy bandwidth", "residual norm", {"D": 384}, BACKWARD, 0.6),
]


def worst_error(records: Sequence[Record]) -> float | None:
    """Return the largest error of a fused tensor to float64 over that of plain bfloat16, rounding left aside."""
    checks = [record for record in records if record.what.endswith(" error")]
    plain = {record.group: record.figures for record in checks if record.provider == "plain"}
    ratios = [
        value / max(plain[record.group][name], ROUNDING)
        for record in checks
        if record.provider != "plain"
        for name, value in record.figures.items()
    ]
    return max(ratios, default=None)


def reached(goal: Goal, records: Sequence[Record]) -> float | None:
    """Return what was measured for a goal; None for nothing."""
    fitting = [
        record
        for record in records
        if (record.what, record.pass_) == (goal.what, goal.pass_)
        and record.failure is None
        and goal.shape.items() <= record.shape.items()
    ]
    by_name = {record.provider: record for record in fitting}
    if "fused" not in by_name:
        return None
    if goal.peer is None:
        return goal.value(by_name["fused"])
    if goal.peer not in by_name:
        return None
    # one shape only, and latest() sees to one run
    return (by_name[goal.peer].median_ms or 0.0) / (by_name["fused"].median_ms or 1.0)


def rows(records: Sequence[Record]) -> list[list[str]]:
    """Return a row for each goal: text, pass, wanted, measured, whether it is met."""
    values = [*((goal, reached(goal, records)) for goal in GOALS), (_ERRORS, worst_error(records))]
    return [[goal.text, goal.pass_, *verdict(goal, value)] for goal, value in values]


def verdict(goal: Goal, value: float | None) -> list[str]:
    """Return what was wanted, what was measured and whether that is enough; None was not measured."""
    sign = "at most" if goal.is_at_most else "at least"
    wanted = f"{sign} {goal.wanted:,g}"
    if value is None:
        return [wanted, NOT_YET, ""]
    return [wanted, f"{value:.2f}", "yes" if _is_met(goal, value) else "no"]


_ERRORS = Goal("largest error to float64: fused / plain bfloat16", "", {}, "", 2, None, True)


def _is_met(goal: Goal, value: float) -> bool:
    return value <= goal.wanted if goal.is_at_most else value >= goal.wanted
