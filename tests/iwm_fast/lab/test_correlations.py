"""Correlations of MRR with accuracies over the runs of a lab, with Fisher's interval."""

import json
import math

import numpy as np
import pytest

from fixtures.paths import PROJECT
from iwm_fast.lab.correlations import correlate

MRR = (0.1, 0.2, 0.3, 0.5, 0.8)


def rows_of(**results):
    """Return a lab's rows of a result for each keyword, RESULT__SUBJECT__METRIC, with a value per run."""
    return [
        {"cell": "ab"[run % 2], "seed": run // 2, "value": value}
        | dict(zip(("result", "subject", "metric"), name.split("__"), strict=True))
        for name, values in results.items()
        for run, value in enumerate(values)
        if value is not None
    ]


def test_coefficient_and_interval_are_those_of_pearson_and_fisher():
    accuracy = (0.9, 0.8, 0.85, 0.6, 0.4)
    (item,) = correlate(rows_of(mrr_default__jitter__mrr=MRR, linear__encoder__accuracy=accuracy))
    assert item.coefficient == pytest.approx(np.corrcoef(MRR, accuracy)[0, 1])
    half = 1.959964 / math.sqrt(len(MRR) - 3)
    low, high = (math.tanh(math.atanh(item.coefficient) + sign * half) for sign in (-1, 1))
    assert (item.low, item.high) == pytest.approx((low, high), abs=1e-6)
    assert (item.num_runs, item.num_cells, item.paper) == (5, 2, -0.85)
    assert sorted(item.points) == sorted(zip(MRR, accuracy, strict=True))


def test_pairs_are_formed_by_cell_and_seed_and_need_four_runs_and_variation():
    rows = rows_of(
        linear__encoder__accuracy=(0.5, None, 0.4, 0.6, 0.3),
        mrr_strong__jitter__mrr=MRR,
        mrr_strong__jitter__recall_at_1=MRR,
        mrr_strong__blur__mrr=MRR,
        attentive__encoder__accuracy=(0.5, None, None, 0.6, 0.3),
        knn__encoder__accuracy=(0.5,) * 5,
        **{"linear_json.hue__encoder__accuracy": MRR, "finetune_few__predictor__accuracy": MRR},
        segment__predictor__mean_iou=MRR,
        multitask__mean__accuracy=MRR,
    )
    found = {str(item): item for item in correlate(rows)}
    assert {name: (item.num_runs, item.paper) for name, item in found.items()} == {
        "linear encoder accuracy": (4, -0.85),
        "linear_json.hue encoder accuracy": (5, None),
        "finetune_few predictor accuracy": (5, 0.93),
        "segment predictor mean_iou": (5, None),
    }
    assert sorted(found["linear encoder accuracy"].points) == [(0.1, 0.5), (0.3, 0.4), (0.5, 0.6), (0.8, 0.3)]
    assert found["segment predictor mean_iou"].coefficient == pytest.approx(1.0)
    assert correlate([]) == []


def test_results_of_a_checkpoint_are_paired_with_the_mrr_of_the_same_checkpoint():
    rows = rows_of(
        mrr_default__jitter__mrr=MRR,
        linear__encoder__accuracy=MRR,
        **{"mrr_default-step-00001000__jitter__mrr": MRR, "linear_json.hue-step-00001000__encoder__accuracy": MRR},
    )
    assert [(item.mrr, item.result, item.paper) for item in correlate(rows)] == [
        ("mrr_default", "linear", -0.85),
        ("mrr_default-step-00001000", "linear_json.hue-step-00001000", None),
    ]


def test_a_published_lab_has_the_correlations_of_its_numbers():
    values = json.loads((PROJECT / "docs/lab_cpu.json").read_text(encoding="utf-8"))["values"]
    rows = [
        dict(zip(("cell", "result", "subject", "metric"), name.split(), strict=True))
        | {"seed": int(seed), "value": value}
        for name, by_seed in values.items()
        if len(name.split()) == 4
        for seed, value in by_seed.items()
    ]
    (item,) = (item for item in correlate(rows) if item.result == "finetune_few")
    # Of the small and the large predictor, three seeds each.
    assert (item.mrr, item.num_runs, item.num_cells) == ("mrr_default", 6, 2)
    assert -1 < item.low < item.coefficient < item.high < 1
