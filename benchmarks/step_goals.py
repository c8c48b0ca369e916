"""What the training step is meant to reach, beside what was measured."""

from collections.abc import Callable, Sequence

from benchmarks.goals import Goal, verdict
from benchmarks.pipeline_goals import HEADINGS
from benchmarks.records import Record
from benchmarks.step_names import BASE, CACHED, DEFAULT, LOADING, SHARDS, SMALL, STEP

__all__ = ["HEADINGS", "rows"]

GPU = "H200"
"""The card in the goals for one."""

Reached = Callable[[Sequence[Record]], float | None]


def rows(records: Sequence[Record]) -> list[list[str]]:
    """Return a row for each goal: text, wanted, measured, whether it is met."""
    able = [record for record in records if record.failure is None]
    return [[goal.text, *verdict(goal, reached(able))] for goal, reached in _goals()]


def _goals() -> list[tuple[Goal, Reached]]:
    return [
        (_at_most(f"{SMALL} on a CPU: {DEFAULT} over the bare loop, %", 10.0), on_cpu("over_percent")),
        (_at_most(f"{SMALL} on a CPU: the teacher's update, % of the step", 2.0), on_cpu("teacher_update_percent")),
        (_at_least(f"{BASE} on an {GPU} from one cached batch, images/s", 2450.0), on_gpu),
        (_at_most(f"{BASE} on an {GPU}: the teacher's update, % of the step", 2.0), update_on_gpu),
        (_at_least(f"{BASE} on an {GPU}: images/s from shards, % of those", 95.0), from_shards),
        (_at_most(f"{BASE} on an {GPU}: waiting for shards, % of the step", 1.0), waiting),
    ]


def _at_most(text: str, wanted: float) -> Goal:
    return Goal(text, "", {}, "", wanted, is_at_most=True)


def _at_least(text: str, wanted: float) -> Goal:
    return Goal(text, "", {}, "", wanted)


def on_cpu(figure: str) -> Reached:
    """Return how to find a figure of the default engine on one rank of a machine without a GPU."""

    def reached(records: Sequence[Record]) -> float | None:
        fitting = [one for one in _of(records, STEP, SMALL) if one.provider == DEFAULT and one.shape["ranks"] == 1]
        return next((one.figures.get(figure) for one in fitting if not one.machine.get("gpu")), None)

    return reached


def on_gpu(records: Sequence[Record]) -> float | None:
    """Return the most images per second of the default engine, whatever else is switched on."""
    fitting = [one.figures["images_per_s"] for one in _on_card(records, STEP) if one.provider.startswith(DEFAULT)]
    return max(fitting, default=None)


def update_on_gpu(records: Sequence[Record]) -> float | None:
    """Return the teacher's share where the step is shortest."""
    fitting = [one for one in _on_card(records, STEP) if one.provider.startswith(DEFAULT)]
    found = max(fitting, key=lambda one: one.figures["images_per_s"], default=None)
    return None if found is None else found.figures["teacher_update_percent"]


def from_shards(records: Sequence[Record]) -> float | None:
    """Return the loader's images per second over those of a cached batch, in percent, both of one run."""
    speeds = {one.provider: one.figures["images_per_s"] for one in _on_card(records, LOADING)}
    return 100 * speeds[SHARDS] / speeds[CACHED] if {SHARDS, CACHED} <= speeds.keys() else None


def waiting(records: Sequence[Record]) -> float | None:
    """Return the share of the step in which there is no batch."""
    shares = [one.figures["wait_percent"] for one in _on_card(records, LOADING) if one.provider == SHARDS]
    return next(iter(shares), None)


def _on_card(records: Sequence[Record], what: str) -> list[Record]:
    return [one for one in _of(records, what, BASE) if GPU in str(one.machine.get("gpu"))]


def _of(records: Sequence[Record], what: str, model: str) -> list[Record]:
    return [one for one in records if one.what == what and one.shape["model"] == model]
