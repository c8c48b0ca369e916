"""Time frozen features beside the encoder's own forward: `python -m benchmarks.features --help`.

The forward has its batches in memory; an extraction begins with a closed loader and ends with a published file. They
take turns, each over all images, and must say the same bit for bit: another outcome ends the run with status 1.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.features import report
from benchmarks.features.report import FEATURES, FORWARD, POOLED, TOKENS
from benchmarks.harness import cli, interleave, results
from benchmarks.harness.interleave import Turn
from benchmarks.harness.photograph_shards import PhotographShards, read_into_memory
from benchmarks.harness.records import Shape
from benchmarks.harness.session import Case, Session, WrongResultError
from benchmarks.harness.timing import in_turns
from iwm_fast import world_model
from iwm_fast.config.run import EncoderConfig, ModelConfig, RunConfig, RuntimeConfig
from iwm_fast.evals.datasets import Labelled, batches
from iwm_fast.evals.probing.extraction import Kind
from iwm_fast.evals.probing.feature_cache import FeatureCache
from iwm_fast.pipelines.annotations.labels import read_labels
from iwm_fast.pipelines.config import DataConfig, ViewConfig
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.runtime.distributed import single_process
from iwm_fast.training.loaders import EVALUATION_BATCH
from iwm_fast.world_model import WorldModel

PACKAGES = ("nvidia-dali-cuda130", "numpy")
KINDS: dict[str, Kind] = {POOLED: "pooled", TOKENS: "tokens"}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is encoded, and by what."""

    model: WorldModel
    part: Labelled
    shape: Shape


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; return the exit status."""
    options = cli.parser("features", __doc__, KINDS, suffix=results.FEATURES).parse_args(arguments)
    session = cli.open_session(options, PACKAGES, suffix=results.FEATURES)
    if session.device == "cpu":
        # as an evaluation does, so that decoding threads and torch's do not fight for the same cores
        torch.set_num_threads(1)
    kinds: dict[str, Kind] = {name: kind for name, kind in KINDS.items() if options.only in (None, name)}
    workload = build_workload(options.data, session.device, options.quick)
    return cli.run_and_report(
        session, lambda: measure(session, workload, kinds), lambda found: report.sections(found, level="##")
    )


def build_workload(folder: Path, device: str, is_quick: bool) -> Workload:
    """Return an untrained ViT-S/16 and photographs of 500 x 375 pixels, or something tiny; on a GPU more of them."""
    name, size, encoder = "ViT-S/16", 224, EncoderConfig(dim=384, depth=12, num_heads=6)
    photographs = PhotographShards(num_shards=32 if device == "cuda" else 2)
    if is_quick:
        name, size, encoder = "tiny", 32, EncoderConfig(dim=64, depth=2, num_heads=2, patch_size=8)
        photographs = PhotographShards(num_shards=2, samples_per_shard=40, width=80, height=60)
    pattern = photographs.write(folder)
    read_into_memory(pattern)
    config = RunConfig(
        data=DataConfig(train=pattern),
        views=ViewConfig(size=size),
        model=ModelConfig(encoder=encoder),
        runtime=RuntimeConfig(device="cuda" if device == "cuda" else "cpu"),
    )
    shards = open_shards(pattern)
    return Workload(
        model=world_model.untrained(config, device),
        part=Labelled(shards=shards, labels=read_labels(shards, "cls"), samples=np.arange(shards.num_samples)),
        shape={"encoder": name, "view": size, "images": shards.num_samples, "B": EVALUATION_BATCH,
               "photographs": f"{photographs.width}x{photographs.height}", "threads": torch.get_num_threads()},
    )  # fmt: skip


def measure(session: Session, workload: Workload, kinds: dict[str, Kind]) -> None:
    """Let forward and extractions take turns over all images.

    Raises:
        WrongResultError: if an extraction keeps something else than the forward says.
    """
    part = workload.part
    views = [batch.source_view.clone() for batch in batches(workload.model, part.shards, part.samples)]
    works: dict[str, Callable[[], np.ndarray]] = {FORWARD: lambda: forward(workload.model, views, "pooled")}
    for name, kind in kinds.items():
        check(workload, views, name, kind)
        works[name] = lambda kind=kind: extraction(workload, kind)
    taken: dict[str, list[float]] = {name: [] for name in works}
    for name in in_turns(works, 1 if session.is_quick else 3, lambda number: session.has_time(f"round {number}")):
        begin = time.perf_counter()
        works[name]()
        taken[name].append(time.perf_counter() - begin)
    for name, times_s in taken.items():
        over = [100 * (own / base - 1) for own, base in zip(times_s, taken[FORWARD], strict=True)]
        figures = {} if name == FORWARD else {"over_percent": round(statistics.median(over), 2)}
        result = [Turn(len(part.samples), [time_s]) for time_s in times_s]
        interleave.note(session, Case(FEATURES, workload.shape, "float32"), name, result, **figures)


def forward(model: WorldModel, views: list[torch.Tensor], kind: Kind) -> np.ndarray:
    """Encode batches that are in memory."""
    made = [model.encode(view) for view in views]
    return torch.cat([tokens.mean(dim=1) if kind == "pooled" else tokens.half() for tokens in made]).cpu().numpy()


def extraction(workload: Workload, kind: Kind) -> np.ndarray:
    """Do what an evaluation does for the features of these images."""
    with TemporaryDirectory() as folder:
        cache = FeatureCache(folder, [workload.model], single_process(workload.model.device.type))
        return np.array(cache.rows(workload.model, workload.part, kind))


def check(workload: Workload, views: list[torch.Tensor], name: str, kind: Kind) -> None:
    """Compare what is kept of the first batches with what the forward says of them.

    Raises:
        WrongResultError: if they differ.
    """
    samples = workload.part.samples[: 2 * EVALUATION_BATCH]
    few = replace(workload, part=replace(workload.part, samples=samples))
    wanted = forward(workload.model, views[:2], kind)
    if not np.array_equal(extraction(few, kind), wanted):
        raise WrongResultError(f"{name} keeps something else than the encoder says of the same images")


if __name__ == "__main__":
    sys.exit(main())
