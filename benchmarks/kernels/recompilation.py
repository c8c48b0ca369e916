"""Attention when every call has another length, as masks make them: who compiles, plans or waits anew."""

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
from benchmarks.kernels.attention_baselines import NUM_HEADS, SDPA, Attend, attend_dense, by, inputs
from iwm_fast.kernels.ops import FUSED, REFERENCE

NEW_LENGTHS = range(50, 401)
# one of every group of lengths that the fused tables know
_SEEN = (64, 128, 200, 256, 400)
_LIMIT_S = 20.0
"""For one provider's loop; cuDNN plans anew for each length."""


@contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """Collect the names of what Triton compiles, kernels read back from its cache on disk included."""
    found: list[str] = []

    def count(*, src: Any, **_: object) -> None:
        found.append(src.name)

    with knobs.compilation.scope():
        # and not a hook of the jit: those write the constants as JSON, which tuples of constants cannot be
        knobs.compilation.listener = count
        yield found


def new_lengths(session: Session, images: int, count: int, head_dim: int = 32, num_heads: int = NUM_HEADS) -> None:
    """Time forward and backward when every call has another length, as masks make them; host and device together.

    Before it each provider has seen one length of every group that the fused tables know.
    """
    shape = {"N": f"{NEW_LENGTHS[0]}-{NEW_LENGTHS[-1]}", "d": head_dim, "H": num_heads}
    case = Case("new lengths", shape | {"B": images, "calls": count})
    lengths = random.Random(1).choices(NEW_LENGTHS, k=count)
    providers = {
        "fused": FUSED.ragged_attention,
        "eager": REFERENCE.ragged_attention,
        **{name: by(backend, attend_dense) for name, backend in SDPA.items()},
    }
    for name, attend in providers.items():
        if not session.has_time(f"{case} {name}"):
            continue
        call = partial(_timed_call, attend, images, heads=(num_heads, head_dim), device=session.device)
        try:
            first = [call(length) for length in _SEEN]
            with counted_compilations() as compilations:
                times = _loop(call, lengths)
        except Exception as error:
            session.note_failure(case, name, error, BOTH)
            continue
        figures = {"mean_ms": sum(times) / len(times), "longest_ms": max(times), "first_calls_ms": sum(first)}
        figures |= {"calls": len(times), "compilations": len(compilations)}
        values = timing.summarize([(spent, spent) for spent in times])._asdict()
        session.note(case, name, BOTH, figures=figures, **values)


def _loop(call: Callable[[int], float], lengths: list[int]) -> list[float]:
    times: list[float] = []
    for length in lengths:
        times.append(call(length))
        if sum(times) > 1e3 * _LIMIT_S and len(times) > 1:
            break
    return times


def _timed_call(attend: Attend, images: int, length: int, *, heads: tuple[int, int], device: str) -> float:
    """Return milliseconds until the device is done."""
    qkv, d_out = inputs(images * length, *heads, device)
    one = Provider("", lambda tensor: attend(tensor, None, length), (qkv,), (d_out,))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    one.gradients(one.outputs())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)
