"""Reading, decoding, cropping and two views: images per second of each stage, beside who else does it."""

from benchmarks.harness import interleave
from benchmarks.harness.interleave import Stream
from benchmarks.harness.photograph_shards import drop_from_memory, read_into_memory
from benchmarks.harness.session import Case, Session
from benchmarks.pipelines import baselines, checks, report
from benchmarks.pipelines.action_log import logged_stream
from benchmarks.pipelines.baselines import STYLES
from benchmarks.pipelines.streams import Workload, loader_stream, reader_stream, stage_stream
from iwm_fast.pipelines.storage.shard_set import find_shards

WARM_SHARE, COLD_SHARE, SWEEP_SHARE = 0.5, 0.3, 0.5
"""Of the time that is left when they begin."""
DECODER_LOADS = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)

Name = tuple[str, str]
"""Task and provider."""


def run(session: Session, workload: Workload) -> None:
    """Check that all do the same work, then time them from memory, and readers and the whole line from the disk."""
    read_into_memory(workload.pattern)
    streams = warm_streams(workload)
    check(session, workload, streams)
    if session.has_time("streams from memory"):
        found = interleave.compare(streams, workload.turns, deadline=session.deadline_of(WARM_SHARE))
        for (task, provider), result in found.items():
            interleave.note(session, Case(task, {"from": report.WARM, **workload.shape}), provider, result)
    if session.has_time("streams from the disk"):
        measure_cold(session, workload, streams)


def warm_streams(workload: Workload) -> dict[Name, Stream]:
    """Return everything that is compared."""
    streams = {
        (report.READ, report.OURS): reader_stream(workload),
        (report.READ, report.DALI_READER): baselines.dali_reader_stream(workload),
        (report.READ, report.LIBRARY_READER): baselines.library_reader_stream(workload),
        (report.DECODE, report.OURS): stage_stream(workload, "decode"),
        (report.CROP, report.OURS): stage_stream(workload, "crop"),
        (report.VIEWS, report.OURS): loader_stream(workload),
        (report.VIEWS, report.LOGGED): logged_stream(workload),
        (report.VIEWS, report.TWIN): loader_stream(workload, "torch"),
    }
    peers = {(report.VIEWS, f"{report.PEER}, {style}"): baselines.peer_stream(workload, style) for style in STYLES}
    return streams | peers


def check(session: Session, workload: Workload, streams: dict[Name, Stream]) -> None:
    """Refuse to time streams that do not do the same work.

    Raises:
        WrongResultError: naming the one that does not.
    """
    readers = {provider: stream for (task, provider), stream in streams.items() if task == report.READ}
    checks.check_readers(readers, workload.shards.num_samples)
    checks.check_stage("decode", streams[report.DECODE, report.OURS], workload)
    checks.check_stage("crop", streams[report.CROP, report.OURS], workload)
    ours, twin = (checks.first_batch(streams[report.VIEWS, provider]) for provider in (report.OURS, report.TWIN))
    session.note(Case(report.SAME_VIEWS, workload.shape), report.OURS, figures=checks.check_views(ours, twin))
    for (task, provider), stream in streams.items():
        if task == report.VIEWS:
            checks.check_shapes(stream, provider, workload)


def measure_cold(session: Session, workload: Workload, streams: dict[Name, Stream]) -> None:
    """Time readers and our whole line over shards of which the kernel holds nothing; a turn is one epoch at most."""
    names = [name for name in streams if name[0] == report.READ] + [(report.VIEWS, report.OURS)]
    paths = find_shards(workload.pattern)
    left: list[float] = []
    found = interleave.compare(
        {name: streams[name] for name in names},
        workload.turns,
        prepare=lambda: left.append(drop_from_memory(paths)),
        most_batches=workload.shards.num_samples // workload.batch_size,
        deadline=session.deadline_of(COLD_SHARE),
    )
    for (task, provider), result in found.items():
        shape = {"from": report.COLD, **workload.shape}
        interleave.note(session, Case(task, shape), provider, result, share_left_in_memory=round(max(left), 4))


def sweep_decoder(session: Session, workload: Workload) -> None:
    """On a GPU, time our loader with each number of threads and each share of the JPEGs for its own decoder."""
    if workload.device.type != "cuda":
        session.left_out.append("decoder sweep (there is no GPU here)")
        return
    cores, turns = workload.threads, workload.turns
    streams = {
        (threads, load): loader_stream(workload, loader_threads=threads, hw_decoder_load=load)
        for threads in sorted({max(cores // 2, 1), cores, 2 * cores})
        for load in DECODER_LOADS
    }
    # many settings: a little of each
    few = turns._replace(rounds=min(turns.rounds, 2), seconds=min(turns.seconds, 3.0))
    found = interleave.compare(streams, few, deadline=session.deadline_of(SWEEP_SHARE))
    for (threads, load), result in found.items():
        shape = workload.shape | {"threads": threads, "hw_decoder_load": str(load)}
        interleave.note(session, Case(report.SWEEP, shape), report.OURS, result)
