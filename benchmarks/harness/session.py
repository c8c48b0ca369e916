"""One run of a benchmark: its time limit, its records, and the correctness check that precedes every timing."""

import contextlib
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import device, records, timing
from benchmarks.harness.providers import Function, Provider
from benchmarks.harness.records import PASSES, Record, Shape
from benchmarks.harness.rooflines import Cost
from benchmarks.harness.timing import Failure, TimingBudget
from iwm_fast.kernels.ops import FUSED, REFERENCE

ROUNDING_ERROR = {"bfloat16": 5e-3, "float16": 1e-3}
"""Relative errors below these are rounding by dtype: rounding a bfloat16 result once costs up to 2e-3."""


class WrongResultError(RuntimeError):
    """A provider does not compute what it is compared with, so its time means nothing."""


class Case(NamedTuple):
    """What providers are compared on: an operation or a stage, at one shape and dtype."""

    what: str
    shape: Shape
    dtype: str = "bfloat16"
    costs: dict[str, Cost] | None = None
    """Minimum bytes and operations by pass, if they are known."""

    def group(self, pass_: str = "") -> tuple[Any, ...]:
        """Return what records of this case and pass have in common, as `Record.group` does."""
        return self.what, tuple(self.shape.items()), self.dtype, pass_

    def __str__(self) -> str:
        return " ".join([self.what, *(f"{name}={value}" for name, value in self.shape.items()), self.dtype]).strip()


