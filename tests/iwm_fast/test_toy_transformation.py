"""A transformation that the project does not have goes through all of its parts: the exchange of red and blue.

Nothing but its class and the composition with it is defined here.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from fixtures.exact_predictor import Pair, exact, ignore_action
from iwm_fast import world_model
from iwm_fast.checkpoints.export import describe_action_entries
from iwm_fast.config.evaluation import MrrConfig, PlanConfig
from iwm_fast.config.loading import iter_settings
from iwm_fast.evals.planning.cem import search, searched_entries, training_prior
from iwm_fast.evals.planning.image_pairs import draw_change
from iwm_fast.evals.retrieval.bank import draw_bank, encode_bank, make_query
from iwm_fast.evals.retrieval.mrr import rank_images
from iwm_fast.evals.retrieval.sweeps import BankedImage, retrieve_clean, trained_flags
from iwm_fast.pipelines.action_log.replay import ReplayPlan
from iwm_fast.pipelines.action_log.schema import BatchRecord, LogMetadata, RowBuilder, read_metadata
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import IMAGENET, LoaderConfig, MaskConfig
from iwm_fast.pipelines.loader import build_loader
from iwm_fast.pipelines.sampling.batch_plan import SampleStream, TrainingPlan
from iwm_fast.pipelines.sampling.shuffle import SampleOrder
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.transforms.action import describe_action
from iwm_fast.pipelines.transforms.base import Parameters, SourceFlag
from iwm_fast.pipelines.transforms.color_map import ColorMap
from iwm_fast.pipelines.transforms.composition import ViewConfig, draw
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.pipelines.transforms.operations.blur import Blur
from iwm_fast.pipelines.transforms.operations.gamma import Gamma
from iwm_fast.pipelines.transforms.operations.posterize import Posterize
from iwm_fast.pipelines.transforms.operations.rotation import Rotation

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class ChannelSwap(SourceFlag):
    """Exchange of red and blue in the source view."""

    probability: float = 0.5
    """Probability that red and blue of the source view are exchanged."""

    name: ClassVar[str] = "swap"
    undo: ClassVar[str] = "swap back"
    undone: ClassVar[str] = "Channels restored"
    one_means: ClassVar[str] = "red and blue of the source are exchanged"

    @property
    def is_linear(self) -> bool:
        return True

    def color_map(self, parameters: Parameters) -> ColorMap:
        flag = parameters["swap"]
        return ColorMap(np.where(flag[:, None, None], np.eye(3)[::-1], np.eye(3)), np.zeros(len(flag), np.float32))


@dataclass(frozen=True, kw_only=True)
class ToyViews(ViewConfig):
    """The project's transformations and one more."""

    swap: ChannelSwap = field(default_factory=ChannelSwap)


VIEWS = ToyViews(size=16, blur=Blur(sigma=(0.1, 1.0)))
WITH_ALL = replace(
    VIEWS, gamma=Gamma(probability=0.5), posterize=Posterize(probability=0.5), rotation=Rotation(probability=0.5)
)


@pytest.fixture(scope="module")
def shards(tiny_shards):
    return open_shards(tiny_shards.pattern)


@pytest.fixture
def model(tiny_config):
    config = tiny_config()
    return world_model.build_untrained(replace(config, views=VIEWS, runtime=replace(config.runtime, loader="torch")))


def batches(plan, shards, backend: str, count: int = 2) -> list[Batch]:
    settings = LoaderConfig(loader=backend, reader_threads=1, loader_threads=1, prefetch=1)
    loader = build_loader(plan, shards, settings, CPU)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def training_plan(shards, views: ToyViews = VIEWS) -> TrainingPlan:
    order = SampleOrder([len(shard.keys) for shard in shards.shards], 0, 3)
    stream = SampleStream(order=order, global_batch_size=8, micro_batch_size=8, rank=0, world_size=1)
    return TrainingPlan(views=views, mask=MaskConfig(), seed=0, grid=4, stream=stream)


