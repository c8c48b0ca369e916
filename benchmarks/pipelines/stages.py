"""Reading, decoding, cropping and rendering two views: CPU time and rate of each stage beside the baselines."""

from benchmarks.harness import interleave
from benchmarks.harness.interleave import Stream
from benchmarks.harness.photograph_shards import evict_from_page_cache, load_into_page_cache
from benchmarks.harness.session import Case, Session
from benchmarks.pipelines import baselines, checks, report
from benchmarks.pipelines.action_log import logged_stream
from benchmarks.pipelines.baselines import STYLES
from benchmarks.pipelines.streams import Workload, loader_stream, reader_stream, stage_stream
from iwm_fast.pipelines.storage.shard_set import find_shards

WARM_SHARE, COLD_SHARE, SWEEP_SHARE = 0.5, 0.3, 0.5
"""Shares of the remaining time that the measurements may use."""
DECODER_LOADS = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)

Name = tuple[str, str]
"""Stage and provider."""


def run(session: Session, workload: Workload) -> None:
    """Check that all streams do the same work; time them from memory, and readers and our loader from the disk."""
    load_into_page_cache(workload.pattern)
    streams = all_streams(workload)
    check(session, workload, streams)
    if session.has_time("streams from memory"):
        results = interleave.compare(streams, workload.budget, deadline=session.deadline_of(WARM_SHARE))
        for (stage, provider), result in results.items():
            interleave.record(session, Case(stage, {"from": report.WARM, **workload.shape}), provider, result)
    if session.has_time("streams from the disk"):
        measure_cold(session, workload, streams)


def all_streams(workload: Workload) -> dict[Name, Stream]:
    """Return all streams that are compared, by stage and provider."""
    streams = {
        (report.READ, report.OURS): reader_stream(workload),
        (report.READ, report.DALI_READER): baselines.dali_reader_stream(workload),
        (report.READ, report.WEBDATASET_READER): baselines.webdataset_reader_stream(workload),
        (report.DECODE, report.OURS): stage_stream(workload, "decode"),
        (report.CROP, report.OURS): stage_stream(workload, "crop"),
        (report.VIEWS, report.OURS): loader_stream(workload),
        (report.VIEWS, report.LOGGED): logged_stream(workload),
        (report.VIEWS, report.TORCH_LOADER): loader_stream(workload, "torch"),
        (report.VIEWS, report.DALI_VIEWS): baselines.dali_views_stream(workload),
    }
    for style in STYLES:
        streams[report.VIEWS, f"{report.TORCHVISION}, {style}"] = baselines.torchvision_stream(workload, style)
    return streams


def check(session: Session, workload: Workload, streams: dict[Name, Stream]) -> None:
    """Raise WrongResultError unless all streams do the same work."""
    readers = {provider: stream for (stage, provider), stream in streams.items() if stage == report.READ}
    checks.check_readers(readers, workload.shards.num_samples)
    checks.check_stage("decode", streams[report.DECODE, report.OURS], workload)
    checks.check_stage("crop", streams[report.CROP, report.OURS], workload)
    loaders = (report.OURS, report.TORCH_LOADER)
    ours, twin = (checks.first_batch(streams[report.VIEWS, provider]) for provider in loaders)
    session.record(Case(report.SAME_VIEWS, workload.shape), report.OURS, figures=checks.check_views(ours, twin))
    for (stage, provider), stream in streams.items():
        if stage == report.VIEWS:
            checks.check_shapes(stream, provider, workload)


def measure_cold(session: Session, workload: Workload, streams: dict[Name, Stream]) -> None:
    """Time the readers and our loader on shards evicted from the page cache; a round is at most one epoch."""
    names = [name for name in streams if name[0] == report.READ] + [(report.VIEWS, report.OURS)]
    paths = find_shards(workload.pattern)
    cached_shares: list[float] = []
    results = interleave.compare(
        {name: streams[name] for name in names},
        workload.budget,
        prepare=lambda: cached_shares.append(evict_from_page_cache(paths)),
        max_batches=workload.shards.num_samples // workload.batch_size,
        deadline=session.deadline_of(COLD_SHARE),
    )
    share = round(max(cached_shares), 4)
    for (stage, provider), result in results.items():
        shape = {"from": report.COLD, **workload.shape}
        interleave.record(session, Case(stage, shape), provider, result, share_left_in_memory=share)


def sweep_decoder(session: Session, workload: Workload) -> None:
    """On a GPU, time our loader for several numbers of threads and shares of JPEGs for the hardware decoder.

    The threads also decode alone, with runtime.decode=cpu.
    """
    if workload.device.type != "cuda":
        session.skipped.append("decoder sweep (there is no GPU)")
        return
    cores, budget = workload.threads, workload.budget
    streams = {}
    for threads in sorted({max(cores // 2, 1), cores, 2 * cores}):
        for load in DECODER_LOADS:
            streams[threads, str(load)] = loader_stream(workload, loader_threads=threads, hw_decoder_load=load)
        streams[threads, "none, decode=cpu"] = loader_stream(workload, loader_threads=threads, decode="cpu")
    # There are many combinations, so each gets fewer and shorter rounds.
    budget = budget._replace(rounds=min(budget.rounds, 2), seconds=min(budget.seconds, 3.0))
    results = interleave.compare(streams, budget, deadline=session.deadline_of(SWEEP_SHARE))
    for (threads, load), result in results.items():
        shape = workload.shape | {"threads": threads, "hw_decoder_load": load}
        interleave.record(session, Case(report.SWEEP, shape), report.OURS, result)
