"""Time the extraction of frozen features beside the encoder's forward pass: `python -m benchmarks.features --help`.

The forward pass has its batches in memory; an extraction starts by opening a loader and ends with a published file.
They alternate over all images. Their results must be bit-equal; otherwise the run ends with status 1.
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
from benchmarks.harness.interleave import StreamRound
from benchmarks.harness.photograph_shards import PhotographShards, load_into_page_cache
from benchmarks.harness.records import Shape
from benchmarks.harness.session import Case, Session, WrongResultError
from benchmarks.harness.timing import interleaved_rounds
from iwm_fast import world_model
from iwm_fast.config.run import EncoderConfig, ModelConfig, RunConfig, RuntimeConfig
from iwm_fast.evals.datasets import LabelledSamples, evaluation_batches
from iwm_fast.evals.probing.extraction import FeatureKind
from iwm_fast.evals.probing.feature_cache import FeatureCache
from iwm_fast.pipelines.annotations.labels import read_labels
from iwm_fast.pipelines.config import DataConfig
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.runtime.distributed import single_process
from iwm_fast.training.loaders import EVALUATION_BATCH_SIZE
from iwm_fast.world_model import WorldModel

KINDS: dict[str, FeatureKind] = {POOLED: "pooled", TOKENS: "tokens"}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The encoder and the images of the benchmark."""

    model: WorldModel
    dataset: LabelledSamples
    shape: Shape


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the extractions that the command line selects; return the exit status."""
    options = cli.build_parser("features", __doc__, KINDS).parse_args(arguments)
    session = cli.open_session(options, results.FEATURES)
    kinds: dict[str, FeatureKind] = {name: kind for name, kind in KINDS.items() if name in (options.only or KINDS)}
    workload = build_workload(options.data, session.device, options.quick)
    return cli.run(session, {"features": measure}, None, report, workload, kinds)


def build_workload(folder: Path, device: str, quick: bool) -> Workload:
    """Return an untrained ViT-S/16 and photographs of 500 x 375 pixels, more of them on a GPU; a tiny set if quick."""
    name, size, encoder = "ViT-S/16", 224, EncoderConfig(dim=384, depth=12, num_heads=6)
    photographs = PhotographShards(num_shards=32 if device == "cuda" else 2)
    if quick:
        name, size, encoder = "tiny", 32, EncoderConfig(dim=64, depth=2, num_heads=2, patch_size=8)
        photographs = PhotographShards(num_shards=2, samples_per_shard=40, width=80, height=60)
    pattern = photographs.write(folder)
    load_into_page_cache(pattern)
    config = RunConfig(
        data=DataConfig(train=pattern),
        views=ViewConfig(size=size),
        model=ModelConfig(encoder=encoder),
        runtime=RuntimeConfig(device="cuda" if device == "cuda" else "cpu"),
    )
    shards = open_shards(pattern)
    return Workload(
        model=world_model.build_untrained(config, device),
        dataset=LabelledSamples(
            shards=shards, labels=read_labels(shards, "cls"), samples=np.arange(shards.num_samples)
        ),
        shape={"encoder": name, "view": size, "images": shards.num_samples, "B": EVALUATION_BATCH_SIZE,
               "photographs": f"{photographs.width}x{photographs.height}", "threads": torch.get_num_threads()},
    )  # fmt: skip


def measure(session: Session, workload: Workload, kinds: dict[str, FeatureKind]) -> None:
    """Check the extractions, then time them and the forward pass over all images in interleaved rounds."""
    dataset = workload.dataset
    # The loader reuses its buffers, so the views are copied.
    views = [batch.source_view.clone() for batch in evaluation_batches(workload.model, dataset.shards, dataset.samples)]
    functions: dict[str, Callable[[], np.ndarray]] = {FORWARD: lambda: encode(workload.model, views, "pooled")}
    for name, kind in kinds.items():
        check(workload, views, name, kind)
        functions[name] = lambda kind=kind: extract(workload, kind)
    times_s: dict[str, list[float]] = {name: [] for name in functions}
    num_rounds = 1 if session.quick else 3
    for name in interleaved_rounds(functions, num_rounds, lambda number: session.has_time(f"round {number}")):
        begin = time.perf_counter()
        functions[name]()
        times_s[name].append(time.perf_counter() - begin)
    for name, times in times_s.items():
        # Ratios are formed within a round, because the speed of the machine drifts between rounds.
        overheads = [100 * (time_s / base_s - 1) for time_s, base_s in zip(times, times_s[FORWARD], strict=True)]
        figures = {} if name == FORWARD else {"over_percent": round(statistics.median(overheads), 2)}
        result = [StreamRound(len(dataset.samples), [time_s]) for time_s in times]
        interleave.record(session, Case(FEATURES, workload.shape, "float32"), name, result, **figures)


def encode(model: WorldModel, views: list[torch.Tensor], kind: FeatureKind) -> np.ndarray:
    """Return the features of batches that are in memory."""
    encoded = [model.encode(view) for view in views]
    return torch.cat([tokens.mean(dim=1) if kind == "pooled" else tokens.half() for tokens in encoded]).cpu().numpy()


def extract(workload: Workload, kind: FeatureKind) -> np.ndarray:
    """Extract the features of all images as an evaluation does, with an empty cache."""
    with TemporaryDirectory() as folder:
        cache = FeatureCache(folder, [workload.model], single_process(workload.model.device.type))
        return np.array(cache.rows(workload.model, workload.dataset, kind))


def check(workload: Workload, views: list[torch.Tensor], name: str, kind: FeatureKind) -> None:
    """Raise WrongResultError unless the extracted features of the first two batches equal those of the forward pass."""
    samples = workload.dataset.samples[: 2 * EVALUATION_BATCH_SIZE]
    first_batches = replace(workload, dataset=replace(workload.dataset, samples=samples))
    if not np.array_equal(extract(first_batches, kind), encode(workload.model, views[:2], kind)):
        raise WrongResultError(f"{name}: the features differ from the encoder's outputs for the same images")


if __name__ == "__main__":
    sys.exit(main())
