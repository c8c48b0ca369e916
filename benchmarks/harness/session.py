"""One run of the benchmarks: its time, what was measured, and the check that comes before measuring."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import records, timing
from benchmarks.harness.providers import Provider
from benchmarks.harness.records import PASSES, Record
from benchmarks.harness.rooflines import Cost
from benchmarks.harness.timing import Effort, Failure

ROUNDING = 5e-3
"""Relative errors below are bfloat16's own: rounding a result once costs up to 2e-3."""
WRONG = 3e-2
"""Relative error from which a bfloat16 result is wrong, unless plain PyTorch's is half of it; that of the tests."""


class WrongResultError(RuntimeError):
    """A fused operation does not compute what its reference does: no time of it means anything."""


class Case(NamedTuple):
    """A task that providers compete in."""

    what: str
    shape: dict[str, int | str]
    dtype: str = "bfloat16"
    costs: dict[str, Cost] | None = None
    """By pass."""

    def __str__(self) -> str:
        return f"{self.what} {' '.join(f'{name}={value}' for name, value in self.shape.items())}"


class Session:
    """Where measurements go."""

    def __init__(
        self,
        machine: dict[str, Any],
        *,
        effort: Effort,
        device: str,
        out: Path | None = None,
        limit_s: float = 1e9,
        without: Sequence[str] = (),
    ) -> None:
        self.machine = machine
        self.effort = effort
        self.device = device
        self.out = out
        self.without = without
        self.deadline = time.monotonic() + limit_s
        self.records: list[Record] = []
        self.left_out: list[str] = []
        self.is_quick = effort == timing.QUICK

    def has_time(self, what: object) -> bool:
        """Return whether something new may start; remember what may not."""
        if time.monotonic() < self.deadline:
            print(f"... {what}", file=sys.stderr, flush=True)
            return True
        self.left_out.append(str(what))
        return False

    def deadline_of(self, share: float) -> float:
        """Return when that share of the time left will be over, so that something is left for the rest."""
        now = time.monotonic()
        return now + share * (self.deadline - now)

    def note(self, case: Case, provider: str, pass_: str = "", **values: Any) -> None:
        """Write one record."""
        record = Record(
            what=case.what,
            provider=provider,
            shape=case.shape,
            dtype=case.dtype,
            pass_=pass_,
            machine=self.machine,
            **values,
        )
        self.records.append(record)
        if self.out is not None:
            records.append(self.out, record)

    def measure(self, case: Case, providers: Sequence[Provider], passes: Sequence[str] = PASSES) -> None:
        """Time every pass of all providers in turns; one that raises is written down and drops out."""
        if torch.cuda.is_available():
            # after eight shapes of one function Dynamo would give up, silently
            torch.compiler.reset()
        able = [one for one in providers if not any(name in one.name for name in self.without)]
        for pass_ in passes:
            found = timing.compare({one.name: one.work(pass_) for one in able}, effort=self.effort)
            for name, result in found.items():
                self._note_timing(case, name, pass_, result)
            able = [one for one in able if not isinstance(found[one.name], Failure)]

    def _note_timing(self, case: Case, name: str, pass_: str, result: timing.Timing | Failure) -> None:
        if isinstance(result, Failure):
            self.note(case, name, pass_, failure=result.line)
            return
        values: dict[str, Any] = result._asdict()
        if case.costs is not None:
            cost, bandwidth = case.costs[pass_], self.machine.get("copy_bytes_per_s")
            values |= {"bytes": cost.bytes or None, "flops": cost.flops or None}
            if bandwidth and cost.bytes:
                values["share_of_floor"] = 1e3 * cost.bytes / bandwidth / result.median_ms
        self.note(case, name, pass_, **values)

    def check(
        self,
        case: Case,
        providers: dict[str, Provider],
        names: Sequence[str],
        *,
        rows: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> bool:
        """Compare fused results and gradients with float64's, and so with what plain PyTorch makes of the same.

        Args:
            case: what is about to be timed.
            providers: "fused"; "plain", the reference in the same precision; "exact", it in float64.
            names: of the outputs, then the inputs.
            rows: what of the fused tensors the others compute.

        Returns:
            Whether the fused operation runs; an error of it is written down.

        Raises:
            WrongResultError: if an error exceeds twice the plain one's, and 3e-2.
        """
        exact = providers["exact"].outputs_and_gradients()
        plain = relative_errors(providers["plain"].outputs_and_gradients(), exact, names)
        try:
            got = [rows(tensor) for tensor in providers["fused"].outputs_and_gradients()]
        except Exception as error:
            self.note(case, providers["fused"].name, failure=timing.first_line(error))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return False
        fused = relative_errors(got, exact, names)
        checked = Case(f"{case.what} error", case.shape, case.dtype)
        self.note(checked, providers["fused"].name, figures=fused)
        self.note(checked, "plain", figures=plain)
        for name in names:
            allowed = max(2 * plain[name], WRONG)
            # written so that NaN fails
            if not fused[name] <= allowed:
                raise WrongResultError(
                    f"{case}: {name} of {providers['fused'].name} is off by {fused[name]:.2e} relative to float64, "
                    f"allowed {allowed:.2e}; run pytest tests/kernels"
                )
        return True


def relative_errors(got: Sequence[Tensor], wanted: Sequence[Tensor], names: Sequence[str]) -> dict[str, float]:
    """Return ||got - wanted|| / ||wanted|| of each tensor."""
    errors = {}
    for name, left, right in zip(names, got, wanted, strict=True):
        difference = (left.double() - right.double()).norm()
        errors[name] = float(difference / right.double().norm().clamp(min=1e-30))
    return errors
