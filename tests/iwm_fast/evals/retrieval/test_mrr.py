"""Mean reciprocal rank: its values for predictors of known quality, and the files written."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from torch import nn

from fixtures.exact_predictor import FLAGS, Pair, exact, ignore_action
from fixtures.tiny_pretraining import tiny_run
from iwm_fast import world_model
from iwm_fast.config.evaluation import READOUTS, EvalDataConfig, ImagineConfig, MrrConfig, PlanConfig
from iwm_fast.evals.results import read_result
from iwm_fast.evals.retrieval.bank import (
    CandidateBank,
    bank_family,
    default_families,
    draw_bank,
    encode_bank,
    make_query,
)
from iwm_fast.evals.retrieval.mrr import chance_mrr, evaluate_mrr, rank_images, ranks_in_bank
from iwm_fast.evals.retrieval.sweeps import BankedImage, sweep, swept_entries
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.transforms.operations.gamma import Gamma
from iwm_fast.pipelines.transforms.operations.rotation import Rotation
from iwm_fast.pipelines.transforms.operations.solarize import Solarize
from iwm_fast.train import run

FAMILIES = ("jitter", *FLAGS)


def trained(shards, folder, *, depth=1, **views):
    config = tiny_run(shards, folder, depth=depth, loader="torch")
    run(
        replace(
            config,
            views=replace(config.views, **views),
            data=replace(config.data, val=shards.pattern),
            optim=replace(config.optim, epochs=1.0, warmup_epochs=0.0),
        )
    )
    return str(folder)


@pytest.fixture(scope="module")
def tiny_folder(tiny_shards, tmp_path_factory) -> str:
    return trained(tiny_shards, tmp_path_factory.mktemp("mrr") / "run")


def small(folder, **more):
    return MrrConfig(**({"run": folder, "num_images": 5, "bank_size": 6, "device": "cpu"} | more))


def test_chance_is_the_harmonic_number_over_the_bank():
    assert chance_mrr(64) == pytest.approx(0.0741, abs=1e-4) and chance_mrr(256) == pytest.approx(0.0239, abs=1e-4)


def test_all_families_are_measured_beside_chance_and_the_control(tiny_folder):
    result = evaluate_mrr(small(tiny_folder))
    metrics, suffixes = ("mrr", "recall_at_1", "recall_at_5"), ("", "_difference_readout")
    assert [(row.subject, row.metric) for row in result.rows] == [
        (family, name + suffix) for family in FAMILIES for suffix in suffixes for name in metrics
    ]
    chance = {"mrr": (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 1 / 6) / 6, "recall_at_1": 1 / 6, "recall_at_5": 5 / 6}
    for row in result.rows:
        assert row.low <= row.value <= row.high and row.num_samples == 5
        assert row.control_name == "untrained predictor"
        assert row.chance == pytest.approx(chance[row.metric.removesuffix("_difference_readout")])
    assert read_result(path_of(result, tiny_folder)) == replace(result, settings=as_json(result.settings))
    assert result.name == "mrr_default" and evaluate_mrr(small(tiny_folder, bank="run")).name == "mrr_run"


def path_of(result, folder):
    return Path(folder) / "evaluations" / f"{result.name}.json"


def as_json(tree):
    return json.loads(json.dumps(tree))


def test_the_ranks_of_all_queries_are_saved_and_give_the_rows(tiny_folder):
    result = evaluate_mrr(small(tiny_folder, bank="run"))
    table = parquet.read_table(path_of(result, tiny_folder).with_name(result.details["ranks"]))
    assert result.details["ranks"] == "mrr_run_ranks.parquet" and table.num_rows == 5 * 4 * 6
    rows = table.to_pylist()
    shards = open_shards(world_model.load(tiny_folder).config.data.val)
    assert list(dict.fromkeys(row["key"] for row in rows)) == [shards.key(sample) for sample in (0, 9, 19, 28, 38)]
    for family in FAMILIES:
        family_rows = [row for row in rows if row["family"] == family]
        assert [row["member"] for row in family_rows] == [0, 1, 2, 3, 4, 5] * 5
        for column, value in (("rank", "value"), ("rank_untrained", "control")):
            for suffix in ("", "_difference_readout"):
                reciprocal = np.mean([1 / row[column + suffix] for row in family_rows])
                assert reciprocal == pytest.approx(getattr(result.row(family, f"mrr{suffix}"), value))


def test_a_set_with_fewer_images_than_num_images_is_used_completely(tiny_folder):
    result = evaluate_mrr(small(tiny_folder, num_images=1000, bank_size=2, families=("blur",)))
    assert {row.num_samples for row in result.rows} == {48}


class OffsetPredictor(nn.Module):
    """Adds to another predictor's tokens an offset that depends on the source and the position only."""

    def __init__(self, predictor: nn.Module) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, context_tokens, action, context, target):
        predicted = self.predictor(context_tokens, action, context, target)
        return predicted + 5 * context_tokens.cos() * torch.arange(predicted.shape[1])


