"""The tables of the README and of the documentation follow from the published numbers and the rules of a lab."""

import json
import re
from dataclasses import replace
from functools import partial

import pytest

from benchmarks import publish
from iwm_fast.lab.config import Claim, Curves, LabConfig, ResultSelector
from iwm_fast.lab.report import curve_charts

BETTER, WORSE = ResultSelector(cell="a", result="mrr", subject="jitter", metric="mrr"), ResultSelector(
    cell="b", result="mrr", subject="jitter", metric="mrr"
)  # fmt: skip
CLAIM = Claim(name="c", text="It uses the action.", paper="0.8 against 0", compare=((BETTER, WORSE),))

DRAWN = ResultSelector(cell="c", result="mrr", subject="jitter", metric="mrr")
CURVES = Curves(name="k", text="t", x_label="steps", y_label="MRR", x=(1.0, 2.0), lines={"line": (BETTER, DRAWN)})


@pytest.fixture
def lab(tmp_path):
    rows = [
        {"cell": cell, "seed": seed, "result": "mrr", "subject": "jitter", "metric": metric,
         "value": value + seed / 100, "num_tuned": 1234 if cell == "a" else 0}
        for cell, value in (("a", 0.5), ("b", 0.2), ("c", 0.9))
        for metric in ("mrr", "recall_at_1")
        for seed in range(3)
    ]  # fmt: skip
    (tmp_path / "lab.json").write_text(json.dumps({"machine": ["M"], "commit": ["1a2b"], "rows": rows}))
    return LabConfig(
        folder=tmp_path, base=tmp_path, settings=(), has_demo_data=False, seeds=(0, 1, 2), workers=None,
        cells=dict.fromkeys("abc", ()), evaluations=(), claims=(CLAIM,), curves=(CURVES,),
    )  # fmt: skip


def test_the_pages_show_the_published_numbers():
    shown = set()
    for page in publish.PAGES:
        text = page.read_text(encoding="utf-8")
        assert text == publish.update_sections(text), "run python -m benchmarks.publish"
        shown |= set(re.findall("<!-- end of ([^,]*) -->", text))
    published = {path.stem for path in publish.DOCS.glob("*.json")}
    assert shown == published
    assert all((publish.DOCS / f"{name}.png").stat().st_size < 300_000 for name in published)


def test_only_numbers_that_are_compared_or_drawn_are_published(lab):
    tree = json.loads(json.dumps({"command": "iwm lab x.yaml", **publish.collect_values(lab)}))
    assert set(tree["values"]) == {"a mrr jitter mrr", "b mrr jitter mrr", "c mrr jitter mrr"}
    (chart,) = curve_charts([CURVES], partial(publish.published_values, tree))
    assert [(point.x, point.value) for point in chart.series["line"]] == [(1, 0.51), (2, pytest.approx(0.91))]
    (outcome,) = publish.judge_outcomes(tree)
    assert outcome.claim == CLAIM and outcome.verdict == "holds"
    assert outcome.comparisons[0].values == ((0.5, 0.51, 0.52), (0.2, 0.2 + 0.01, 0.22))


def test_other_seeds_and_cells_are_added_to_the_published_ones(lab):
    tree = publish.collect_values(lab)
    published = tree | {
        "machine": ["L"],
        "commit": ["1a2b", "0f"],
        "values": {"a mrr jitter mrr": {"0": 0.0, "7": 0.7}, "d linear encoder accuracy": {"7": 0.1}},
    }
    added = publish.add_values(tree, published)
    assert added["values"] == tree["values"] | {
        "a mrr jitter mrr": {"0": 0.5, "7": 0.7, "1": 0.51, "2": 0.52},
        "d linear encoder accuracy": {"7": 0.1},
    }
    assert (added["machine"], added["commit"], added["claims"]) == (["L", "M"], ["0f", "1a2b"], tree["claims"])
    with pytest.raises(ValueError, match="differ from the published ones"):
        publish.add_values(tree, published | {"claims": {}})


def test_correlations_have_a_column_for_each_bank_and_the_number_of_the_paper():
    values = [0.1, 0.2, 0.4, 0.8]
    tree = {
        "values": {
            name: {str(seed): sign * value for seed, value in enumerate(values)}
            for name, sign in (
                ("a mrr_default jitter mrr", 1),
                ("a mrr_strong jitter mrr", -1),
                ("a linear encoder accuracy", 2),
                ("a linear-step-00001000 encoder accuracy", 1),
                ("a knn encoder accuracy", 0),
            )
        }
    }
    assert publish.render_correlations(tree).splitlines() == [
        "|  | with mrr_default | with mrr_strong | the paper | runs |",
        "| --- | --- | --- | --- | --- |",
        "| linear encoder accuracy | +1.00 (+1.00 to +1.00) | -1.00 (-1.00 to -1.00) | -0.85 | 4 |",
    ]


def test_a_row_has_means_difference_paper_and_verdict(lab):
    tree = {"command": "iwm lab x.yaml", **publish.collect_values(lab)}
    section = publish.render_claims(tree)
    cells = "It uses the action. | a 0.510 (1,234 tuned), b 0.210 | +0.300 (+0.300 to +0.300) | 0.8 against 0"
    assert f"| {cells} | **holds** |" in section
    assert "`iwm lab x.yaml`, seeds 0, 1, 2; M; commit 1a2b." in section
    reversed_lab = replace(lab, claims=(replace(CLAIM, compare=((WORSE, BETTER),)),))
    assert "**fails**" in publish.render_claims(tree | publish.collect_values(reversed_lab))
    del tree["values"]["b mrr jitter mrr"]
    assert "| not measured |" in publish.render_claims(tree)


def test_only_the_text_between_the_markers_changes(lab):
    tree = {"command": "iwm lab x.yaml", **publish.collect_values(lab)}
    (begin, end), (next_begin, _) = publish.markers("lab"), publish.markers("lab_2")
    text = f"before\n{begin}\nstale\n{end}\nafter\n{next_begin}\n"
    updated = publish.update_section(text, "lab", publish.render_claims(tree))
    assert updated.startswith("before\n") and updated.endswith(f"{end}\nafter\n{next_begin}\n")
    assert "stale" not in updated and publish.update_section(updated, "lab", publish.render_claims(tree)) == updated
    with pytest.raises(ValueError, match="the page must contain the lines"):
        publish.update_section("no markers", "lab", "")
