"""One run of the benchmarks: its time, what was measured, and the check that comes before measuring."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import timing
from benchmarks.harness.providers import Function, Provider, compiled
from benchmarks.harness.records import PASSES, Record, Shape, append
from benchmarks.harness.rooflines import Cost
from benchmarks.harness.timing import Effort, Failure
from iwm_fast.kernels.ops import FUSED, REFERENCE

ROUNDING = 5e-3
"""Relative errors below are bfloat16's own: rounding a result once costs up to 2e-3."""
WRONG = 3e-2
"""Relative error from which a bfloat16 result is wrong, unless plain PyTorch's is half of it; that of the tests."""


class WrongResultError(RuntimeError):
    """A fused operation does not compute what its reference does: no time of it means anything."""


class Case(NamedTuple):
    """A task that providers compete in."""

    what: str
    shape: Shape
    dtype: str = "bfloat16"
    costs: dict[str, Cost] | None = None
    """By pass."""

    def __str__(self) -> str:
        return f"{self.what} {' '.join(f'{name}={value}' for name, value in self.shape.items())}"


@dataclass
class Session:
    """Where measurements go."""

    machine: dict[str, Any]
    _: KW_ONLY
    effort: Effort
    device: str
    out: Path | None = None
    """File that records are appended to."""
    limit_s: float = 1e9
    """Seconds after which nothing new is started."""
    without: Sequence[str] = ()
    """Providers whose names contain one of these are left out."""
    records: list[Record] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """What there was no time or no device for."""

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.limit_s
        self.is_quick = self.effort == timing.QUICK

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
            append(self.out, record)

    def note_failure(self, case: Case, provider: str, error: Exception, pass_: str = "") -> None:
        """Write what a provider raised; if the GPU computes no more after it, raise that."""
        self.note(case, provider, pass_, failure=timing.first_line(error))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def compare_ops(
        self,
        case: Case,
        operation: Callable[..., Function],
        inputs: dict[str, Tensor],
        d_outputs: dict[str, Tensor],
    ) -> None:
        """Check the fused operation, and time it, the plain one and that compiled.

        Args:
            case: what is compared.
            operation: takes `Ops`, and exact=True for float64 without autocast; returns the function of the inputs.
            inputs: what is passed, by name.
            d_outputs: the gradient that comes back for each output, by name.

        Raises:
            WrongResultError: see `check`.
        """
        fused = Provider("fused", operation(FUSED), tuple(inputs.values()), tuple(d_outputs.values()))
        plain = fused._replace(name="eager", function=operation(REFERENCE))
        exact = fused.in_double(operation(REFERENCE, exact=True))
        names = [*d_outputs, *(f"d_{name}" for name in inputs)]
        own = [fused] if self.check(case, names, fused=fused, plain=plain, exact=exact) else []
        self.measure(case, [*own, plain, plain._replace(name="compiled", function=compiled(plain.function))])

    def measure(self, case: Case, providers: Sequence[Provider], passes: Sequence[str] = PASSES) -> None:
        """Time every pass of all providers in turns; one that raises is written down and drops out."""
        if torch.cuda.is_available():
            # after eight shapes of one function Dynamo would give up, silently
            torch.compiler.reset()
        able = [one for one in providers if not any(name in one.name for name in self.without)]
        for pass_ in passes:
            found = timing.compare({one.name: one.work(pass_) for one in able}, effort=self.effort)
            self.note_timings(case, pass_, found)
            able = [one for one in able if not isinstance(found[one.name], Failure)]

    def note_timings(self, case: Case, pass_: str, found: dict[str, timing.Timing | Failure]) -> None:
        """Write a record for each provider: its times, and how near the floor they are, or why there are none."""
        for name, result in found.items():
            if isinstance(result, Failure):
                self.note(case, name, pass_, failure=result.line)
                continue
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
        names: Sequence[str],
        *,
        fused: Provider,
        plain: Provider,
        exact: Provider,
        rows: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> bool:
        """Compare fused results and gradients with float64's, and so with what plain PyTorch makes of the same.

        Args:
            case: what is about to be timed.
            names: of the outputs, then the inputs.
            fused: the fused operation.
            plain: the reference in the same precision.
            exact: the reference in float64.
            rows: what of the fused tensors the others compute.

        Returns:
            Whether the fused operation runs; an error of it is written down.

        Raises:
            WrongResultError: if an error exceeds twice the plain one's, and 3e-2.
        """
        wanted = exact.outputs_and_gradients()
        expected = dict(zip(names, map(relative_error, plain.outputs_and_gradients(), wanted), strict=True))
        try:
            got = [rows(tensor) for tensor in fused.outputs_and_gradients()]
        except Exception as error:
            self.note_failure(case, fused.name, error)
            return False
        found = dict(zip(names, map(relative_error, got, wanted), strict=True))
        checked = Case(f"{case.what} error", case.shape, case.dtype)
        self.note(checked, fused.name, figures=found)
        self.note(checked, "plain", figures=expected)
        for name in names:
            allowed = max(2 * expected[name], WRONG)
            # written so that NaN fails
            if not found[name] <= allowed:
                raise WrongResultError(
                    f"{case}: {name} of {fused.name} is off by {found[name]:.2e} relative to float64, "
                    f"allowed {allowed:.2e}; run pytest tests/kernels"
                )
        return True


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return ||got - wanted|| / ||wanted||."""
    difference = (got.double() - wanted.double()).norm()
    return float(difference / wanted.double().norm().clamp(min=1e-30))
