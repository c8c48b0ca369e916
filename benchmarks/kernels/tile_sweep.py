"""Other settings of the attention tables, timed beside the shipped ones: how the static tables are tuned.

Every candidate is one launch that the operation's own host functions make from another Group or other Tiles. It is
compiled beforehand, on all cores; what spills, does not fit or gives another result than the shipped setting drops out.
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
from benchmarks.harness.session import ROUNDING, Case, Session, relative_error
from benchmarks.kernels.attention_baselines import inputs
from iwm_fast.kernels.attention import flash, short
from iwm_fast.kernels.attention.flash import Cut, Tiles
from iwm_fast.kernels.attention.op import backward_launches, forward_launches
from iwm_fast.kernels.attention.packed import Packed
from iwm_fast.kernels.attention.short import Group
from iwm_fast.kernels.launch import IS_INTERPRETING, Launch, architecture, compilable, interpretable, power_of_two_tiles

WHOLE_LENGTHS = (196, 256, 212)
TILED_LENGTHS = (400, 320)
HEAD_DIMS = (64, 32)
TILES = [Tiles(*sizes) for sizes in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3))]
"""Settings for long sequences."""
SHIPPED = "shipped"
_PARTS = {"forward": FORWARD, "d_query": BACKWARD, "d_key": BACKWARD}


class Buffers(NamedTuple):
    """The tensors of one task."""

    packed: Packed
    out: Tensor
    lse: Tensor
    d_out: Tensor
    d_qkv: Tensor

    @property
    def backward(self) -> dict[str, Tensor]:
        """What a backward launch takes."""
        return {"out": self.out, "lse": self.lse, "d_out": self.d_out, "d_qkv": self.d_qkv}


def run(session: Session) -> None:
    """Time every candidate for the lengths that matter most, and for long sequences."""
    for head_dim, length in itertools.product(HEAD_DIMS, WHOLE_LENGTHS[:1] if session.is_quick else WHOLE_LENGTHS):
        for pass_ in (BACKWARD, FORWARD):
            sweep(session, length, head_dim, "whole", pass_)
    for head_dim, length in itertools.product(HEAD_DIMS, () if session.is_quick else TILED_LENGTHS):
        for part, pass_ in _PARTS.items():
            sweep(session, length, head_dim, part, pass_)


def sweep(session: Session, length: int, head_dim: int, kernel: str, pass_: str, *, images: int = 256) -> None:
    """Time settings for one length: of the kernel for whole sequences, or of one of those for tiles."""
    case = Case("attention sweep", {"N": length, "d": head_dim, "H": 12, "B": images, "kernel": kernel})
    if not session.has_time(f"{case} {pass_}"):
        return
    buffers = prepared(images, length, (12, head_dim), session.device)
    if kernel == "whole":
        candidates = {name_group(group): whole_launch(group, pass_, buffers) for group in groups(length)}
        usual = shipped(pass_, buffers)
    else:
        cut = flash.cut_for(architecture(buffers.out.device), buffers.packed)
        first = tiled_launch(cut.d_query, "d_query", buffers)
        # the second kernel backward reads what the first one writes
        first.run()
        shared = {} if kernel == "forward" else {"delta_ptr": first.arguments["delta_ptr"]}
        candidates = {name_tiles(tiles): tiled_launch(tiles, kernel, buffers, shared) for tiles in TILES}
        usual = [tiled_launch(getattr(cut, kernel), kernel, buffers, shared)]
    time_launches(session, case, pass_, candidates, usual, buffers=buffers)


def groups(length: int) -> list[Group]:
    """Return settings for one length: splits of the keys, queries of a tile, warps, stages."""
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
    return [Group((split,), *rest) for split, *rest in itertools.product(splits, (32, 64), (4, 8), (1, 2, 3))]


def name_group(group: Group) -> str:
    """Return a group's name in the tables."""
    split = "+".join(map(str, group.key_splits[-1]))
    return f"{split} q{group.num_queries} w{group.num_warps} s{group.num_stages}"


def name_tiles(tiles: Tiles) -> str:
    """Return tiles' name in the tables."""
    return f"{tiles.block_m}x{tiles.block_n} w{tiles.num_warps} s{tiles.num_stages}"