def test_the_difference_readout_cancels_what_does_not_depend_on_the_action(model, pixels):
    bank = draw_bank(pixels, 0, 12, model=model, strengths="default", seed=0)
    known = exact(model, Pair(source=pixels, clean=pixels))
    models = [replace(known, predictor=OffsetPredictor(known.predictor)), ignore_action(model)]
    absolute, difference, *constant = ranks_in_bank(models, pixels, bank, ["jitter"], READOUTS)
    assert (difference == 1).all() and (1 / absolute).mean() < 0.5
    # Both readouts of a predictor that ignores the action are one guess for all candidates.
    assert [(1 / rank).mean() for rank in constant] == pytest.approx([chance_mrr(12)] * 2, abs=1e-6)


def test_an_exact_predictor_ranks_first_and_one_without_action_at_chance(model, pixels):
    bank = draw_bank(pixels, 0, 12, model=model, strengths="default", seed=0)
    sources = {flag: make_query(pixels, bank, flag, model).source for flag in FLAGS}
    destroyed = [Pair(source=source, clean=pixels, flags=(flag,)) for flag, source in sources.items()]
    models = [exact(model, Pair(source=pixels, clean=pixels), *destroyed), ignore_action(model)]
    exact_ranks, other_ranks = ranks_in_bank(models, pixels, bank, FAMILIES)
    assert exact_ranks.shape == (4, 12) and (exact_ranks == 1).all()
    assert (1 / other_ranks).mean(axis=1) == pytest.approx([chance_mrr(12)] * 4, abs=1e-6)


@pytest.mark.parametrize("family", ["gamma", "rotation"])
def test_a_transformation_of_both_views_has_a_bank_and_a_sweep_of_its_own(tiny_config, pixels, family):
    views = replace(tiny_config().views, gamma=Gamma(probability=0.5), rotation=Rotation(probability=0.5))
    model = world_model.build_untrained(replace(tiny_config(), views=views))
    assert default_families(views) == ("jitter", "grayscale", "gamma", "blur", "solarize", "rotation")
    bank = draw_bank(pixels, 0, 12, model=model, strengths="default", seed=0, family=family)
    assert len(np.unique(bank.parameters[family])) == 12 and (bank.parameters["brightness"] == 1).all()
    of_jitter = draw_bank(pixels, 0, 12, model=model, strengths="default", seed=0, family="blur")
    assert (of_jitter.parameters[family] == 0).all() and len(np.unique(of_jitter.parameters["brightness"])) == 12
    source = make_query(pixels, bank, family, model).source
    unchanged = getattr(views, family).query_source(1)
    models = [exact(model, Pair(source=source, clean=pixels, unchanged=unchanged)), ignore_action(model)]
    exact_ranks, other_ranks = ranks_in_bank(models, pixels, bank, [family])
    assert (exact_ranks == 1).all() and (1 / other_ranks).mean() == pytest.approx(chance_mrr(12), abs=1e-6)
    assert family in swept_entries(views, "default")
    image = BankedImage(pixels=pixels, bank=of_jitter, target=encode_bank(model, of_jitter))
    requested, retrieved, _ = sweep(family, image, 5, models[0], strengths="default").rows
    assert [panel.caption for panel in retrieved] == ["correct"] * 5 and requested[2].caption == "unchanged"
    # The candidates of an image come from two banks.
    assert {bank_family(name, views) for name in default_families(views)} == {"jitter", "gamma", "rotation"}


