"""Time to open as many shards and samples as ImageNet has, with cached indexes."""

import time

from benchmarks.harness.photograph_shards import write_hardlinked_shards
from benchmarks.harness.session import Case, Session, WrongResultError
from benchmarks.harness.timing import percentiles
from benchmarks.pipelines.report import OPENING, OURS
from benchmarks.pipelines.streams import Workload
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards

NUM_SHARDS, SAMPLES_PER_SHARD = 1000, 1281
_REPEATS = 5


def run(
    session: Session, workload: Workload, num_shards: int = NUM_SHARDS, samples_per_shard: int = SAMPLES_PER_SHARD
) -> None:
    """Index the shards once, then open them several times with the cached indexes."""
    folder = write_hardlinked_shards(workload.folder, num_shards, samples_per_shard)
    first_s, shards = _open(folder)
    if shards.num_samples != num_shards * samples_per_shard:
        raise WrongResultError(f"{OPENING}: {shards.num_samples} samples instead of {num_shards * samples_per_shard}")
    times_ms = [1e3 * _open(folder)[0] for _ in range(_REPEATS)]
    begin = time.perf_counter()
    _ = shards.content_digest
    figures = {"first_s": round(first_s, 3), "digest_s": round(time.perf_counter() - begin, 3)}
    case = Case(OPENING, {"shards": num_shards, "samples": shards.num_samples})
    session.record(case, OURS, **percentiles(times_ms), figures=figures)


def _open(folder: str) -> tuple[float, ShardSet]:
    begin = time.perf_counter()
    shards = open_shards(folder)
    return time.perf_counter() - begin, shards