def prepared(images: int, length: int, heads: tuple[int, int], device: str) -> Buffers:
    """Return tensors, those that forward fills filled by the shipped setting."""
    qkv, d_out = inputs(images * length, *heads, device)
    qkv, d_out = interpretable(qkv.detach()), interpretable(d_out)
    out, lse = torch.empty_like(d_out), torch.empty(heads[0], images * length, device=device)
    buffers = Buffers(Packed(qkv, None, length), out, lse, d_out, torch.empty_like(qkv))
    for launch in shipped(FORWARD, buffers):
        launch.run()
    return buffers


def shipped(pass_: str, buffers: Buffers) -> list[Launch]:
    """Return what the operation starts."""
    arch = architecture(buffers.out.device)
    if pass_ == FORWARD:
        return forward_launches(arch, buffers.packed, buffers.out, buffers.lse)
    return backward_launches(arch, buffers.packed, **buffers.backward)


def whole_launch(group: Group, pass_: str, buffers: Buffers) -> Launch:
    """Return a pass over sequences that a group holds."""
    if pass_ == FORWARD:
        return short.forward_launches((group,), buffers.packed, buffers.out, buffers.lse)[0]
    return short.backward_launches((group,), buffers.packed, buffers.d_out, buffers.d_qkv, buffers.lse)[0]


def tiled_launch(tiles: Tiles, part: str, buffers: Buffers, shared: dict[str, Any] | None = None) -> Launch:
    """Return one kernel over sequences of any length, with arguments that it shares with others."""
    cut = Cut(tiles, tiles, tiles)
    if part == "forward":
        launch = flash.forward_launch(cut, buffers.packed, 0, out=buffers.out, lse=buffers.lse)
    else:
        launch = flash.backward_launches(cut, buffers.packed, 0, **buffers.backward)[part == "d_key"]
    return launch._replace(arguments=launch.arguments | (shared or {}))


def time_launches(
    session: Session,
    case: Case,
    pass_: str,
    candidates: dict[str, Launch],
    usual: list[Launch],
    *,
    buffers: Buffers,
) -> None:
    """Time candidates beside what is usually started, all on the same tensors."""
    compile_all([*candidates.values(), *usual])
    wanted = _result(usual, pass_, buffers)
    works = {SHIPPED: timing.Work(lambda _: [launch.run() for launch in usual])}
    for name, launch in candidates.items():
        try:
            if spills(launch):
                session.note(case, name, pass_, failure="spills")
                continue
            got = _result([launch], pass_, buffers)
        except Exception as error:
            session.note_failure(case, name, error, pass_)
            continue
        error = relative_error(got, wanted)
        if not error <= ROUNDING:
            session.note(case, name, pass_, failure=f"differs from the shipped setting by {error:.1e}")
            continue
        works[name] = timing.Work(lambda _, launch=launch: launch.run())
    session.note_timings(case, pass_, timing.compare(works, effort=session.effort))


def _result(launches: Sequence[Launch], pass_: str, buffers: Buffers) -> Tensor:
    """Return what launches write, and nothing that was there before."""
    target = buffers.out if pass_ == FORWARD else buffers.d_qkv
    target.fill_(float("nan"))
    for launch in launches:
        launch.run()
    # one kernel of two writes its part of the gradient only
    return target.nan_to_num()


def compile_all(launches: Sequence[Launch]) -> None:
    """Compile on all cores; what does not compile says so when it is started."""
    if IS_INTERPRETING:
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for launch in launches:
            warmed(launch)


def warmed(launch: Launch) -> Any:
    """Return the compiled kernel without starting it."""
    return launch.kernel.warmup(**launch.arguments, **compilable(launch.constants), **launch.options, grid=launch.grid)


def spills(launch: Launch) -> bool:
    """Return whether registers do not hold everything; loads the kernel."""
    if IS_INTERPRETING:
        return False
    kernel = warmed(launch)
    kernel._init_handles()
    return kernel.n_spills > 0


def table(records: Sequence[Record]) -> str:
    """Return the best settings beside the shipped ones."""
    tasks: dict[Any, dict[str, float]] = {}
    for record in records:
        found = tasks.setdefault((tables.describe(record.shape), record.pass_), {})
        if record.median_ms is not None:
            found[record.provider] = record.median_ms
    rows = []
    for (shape, pass_), found in tasks.items():
        best = sorted((ms, name) for name, ms in found.items() if name != SHIPPED)[:3]
        rows.append(
            [shape, pass_, f"{found.get(SHIPPED, float('nan')):.3f}", *(f"{ms:.3f}: {name}" for ms, name in best)]
        )
    return tables.table(
        ["task", "pass", SHIPPED, "best", "second", "third"], [row + [""] * (6 - len(row)) for row in rows]
    )