def test_a_family_that_is_off_in_the_run_is_refused(tiny_folder):
    with pytest.raises(ValueError, match=r"families must name transformations that are on in the run: jitter, gr"):
        evaluate_mrr(small(tiny_folder, families=("jitter", "gamma")))
    with pytest.raises(ValueError, match=r"families must name transformations of jitter, .*got \['jiter'\]"):
        small("x", families=("jiter",))


def test_without_conditioning_mrr_is_chance_to_three_digits(tiny_config, tiny_shards):
    config = tiny_config(conditioning="none")
    model = world_model.build_untrained(replace(config, runtime=replace(config.runtime, loader="torch")))
    shards, settings = open_shards(tiny_shards.pattern), small("x", bank_size=16)
    for rank in rank_images([model], shards, np.arange(6), settings):
        assert rank.shape == (1, 4, 16)
        assert (1 / rank).mean(axis=2) == pytest.approx(np.full((1, 4), chance_mrr(16)), abs=5e-4)


def test_the_order_of_the_bank_does_not_matter(model, pixels):
    bank = draw_bank(pixels, 0, 16, model=model, strengths="default", seed=0)
    order = np.random.default_rng(0).permutation(16)
    parameters = {name: values[order] for name, values in bank.parameters.items()}
    shuffled = CandidateBank(pixels=bank.pixels[torch.from_numpy(order)], parameters=parameters)
    ranks, shuffled_ranks = (ranks_in_bank([model], pixels, candidates, FAMILIES) for candidates in (bank, shuffled))
    np.testing.assert_array_equal(ranks[..., order], shuffled_ranks)
    assert len(np.unique(ranks)) > 4


def test_the_bank_of_an_image_is_freed_after_ranking(tiny_config, tiny_shards):
    config = tiny_config()
    model = world_model.build_untrained(replace(config, runtime=replace(config.runtime, loader="torch")))
    num_alive = []
    for _ in rank_images([model], open_shards(tiny_shards.pattern), np.arange(3), small("x", families=("jitter",))):
        gc.collect()
        num_alive.append(sum(type(value) is CandidateBank for value in gc.get_objects()))
    assert num_alive == [1, 1, 1]


def test_unsupported_families_are_measured_with_a_warning(tiny_shards, tmp_path, caplog):
    entries = ("brightness", "contrast", "saturation", "hue", "grayscale", "solarize")
    folder = trained(tiny_shards, tmp_path / "run", action_entries=entries, solarize=Solarize(probability=0.0))
    with caplog.at_level("WARNING"):
        result = evaluate_mrr(small(folder))
    assert result.details["not_in_action"] == ["blur"] and result.details["not_in_training"] == ["solarize"]
    assert {row.subject for row in result.rows} == set(FAMILIES)
    assert "families contains blur, which the run's actions do not encode" in caplog.text
    assert "families contains solarize, which training did not apply" in caplog.text


def test_a_run_with_the_identity_predictor_is_refused_immediately(tiny_shards, tmp_path):
    folder = trained(tiny_shards, tmp_path / "run", depth=0)
    with pytest.raises(ValueError, match=r"run must have a predictor, not the identity"):
        evaluate_mrr(small(folder, data=EvalDataConfig(val="/absent.tar")))


def test_a_label_is_refused_where_it_has_no_effect_or_a_wrong_form():
    for config in (MrrConfig, ImagineConfig, PlanConfig):
        with pytest.raises(ValueError, match=r"data\.label must be left unset"):
            config(run="x", data=EvalDataConfig(label="json.hue_bin"))
    with pytest.raises(ValueError, match=r"data\.label must be cls or json\.NAME, got 'hue_bin'"):
        EvalDataConfig(label="hue_bin")