def test_it_has_settings_draws_and_an_entry_of_the_action():
    assert "swap.probability" in [name for name, *_ in iter_settings(ToyViews)]
    assert VIEWS.entries == (*ViewConfig().entries, "swap")
    drawn, without = draw(VIEWS, 0, 0, np.arange(2000)), draw(ViewConfig(blur=VIEWS.blur), 0, 0, np.arange(2000))
    assert 0.45 < drawn.source["swap"].mean() < 0.55 and not drawn.target["swap"].any()
    assert all(np.array_equal(values, drawn.source[name]) for name, values in without.source.items())
    assert describe_action(np.eye(8, dtype=np.float32)[7], VIEWS) == "swap back"
    assert describe_action_entries(VIEWS)[-1] == {
        "name": "swap", "one_means": "red and blue of the source are exchanged"
    }  # fmt: skip


@pytest.mark.parametrize("views", [VIEWS, WITH_ALL])
def test_both_loaders_render_it(shards, views):
    fast, plain = (batches(training_plan(shards, views), shards, backend) for backend in ("dali", "torch"))
    for ours, theirs in zip(fast, plain, strict=True):
        assert torch.equal(ours.action, theirs.action) and ours.action[:, views.entries.index("swap")].any()
        for view in ("source_view", "target_view"):
            pixels = [denormalize_view(getattr(batch, view), IMAGENET).int() for batch in (ours, theirs)]
            # Resizing differs by up to one grey level, which solarize and posterize enlarge for values at a threshold.
            assert (pixels[0] - pixels[1]).abs().float().mean() < (1 if views is VIEWS else 3)


@pytest.mark.parametrize("views", [VIEWS, WITH_ALL])
def test_it_is_logged_and_rendered_again_from_the_log(shards, views):
    plan, metadata = (
        training_plan(shards, views),
        LogMetadata(views=views, mask=MaskConfig(), seed=0, grid=4, global_batch_size=8, shards="", shards_digest=""),
    )
    (batch,) = batches(plan, shards, "torch", 1)
    rows = RowBuilder(metadata, shards, 0).build([BatchRecord.from_batch(batch)])
    assert rows.column("source_swap").to_pylist() == batch.draws.source["swap"].tolist()
    assert read_metadata(rows.schema, ToyViews) == metadata
    with pytest.raises(ValueError, match=r"views\.swap must be known to this version; use the version that wrote it"):
        read_metadata(rows.schema)
    (again,) = batches(ReplayPlan(head=metadata, rows=rows), shards, "torch", 1)
    assert torch.equal(again.source_view, batch.source_view) and torch.equal(again.action, batch.action)


def test_it_is_a_family_of_retrieval(model, shards):
    (ranks,) = rank_images([model], shards, np.array([3]), MrrConfig(run="x", bank_size=6))
    assert ranks.shape == (1, 5, 6)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    bank = draw_bank(pixels, 0, 6, model=model, strengths="default", seed=0)
    image = BankedImage(pixels=pixels, bank=bank, target=encode_bank(model, bank))
    query = make_query(pixels, bank, "swap", model)
    assert torch.equal(query.source, pixels.flip(2)) and (query.action[:, 7] == 1).all()
    assert trained_flags(VIEWS) == ("grayscale", "blur", "solarize", "swap")
    pair = Pair(source=query.source, clean=pixels, flags=("swap",))
    assert retrieve_clean("swap", image, exact(model, pair), None).ranks[0] == 1
    assert retrieve_clean("swap", image, ignore_action(model), None).ranks[0] > 1


def test_planning_searches_for_it():
    assert searched_entries(VIEWS) == VIEWS.entries and training_prior(VIEWS).mean[7] == 0.5
    sources = [draw_change(VIEWS, sample, kind="destroyed", split="val", seed=0)[0] for sample in range(50)]
    assert 10 < sum(int(source["swap"][0]) for source in sources) < 40
    config = PlanConfig(run="x", population=50, rounds=2)
    result = search(lambda actions: -actions[:, 7].astype(np.float64), training_prior(VIEWS), config, 0)
    assert result.action[7] == 1
