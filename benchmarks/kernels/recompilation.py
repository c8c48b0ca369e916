"""Attention when each call has a new length, as random masks cause it: which providers recompile or plan again."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from triton import knobs

from benchmarks.harness import timing
from benchmarks.harness.providers import Provider
from benchmarks.harness.records import BOTH
from benchmarks.harness.session import Case, Session
from benchmarks.kernels.attention_baselines import NUM_HEADS, SDPA, Attend, attend_dense, random_inputs, with_backend
from iwm_fast.kernels.ops import FUSED, REFERENCE

NEW_LENGTHS = range(50, 401)
# One length of each bucket of the fused operation's tables.
_WARM_UP_LENGTHS = (64, 128, 200, 256, 400)
_LIMIT_S = 20.0
"""Time limit of one provider's loop: cuDNN builds a new execution plan for each length."""


@contextmanager
def collect_compilations() -> Iterator[list[str]]:
    """Yield a list that collects the names of kernels that Triton compiles or loads from its cache on disk."""
    names: list[str] = []

    def append_name(*, src: Any, **_: object) -> None:
        names.append(src.name)

    with knobs.compilation.scope():
        # The hooks of triton.jit would fail here: they serialise constants as JSON, and some are tuples.
        knobs.compilation.listener = append_name
        yield names


def measure_new_lengths(
    session: Session, images: int, count: int, head_dim: int = 32, num_heads: int = NUM_HEADS
) -> None:
    """Time forward and backward of `count` calls of random lengths, host and device together.

    Before that each provider is called with one length of each bucket of the fused operation's tables.
    """
    shape = {"N": f"{NEW_LENGTHS[0]}-{NEW_LENGTHS[-1]}", "d": head_dim, "H": num_heads}
    case = Case("new lengths", shape | {"B": images, "calls": count})
    lengths = random.Random(1).choices(NEW_LENGTHS, k=count)
    providers = {
        "fused": FUSED.ragged_attention,
        "eager": REFERENCE.ragged_attention,
        **{name: with_backend(backend, attend_dense) for name, backend in SDPA.items()},
    }
    for name, attend in providers.items():
        if not session.has_time(f"{case} {name}"):
            continue
        call = partial(_time_call, attend, images, heads=(num_heads, head_dim), device=session.device)
        try:
            first = [call(length) for length in _WARM_UP_LENGTHS]
            with collect_compilations() as compilations:
                times = _time_calls(call, lengths)
        except Exception as error:
            session.record_failure(case, name, error, BOTH)
            continue
        figures = {"mean_ms": sum(times) / len(times), "longest_ms": max(times), "first_calls_ms": sum(first)}
        figures |= {"calls": len(times), "compilations": len(compilations)}
        values = timing.summarize([(time_ms, time_ms) for time_ms in times])._asdict()
        session.record(case, name, BOTH, figures=figures, **values)


def _time_calls(call: Callable[[int], float], lengths: list[int]) -> list[float]:
    times: list[float] = []
    for length in lengths:
        times.append(call(length))
        if sum(times) > 1e3 * _LIMIT_S and len(times) > 1:
            break
    return times


def _time_call(attend: Attend, images: int, length: int, *, heads: tuple[int, int], device: str) -> float:
    """Return the milliseconds of one forward and backward, until the device is idle."""
    qkv, d_out = random_inputs(images * length, *heads, device)
    provider = Provider("", lambda tensor: attend(tensor, None, length), (qkv,), (d_out,))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    provider.gradients(provider.outputs())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)
