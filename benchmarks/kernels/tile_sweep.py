"""Tune the static tables of attention: time candidates beside the shipped launches.

A candidate is a launch that the operation's host functions build from another `ShortConfig` or `TileConfig`. All
candidates are compiled first, on all cores. One that spills, does not fit or computes a wrong result is not timed.
"""

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from benchmarks.harness import tables, timing
from benchmarks.harness.records import BACKWARD, FORWARD, Record
from benchmarks.harness.session import ROUNDING_ERROR, Case, Session, relative_error
from benchmarks.kernels.attention_baselines import random_inputs
from iwm_fast.kernels.attention import flash, short
from iwm_fast.kernels.attention.flash import FlashConfig, TileConfig
from iwm_fast.kernels.attention.op import backward_launches, forward_launches
from iwm_fast.kernels.attention.packed import PackedQKV
from iwm_fast.kernels.attention.short import ShortConfig
from iwm_fast.kernels.launch import (
    IS_INTERPRETING,
    Launch,
    architecture,
    as_constexpr,
    power_of_two_tiles,
    upcast_for_interpreter,
)

SHORT_LENGTHS = (196, 256, 212)
TILED_LENGTHS = (400, 320)
HEAD_DIMS = (64, 32)
TILES = [TileConfig(*sizes) for sizes in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3))]
"""Candidates for long sequences."""
SHIPPED = "shipped"
_TILED_KERNELS = {"forward": FORWARD, "d_query": BACKWARD, "d_key": BACKWARD}


class Buffers(NamedTuple):
    """The tensors of one problem."""

    packed: PackedQKV
    out: Tensor
    lse: Tensor
    d_out: Tensor
    d_qkv: Tensor

    @property
    def backward(self) -> dict[str, Tensor]:
        """Keyword arguments of a backward launch."""
        return {"out": self.out, "lse": self.lse, "d_out": self.d_out, "d_qkv": self.d_qkv}


def run(session: Session) -> None:
    """Time all candidates for the lengths that matter most, and for long sequences."""
    for head_dim, length in itertools.product(HEAD_DIMS, SHORT_LENGTHS[:1] if session.quick else SHORT_LENGTHS):
        for pass_ in (BACKWARD, FORWARD):
            sweep(session, length, head_dim, "whole", pass_)
    for head_dim, length in itertools.product(HEAD_DIMS, () if session.quick else TILED_LENGTHS):
        for kernel, pass_ in _TILED_KERNELS.items():
            sweep(session, length, head_dim, kernel, pass_)


def sweep(session: Session, length: int, head_dim: int, kernel: str, pass_: str, *, images: int = 256) -> None:
    """Time candidates for one length and kernel: "whole" for short sequences, or one of `_TILED_KERNELS`."""
    case = Case("attention sweep", {"N": length, "d": head_dim, "H": 12, "B": images, "kernel": kernel})
    if not session.has_time(f"{case} {pass_}"):
        return
    buffers = prepare_buffers(images, length, (12, head_dim), session.device)
    if kernel == "whole":
        candidates = {name_config(config): short_launch(config, pass_, buffers) for config in candidate_configs(length)}
        shipped = shipped_launches(pass_, buffers)
    else:
        config = flash.choose_config(architecture(buffers.out.device), buffers.packed)
        d_query = tiled_launch(config.d_query, "d_query", buffers)
        # The d_key kernel reads the row sums ("delta") that the d_query kernel writes.
        d_query.run()
        shared = {} if kernel == "forward" else {"delta_ptr": d_query.arguments["delta_ptr"]}
        candidates = {name_tiles(tiles): tiled_launch(tiles, kernel, buffers, shared) for tiles in TILES}
        shipped = [tiled_launch(getattr(config, kernel), kernel, buffers, shared)]
    time_launches(session, case, pass_, candidates, shipped, buffers=buffers)


def candidate_configs(length: int) -> list[ShortConfig]:
    """Return configs for one length: all combinations of key splits, queries per tile, warps and stages."""
    splits = dict.fromkeys(
        (
            power_of_two_tiles(length, 16),
            power_of_two_tiles(length, 64),
            (128, 64, 64),
            (256,),
            (128, 128),
            (64,) * triton.cdiv(length, 64),
        )
    )
    return [ShortConfig((split,), *rest) for split, *rest in itertools.product(splits, (32, 64), (4, 8), (1, 2, 3))]


def name_config(config: ShortConfig) -> str:
    """Return the name of a config in the tables."""
    split = "+".join(map(str, config.key_splits[-1]))
    return f"{split} q{config.num_queries} w{config.num_warps} s{config.num_stages}"


def name_tiles(tiles: TileConfig) -> str:
    """Return the name of tiles in the tables."""
    return f"{tiles.block_m}x{tiles.block_n} w{tiles.num_warps} s{tiles.num_stages}"


