"""Failures of the DALI loader that are not an image's fault: they end the run, and no batch gets pixels of another."""

from dataclasses import replace

import pytest
import torch
from nvidia.dali.pipeline import Pipeline

from iwm_fast.pipelines import dali_loader
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import LoaderConfig, MaskConfig
from iwm_fast.pipelines.loader import build_loader
from iwm_fast.pipelines.sampling.batch_plan import Request, SampleStream, TrainingPlan
from iwm_fast.pipelines.sampling.shuffle import SampleOrder
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.runtime.memory_errors import exhausted_memory

UNDECODABLE = "Critical error in pipeline:\n  line of code\nencountered:\n\nFailed to decode sample #1 : \n"
GPU_IS_FULL = (
    "Error in MIXED operator\nencountered:\n\nCUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory"
)
GPU_IS_BROKEN = "encountered:\n\nCUDA runtime API error cudaErrorIllegalAddress (700)"


class _PlanWithoutThreads(TrainingPlan):
    """A plan whose fourth request fails."""

    def request(self, index: int) -> Request:
        if index == 3:
            raise RuntimeError("can't start new thread")
        return super().request(index)


@pytest.fixture
def shards(tiny_shards) -> ShardSet:
    return open_shards(tiny_shards.pattern)


def plan_of(shards: ShardSet, kind: type[TrainingPlan] = TrainingPlan) -> TrainingPlan:
    order = SampleOrder([len(shard.keys) for shard in shards.shards], 0, 3)
    stream = SampleStream(order=order, global_batch_size=4, micro_batch_size=4, rank=0, world_size=1)
    return kind(views=ViewConfig(size=32), mask=MaskConfig(), seed=0, grid=4, stream=stream)


def take(plan: TrainingPlan, shards: ShardSet, count: int, taken: list[Batch], prefetch: int = 2) -> list[Batch]:
    settings = LoaderConfig(loader="dali", reader_threads=1, loader_threads=1, prefetch=prefetch)
    loader = build_loader(plan, shards, settings, torch.device("cpu"))
    try:
        for _ in range(count):
            taken.append(next(loader))
        return taken
    finally:
        loader.close()


def let_outputs_fail(monkeypatch, messages: dict[int, str], otherwise: str = "") -> None:
    """Let DALI report an error in place of the outputs with these numbers, or of all others."""
    outputs, count = Pipeline.outputs, iter(range(1000))

    def failing_outputs(self, *stream):
        result, message = outputs(self, *stream), messages.get(next(count), otherwise)
        if message:
            raise RuntimeError(message)
        return result

    monkeypatch.setattr(Pipeline, "outputs", failing_outputs)


@pytest.mark.parametrize("prefetch", [1, 2])
def test_an_error_of_the_plan_ends_the_run_and_no_batch_gets_the_pixels_of_another(shards, prefetch):
    expected, taken = take(plan_of(shards), shards, 3, []), []
    with pytest.raises(RuntimeError, match=r"^can't start new thread$"):
        take(plan_of(shards, _PlanWithoutThreads), shards, 4, taken, prefetch)
    assert len(taken) == 4 - prefetch
    for batch, other in zip(taken, expected, strict=False):
        assert torch.equal(batch.sample, other.sample) and torch.equal(batch.source_view, other.source_view)


@pytest.mark.parametrize("message", [GPU_IS_FULL, GPU_IS_BROKEN])
@pytest.mark.parametrize("earlier", [{}, {0: UNDECODABLE}, {0: UNDECODABLE, 1: UNDECODABLE}])
def test_an_error_about_memory_or_the_gpu_is_raised_and_no_image_is_left_to_pillow(
    shards, monkeypatch, caplog, message, earlier
):
    let_outputs_fail(monkeypatch, earlier, otherwise=message)
    with pytest.raises(RuntimeError) as caught:
        take(plan_of(shards), shards, 1, [], prefetch=1)
    assert str(caught.value) == message and not caplog.records
    assert (exhausted_memory(caught.value) is not None) == (message == GPU_IS_FULL)


def test_if_nothing_can_be_rendered_the_first_error_is_raised_and_no_image_is_left_to_pillow(
    shards, monkeypatch, caplog
):
    let_outputs_fail(monkeypatch, {0: "encountered: internal error 3"}, otherwise=UNDECODABLE)
    with pytest.raises(
        RuntimeError, match=r"batch of step 0 \(internal error 3\) .* set runtime.loader=torch"
    ) as caught:
        take(plan_of(shards), shards, 1, [], prefetch=1)
    assert str(caught.value.__cause__) == "encountered: internal error 3" and not caplog.records


def test_a_failure_that_does_not_come_again_is_logged_and_changes_no_batch(shards, monkeypatch, caplog):
    expected = take(plan_of(shards), shards, 2, [], prefetch=1)
    let_outputs_fail(monkeypatch, {0: "encountered: internal error 3"})
    for batch, other in zip(take(plan_of(shards), shards, 2, [], prefetch=1), expected, strict=True):
        assert torch.equal(batch.sample, other.sample) and torch.equal(batch.source_view, other.source_view)
    assert [record.getMessage() for record in caplog.records] == [
        "DALI rendered a batch of step 0 only at the second try (internal error 3)"
    ]


@pytest.fixture
def gpu_decoder(monkeypatch) -> None:
    """Let loaders believe that a GPU decodes."""
    settings_of, build_graph = dali_loader.graph_settings, dali_loader.build_graph
    monkeypatch.setattr(dali_loader, "graph_settings", lambda *given: replace(settings_of(*given), device_id=0))
    monkeypatch.setattr(
        dali_loader, "build_graph", lambda settings, inputs: build_graph(replace(settings, device_id=None), inputs)
    )


def every(period: int, failing: set[int]) -> dict[int, str]:
    """Return messages for outputs that fail if their number modulo a period is one of these."""
    return {number: UNDECODABLE for number in range(1000) if number % period in failing}


# A batch of four that fails has six outputs: it fails, each image is tried alone, and the batch is rendered again.
EVERY_IMAGE = every(6, {0, 1, 2, 3, 4})


@pytest.mark.usefixtures("gpu_decoder")
def test_a_decoder_of_the_gpu_that_fails_on_most_images_ends_the_run(shards, monkeypatch, caplog):
    let_outputs_fail(monkeypatch, EVERY_IMAGE)
    taken = []
    with pytest.raises(RuntimeError, match=r"16 of the last 16 images, .* set runtime.decode=cpu, or runtime.loader=t"):
        take(plan_of(shards), shards, 5, taken, prefetch=1)
    # Fewer images may be odd files, which Pillow decodes.
    assert len(taken) == 3 and len(caplog.records) == 12


@pytest.mark.usefixtures("gpu_decoder")
@pytest.mark.parametrize(
    "messages", [every(6, {0, 1}), every(7, {0, 1, 2, 3, 4})], ids=["a quarter", "every other batch"]
)
def test_a_decoder_of_the_gpu_that_fails_on_some_images_does_not_end_the_run(shards, monkeypatch, messages):
    let_outputs_fail(monkeypatch, messages)
    assert len(take(plan_of(shards), shards, 12, [], prefetch=1)) == 12


def test_files_that_dali_cannot_decode_on_a_cpu_do_not_end_the_run(shards, monkeypatch):
    let_outputs_fail(monkeypatch, EVERY_IMAGE)
    assert len(take(plan_of(shards), shards, 8, [], prefetch=1)) == 8