@dataclass
class Session:
    """State of one run: machine, budget, and the records measured so far."""

    machine: dict[str, Any]
    _: KW_ONLY
    budget: TimingBudget
    device: str
    out: Path | None = None
    """File that records are appended to. Those of the same commit and machine are kept and not measured again."""
    limit_s: float = 1e9
    """Seconds after which no new measurement starts."""
    excluded: Sequence[str] = ()
    """Providers whose names contain one of these strings are not timed."""
    records: list[Record] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Measurements for which there was no time or no device."""
    wrong: list[str] = field(default_factory=list)
    """Messages about providers that computed a wrong result."""

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.limit_s
        self.quick = self.budget in (timing.QUICK, timing.TRIAL)
        earlier = records.read(self.out) if self.out is not None and self.out.exists() else []
        same = ("gpu", "cpu", "cores", "commit", "torch", "triton")
        self.records += [
            record for record in earlier if all(record.machine.get(name) == self.machine.get(name) for name in same)
        ]
        self._measured = {record.group for record in self.records}
        self.wrong += [
            str(record.failure) for record in self.records if record.what.endswith(" error") and record.failure
        ]

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

    def is_measured(self, case: Case, pass_: str = "") -> bool:
        """Return whether an earlier run has recorded this already."""
        return case.group(pass_) in self._measured

    def record(self, case: Case, provider: str, pass_: str = "", **values: Any) -> None:
        """Keep one record, and append it to the file."""
        values |= {"pass_": pass_, "machine": self.machine}
        record = Record(what=case.what, provider=provider, shape=case.shape, dtype=case.dtype, **values)
        self.records.append(record)
        if self.out is not None:
            records.append(self.out, record)

    def record_failure(self, case: Case, provider: str, error: Exception, pass_: str = "") -> None:
        """Record the error of a provider, then raise UnusableGpuError if it left the GPU unusable."""
        self.record(case, provider, pass_, failure=timing.first_line(error))
        device.check_usable()

    def failures(self, case: Case) -> dict[str, Failure]:
        """Return the recorded failures of a case in any pass by provider, also those of earlier runs."""
        same = (record for record in self.records if record.group[:-1] == case.group()[:-1])
        return {record.provider: Failure(record.failure) for record in same if record.failure is not None}

    def compare_ops(
        self,
        case: Case,
        operation: Callable[..., Function],
        inputs: dict[str, Tensor],
        d_outputs: dict[str, Tensor],
        *,
        behind_relu: Collection[str] = (),
        is_timed: bool = True,
    ) -> None:
        """Check the fused operation, then time it beside the plain and the compiled one, while there is time.

        `operation` maps `Ops` to the function of the inputs, with exact=True to that for float64 without autocast.
        Inputs, and gradients of the outputs, are by name; gradients of inputs `behind_relu` pass a ReLU.
        """
        if not self.has_time(case):
            return
        fused = Provider("fused", operation(FUSED), tuple(inputs.values()), tuple(d_outputs.values()))
        plain = fused._replace(name="eager", function=operation(REFERENCE))
        exact = fused.in_float64(operation(REFERENCE, exact=True))
        names = [*d_outputs, *(f"d_{name}" for name in inputs)]
        flipped = [f"d_{name}" for name in behind_relu]
        is_right = self.check(case, names, fused=fused, plain=plain, exact=exact, behind_relu=flipped)
        if is_timed:
            # Specialised for each shape.
            compiled = plain._replace(name="compiled", function=torch.compile(plain.function, dynamic=False))
            baselines = [plain, compiled]
            self.measure(case, [fused, *baselines] if is_right else baselines)

    def measure(self, case: Case, providers: Sequence[Provider], passes: Sequence[str] = PASSES) -> None:
        """Time all providers pass by pass; one that has raised, in this run or an earlier one, is not timed again."""
        if torch.cuda.is_available():
            # Dynamo silently falls back to eager after eight recompilations of one function (its recompile limit).
            torch.compiler.reset()
        included = [provider for provider in providers if not any(name in provider.name for name in self.excluded)]
        for pass_ in passes:
            if self.is_measured(case, pass_):
                continue
            failures = self.failures(case)
            functions = {each.name: each.timed_pass(pass_) for each in included if each.name not in failures}
            self.record_timings(case, pass_, timing.compare(functions, budget=self.budget))

    def record_timings(self, case: Case, pass_: str, results: dict[str, timing.Timing | Failure]) -> None:
        """Record for each provider either its times and its share of the floor, or its failure.

        Then raise UnusableGpuError if a failure left the GPU unusable.
        """
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
        if any(isinstance(result, Failure) for result in results.values()):
            device.check_usable()

    def check(
        self,
        case: Case,
        names: Sequence[str],
        *,
        fused: Provider,
        plain: Provider,
        exact: Provider,
        behind_relu: Collection[str] = (),
    ) -> bool:
        """Run the fused operation twice, record its errors and the plain operation's, and return whether it is right.

        The bits of both runs must be equal. The error of each tensor relative to `exact`, the reference in float64, may
        not exceed rounding and twice the plain operation's; for gradients `behind_relu`, its largest error of any
        tensor. Otherwise, or if a provider raises, a failure is recorded, and the run continues if the GPU is still
        usable. Memory that the operation does not write is NaN. Names are of outputs, then of gradients.
        """
        error_case = Case(f"{case.what} error", case.shape, case.dtype)
        if self.is_measured(error_case):
            return not any(record.failure for record in self.records if record.group == error_case.group())
        exact_runs = self._runs(error_case, exact)
        plain_runs = exact_runs and self._runs(error_case, plain)
        with poisoned_memory():
            fused_runs = plain_runs and self._runs(error_case, fused, 2)
        if not (exact_runs and plain_runs and fused_runs):
            return False
        (expected,), (actual, again) = exact_runs, fused_runs
        limits = dict(zip(names, map(relative_error, plain_runs[0], expected), strict=True))
        errors = dict(zip(names, map(relative_error, actual, expected), strict=True))
        accepted = {name: max(2 * limits[name], ROUNDING_ERROR[case.dtype]) for name in names}
        # Where rounding turns a ReLU off or on, gradients differ more than 2 x plain by chance.
        accepted |= {name: max(accepted[name], *limits.values()) for name in behind_relu}
        # The negated comparison is also true for NaN.
        wrong = [f"{name} {errors[name]:.1e}" for name in names if not errors[name] <= accepted[name]]
        wrong += [
            f"bits of {name} differ" for name, *pair in zip(names, actual, again, strict=True) if not torch.equal(*pair)
        ]
        message = f"{case}: {', '.join(wrong)}; plain {max(limits.values()):.1e} at most" if wrong else None
        self.record(error_case, fused.name, figures=errors, failure=message)
        self.record(error_case, "plain", figures=limits)
        self.wrong += [message] if message else []
        return not wrong

    def _runs(self, case: Case, provider: Provider, repeats: int = 1) -> list[list[Tensor]]:
        """Return outputs and gradients of each run of a provider; if one raises, record the failure and return []."""
        try:
            runs = [provider.outputs_and_gradients() for _ in range(repeats)]
            # An illegal access is raised here and not by the first computation on the results.
            device.synchronize()
        except Exception as error:
            self.record_failure(case, provider.name, error)
            return []
        return runs


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill tensors with NaN when they are allocated."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # PyTorch fills memory in its deterministic mode only.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ||actual - expected|| / ||expected||, computed in float64."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))
