"""On a GPU: which share of the JPEGs its own decoder should take, with how many threads beside it."""

from benchmarks.harness import interleave
from benchmarks.harness.session import Case, Session
from benchmarks.pipelines.report import OURS, SWEEP
from benchmarks.pipelines.streams import Workload, loader_stream

LOADS = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)
SHARE = 0.5
"""Of the time that is left."""
_MOST_ROUNDS, _MOST_SECONDS = 2, 3.0


def run(session: Session, workload: Workload) -> None:
    """Time our loader with each number of threads and each share."""
    if workload.device.type != "cuda":
        session.left_out.append("decoder sweep (there is no GPU here)")
        return
    cores = workload.threads
    choices = [(threads, load) for threads in sorted({max(cores // 2, 1), cores, 2 * cores}) for load in LOADS]
    streams = {
        (threads, load): loader_stream(workload, loader_threads=threads, hw_decoder_load=load)
        for threads, load in choices
    }
    # many settings: a little of each
    few = workload.turns._replace(
        rounds=min(workload.turns.rounds, _MOST_ROUNDS), seconds=min(workload.turns.seconds, _MOST_SECONDS)
    )
    for (threads, load), result in interleave.compare(streams, few, deadline=session.deadline_of(SHARE)).items():
        shape = workload.shape | {"threads": threads, "hw_decoder_load": str(load)}
        interleave.note(session, Case(SWEEP, shape), OURS, result)
