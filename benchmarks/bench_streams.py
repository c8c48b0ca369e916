"""Reading, decoding, cropping and two views: images per second of each stage, beside who else does it."""

from benchmarks import pipeline_checks, pipeline_peers, turns
from benchmarks.bench_action_log import logged_stream
from benchmarks.pipeline_names import (
    COLD,
    CROP,
    DALI_READER,
    DECODE,
    LIBRARY_READER,
    LOGGED,
    OURS,
    PEER,
    READ,
    SAME_VIEWS,
    TWIN,
    VIEWS,
    WARM,
)
from benchmarks.pipeline_peers import STYLES
from benchmarks.pipeline_shards import drop_from_memory, read_into_memory
from benchmarks.pipeline_streams import Workload, loader_stream, reader_stream, stage_stream
from benchmarks.session import Case, Session
from benchmarks.turns import Stream
from pipelines.shards import find_shards

WARM_SHARE, COLD_SHARE = 0.5, 0.3
"""Of the time that is left when they begin."""

Name = tuple[str, str]
"""Task and provider."""


def run(session: Session, workload: Workload) -> None:
    """Check that all do the same work, then time them from memory, and readers and the whole line from the disk."""
    read_into_memory(workload.pattern)
    streams = warm_streams(workload)
    check(session, workload, streams)
    if session.has_time("streams from memory"):
        found = turns.compare(streams, workload.turns, deadline=session.deadline_of(WARM_SHARE))
        for (task, provider), result in found.items():
            turns.note(session, Case(task, {"from": WARM, **workload.shape}), provider, result)
    if session.has_time("streams from the disk"):
        measure_cold(session, workload, streams)


def warm_streams(workload: Workload) -> dict[Name, Stream]:
    """Return everything that is compared."""
    streams = {
        (READ, OURS): reader_stream(workload),
        (READ, DALI_READER): pipeline_peers.dali_reader_stream(workload),
        (READ, LIBRARY_READER): pipeline_peers.library_reader_stream(workload),
        (DECODE, OURS): stage_stream(workload, "decode"),
        (CROP, OURS): stage_stream(workload, "crop"),
        (VIEWS, OURS): loader_stream(workload),
        (VIEWS, LOGGED): logged_stream(workload),
        (VIEWS, TWIN): loader_stream(workload, "torch"),
    }
    return streams | {(VIEWS, f"{PEER}, {style}"): pipeline_peers.peer_stream(workload, style) for style in STYLES}


def check(session: Session, workload: Workload, streams: dict[Name, Stream]) -> None:
    """Refuse to time streams that do not do the same work.

    Raises:
        WrongResultError: naming the one that does not.
    """
    readers = {provider: stream for (task, provider), stream in streams.items() if task == READ}
    pipeline_checks.check_readers(readers, workload.shards.num_samples)
    pipeline_checks.check_stage("decode", streams[DECODE, OURS], workload)
    pipeline_checks.check_stage("crop", streams[CROP, OURS], workload)
    ours, twin = (pipeline_checks.first_batch(streams[VIEWS, provider]) for provider in (OURS, TWIN))
    session.note(Case(SAME_VIEWS, workload.shape), OURS, figures=pipeline_checks.check_views(ours, twin))
    for (task, provider), stream in streams.items():
        if task == VIEWS:
            pipeline_checks.check_shapes(stream, provider, workload)


def measure_cold(session: Session, workload: Workload, streams: dict[Name, Stream]) -> None:
    """Time readers and our whole line over shards of which the kernel holds nothing; a turn is one epoch at most."""
    names = [(READ, OURS), (READ, DALI_READER), (READ, LIBRARY_READER), (VIEWS, OURS)]
    paths = find_shards(workload.pattern)
    left: list[float] = []
    found = turns.compare(
        {name: streams[name] for name in names},
        workload.turns,
        prepare=lambda: left.append(drop_from_memory(paths)),
        most_batches=workload.shards.num_samples // workload.batch_size,
        deadline=session.deadline_of(COLD_SHARE),
    )
    for (task, provider), result in found.items():
        shape = {"from": COLD, **workload.shape}
        turns.note(session, Case(task, shape), provider, result, share_left_in_memory=round(max(left), 4))