def prepare_buffers(images: int, length: int, heads: tuple[int, int], device: str) -> Buffers:
    """Return random inputs, with the outputs of the shipped forward launches."""
    qkv, d_out = random_inputs(images * length, *heads, device)
    qkv, d_out = upcast_for_interpreter(qkv.detach()), upcast_for_interpreter(d_out)
    out, lse = torch.empty_like(d_out), torch.empty(heads[0], images * length, device=device)
    buffers = Buffers(PackedQKV(qkv, None, length), out, lse, d_out, torch.empty_like(qkv))
    for launch in shipped_launches(FORWARD, buffers):
        launch.run()
    return buffers


def shipped_launches(pass_: str, buffers: Buffers) -> list[Launch]:
    """Return the launches of the operation itself."""
    arch = architecture(buffers.out.device)
    if pass_ == FORWARD:
        return forward_launches(arch, buffers.packed, buffers.out, buffers.lse)
    return backward_launches(arch, buffers.packed, **buffers.backward)


def short_launch(config: ShortConfig, pass_: str, buffers: Buffers) -> Launch:
    """Return the launch of a pass for sequences that fit into a config."""
    if pass_ == FORWARD:
        return short.forward_launches((config,), buffers.packed, buffers.out, buffers.lse)[0]
    return short.backward_launches((config,), buffers.packed, buffers.d_out, buffers.d_qkv, buffers.lse)[0]


def tiled_launch(tiles: TileConfig, kernel: str, buffers: Buffers, shared: dict[str, Any] | None = None) -> Launch:
    """Return the launch of a tiled kernel, with arguments that it shares with other launches."""
    config = FlashConfig(tiles, tiles, tiles)
    if kernel == "forward":
        launch = flash.forward_launch(config, buffers.packed, 0, out=buffers.out, lse=buffers.lse)
    else:
        launch = flash.backward_launches(config, buffers.packed, 0, **buffers.backward)[kernel == "d_key"]
    return launch._replace(arguments=launch.arguments | (shared or {}))


def time_launches(
    session: Session, case: Case, pass_: str, candidates: dict[str, Launch], shipped: list[Launch], *, buffers: Buffers
) -> None:
    """Time candidates beside the shipped launches, all on the same tensors."""
    compile_all([*candidates.values(), *shipped])
    expected = _run_launches(shipped, pass_, buffers)
    functions = {SHIPPED: timing.TimedFunction(lambda _: [launch.run() for launch in shipped])}
    for name, launch in candidates.items():
        try:
            if spills(launch):
                session.record(case, name, pass_, failure="spills")
                continue
            actual = _run_launches([launch], pass_, buffers)
        except Exception as error:
            session.record_failure(case, name, error, pass_)
            continue
        error = relative_error(actual, expected)
        # The negated comparison is also true for NaN.
        if not error <= ROUNDING_ERROR:
            session.record(case, name, pass_, failure=f"differs from the shipped launches by {error:.1e}")
            continue
        functions[name] = timing.TimedFunction(lambda _, launch=launch: launch.run())
    session.record_timings(case, pass_, timing.compare(functions, budget=session.budget))


def _run_launches(launches: Sequence[Launch], pass_: str, buffers: Buffers) -> Tensor:
    """Run launches and return a copy of the output or gradient, with zeros where they write nothing."""
    target = buffers.out if pass_ == FORWARD else buffers.d_qkv
    target.fill_(float("nan"))
    for launch in launches:
        launch.run()
    # A backward kernel writes only its own entries of the gradient, those of the queries or of the keys and values.
    return target.nan_to_num()


def compile_all(launches: Sequence[Launch]) -> None:
    """Compile launches on all cores; one that does not compile raises later, when it runs."""
    if IS_INTERPRETING:
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for launch in launches:
            compile_launch(launch)


def compile_launch(launch: Launch) -> Any:
    """Return the compiled kernel of a launch without running it."""
    return launch.kernel.warmup(
        **launch.arguments, **as_constexpr(launch.constants), **launch.options, grid=launch.grid
    )


def spills(launch: Launch) -> bool:
    """Return whether the compiled kernel spills registers; loads the kernel."""
    if IS_INTERPRETING:
        return False
    kernel = compile_launch(launch)
    # Triton sets n_spills only when it loads the kernel onto the device.
    kernel._init_handles()
    return kernel.n_spills > 0


def table(records: Sequence[Record]) -> str:
    """Return a table of the three fastest candidates beside the shipped launches."""
    by_problem: dict[Any, dict[str, float]] = {}
    for record in records:
        times_ms = by_problem.setdefault((tables.describe(record.shape), record.pass_), {})
        if record.median_ms is not None:
            times_ms[record.provider] = record.median_ms
    rows = []
    for (shape, pass_), times_ms in by_problem.items():
        fastest = sorted((ms, name) for name, ms in times_ms.items() if name != SHIPPED)[:3]
        cells = [f"{ms:.3f}: {name}" for ms, name in fastest]
        rows.append([shape, pass_, f"{times_ms.get(SHIPPED, float('nan')):.3f}", *cells, *[""] * (3 - len(cells))])
    return tables.table(["shape", "pass", SHIPPED, "best", "second", "third"], rows)
