"""One run of a benchmark: its time limit, its records, and the correctness check that precedes every timing."""

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
from benchmarks.harness.timing import Failure, TimingBudget
from iwm_fast.kernels.ops import FUSED, REFERENCE

ROUNDING_ERROR = 5e-3
"""Relative errors below this are bfloat16 rounding: rounding a result once costs up to 2e-3."""
MAX_RELATIVE_ERROR = 3e-2
"""A larger error of a bfloat16 result is wrong, unless it is at most twice plain PyTorch's; the tests use it, too."""


class WrongResultError(RuntimeError):
    """A provider does not compute what it is compared with, so its time means nothing."""


class Case(NamedTuple):
    """What providers are compared on: an operation or a stage, at one shape and dtype."""

    what: str
    shape: Shape
    dtype: str = "bfloat16"
    costs: dict[str, Cost] | None = None
    """Minimum bytes and operations by pass, if they are known."""

    def __str__(self) -> str:
        return f"{self.what} {' '.join(f'{name}={value}' for name, value in self.shape.items())}"


@dataclass
class Session:
    """State of one run: machine, budget, and the records measured so far."""

    machine: dict[str, Any]
    _: KW_ONLY
    budget: TimingBudget
    device: str
    out: Path | None = None
    """File that records are appended to."""
    limit_s: float = 1e9
    """Seconds after which no new measurement starts."""
    excluded: Sequence[str] = ()
    """Providers whose names contain one of these strings are not timed."""
    records: list[Record] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Measurements for which there was no time or no device."""

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.limit_s
        self.quick = self.budget == timing.QUICK

    def has_time(self, what: object) -> bool:
        """Return whether a new measurement may start, and list it under `skipped` if not."""
        if time.monotonic() < self.deadline:
            print(f"... {what}", file=sys.stderr, flush=True)
            return True
        self.skipped.append(str(what))
        return False

    def deadline_of(self, share: float) -> float:
        """Return the monotonic time at which this share of the remaining time is used up."""
        now = time.monotonic()
        return now + share * (self.deadline - now)

    def record(self, case: Case, provider: str, pass_: str = "", **values: Any) -> None:
        """Keep one record, and append it to the file."""
        values |= {"pass_": pass_, "machine": self.machine}
        record = Record(what=case.what, provider=provider, shape=case.shape, dtype=case.dtype, **values)
        self.records.append(record)
        if self.out is not None:
            append(self.out, record)

    def record_failure(self, case: Case, provider: str, error: Exception, pass_: str = "") -> None:
        """Record the error of a provider; raise instead if it left the GPU unusable."""
        self.record(case, provider, pass_, failure=timing.first_line(error))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def compare_ops(
        self, case: Case, operation: Callable[..., Function], inputs: dict[str, Tensor], d_outputs: dict[str, Tensor]
    ) -> None:
        """Check the fused operation, then time it beside the plain and the compiled one.

        Args:
            case: operation and shape.
            operation: maps `Ops` to the function of the inputs; with exact=True for float64 without autocast.
            inputs: inputs by name.
            d_outputs: the gradient of each output by name.

        Raises:
            WrongResultError: if an error of the fused operation exceeds twice the plain one's, and 3e-2.
        """
        fused = Provider("fused", operation(FUSED), tuple(inputs.values()), tuple(d_outputs.values()))
        plain = fused._replace(name="eager", function=operation(REFERENCE))
        exact = fused.in_float64(operation(REFERENCE, exact=True))
        names = [*d_outputs, *(f"d_{name}" for name in inputs)]
        runs_fused = self.check(case, names, fused=fused, plain=plain, exact=exact)
        baselines = [plain, plain._replace(name="compiled", function=compiled(plain.function))]
        self.measure(case, [fused, *baselines] if runs_fused else baselines)

    def measure(self, case: Case, providers: Sequence[Provider], passes: Sequence[str] = PASSES) -> None:
        """Time all providers pass by pass; one that raises is recorded and drops out of the remaining passes."""
        if torch.cuda.is_available():
            # Dynamo silently falls back to eager after eight recompilations of one function (its recompile limit).
            torch.compiler.reset()
        remaining = [provider for provider in providers if not any(name in provider.name for name in self.excluded)]
        for pass_ in passes:
            functions = {provider.name: provider.timed_pass(pass_) for provider in remaining}
            results = timing.compare(functions, budget=self.budget)
            self.record_timings(case, pass_, results)
            remaining = [provider for provider in remaining if not isinstance(results[provider.name], Failure)]

    def record_timings(self, case: Case, pass_: str, results: dict[str, timing.Timing | Failure]) -> None:
        """Record for each provider either its times and its share of the floor, or its failure."""
        for name, result in results.items():
            if isinstance(result, Failure):
                self.record(case, name, pass_, failure=result.message)
                continue
            values: dict[str, Any] = result._asdict()
            if case.costs is not None:
                cost, bandwidth = case.costs[pass_], self.machine.get("copy_bytes_per_s")
                values |= {"bytes": cost.bytes or None, "flops": cost.flops or None}
                if bandwidth and cost.bytes:
                    values["share_of_floor"] = 1e3 * cost.bytes / bandwidth / result.median_ms
            self.record(case, name, pass_, **values)

    def check(
        self,
        case: Case,
        names: Sequence[str],
        *,
        fused: Provider,
        plain: Provider,
        exact: Provider,
        select: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> bool:
        """Record the errors of the fused and the plain operation relative to float64, and bound the fused ones.

        Args:
            case: operation and shape that are about to be timed.
            names: names of the outputs, then of the inputs.
            fused: the fused operation.
            plain: the reference in the same precision.
            exact: the reference in float64.
            select: returns the part of a fused tensor that the other two compute.

        Returns:
            Whether the fused operation runs; its error is recorded if it does not.

        Raises:
            WrongResultError: if an error of the fused operation exceeds twice the plain one's, and 3e-2.
        """
        expected = exact.outputs_and_gradients()
        plain_errors = dict(zip(names, map(relative_error, plain.outputs_and_gradients(), expected), strict=True))
        try:
            actual = [select(tensor) for tensor in fused.outputs_and_gradients()]
        except Exception as error:
            self.record_failure(case, fused.name, error)
            return False
        fused_errors = dict(zip(names, map(relative_error, actual, expected), strict=True))
        error_case = Case(f"{case.what} error", case.shape, case.dtype)
        self.record(error_case, fused.name, figures=fused_errors)
        self.record(error_case, "plain", figures=plain_errors)
        for name in names:
            limit = max(2 * plain_errors[name], MAX_RELATIVE_ERROR)
            # The negated comparison is also true for NaN.
            if not fused_errors[name] <= limit:
                raise WrongResultError(
                    f"{case}: {name} of {fused.name} is off by {fused_errors[name]:.2e} relative to float64, "
                    f"at most {limit:.2e} is allowed; run pytest tests/kernels"
                )
        return True


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ||actual - expected|| / ||expected||, computed in float64."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))
