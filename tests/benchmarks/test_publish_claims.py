"""The table of claims in the README says what the kept numbers say, by the rule that judges a lab."""

import json
import re
from dataclasses import replace

import pytest

from benchmarks import publish_claims
from iwm_fast.lab.config import Claim, LabConfig, Number

BETTER, WORSE = Number(cell="a", result="mrr", subject="jitter", metric="mrr"), Number(
    cell="b", result="mrr", subject="jitter", metric="mrr"
)  # fmt: skip
CLAIM = Claim(name="c", text="It listens.", paper="0.8 against 0", compare=((BETTER, WORSE),))


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
        cells=dict.fromkeys("abc", ()), evaluations=(), claims=(CLAIM,),
    )  # fmt: skip


def test_the_readme_shows_the_kept_numbers():
    text = publish_claims.README.read_text(encoding="utf-8")
    assert text == publish_claims.with_sections(text), "run python -m benchmarks.publish_claims"
    kept, shown = (
        {path.stem for path in publish_claims.DOCS.glob("lab_*.json")},
        set(re.findall("<!-- end of (.*) -->", text)),
    )
    assert kept == shown != set()
    for lab in kept:
        assert f"(docs/{lab}.png)" in text and (publish_claims.DOCS / f"{lab}.png").stat().st_size < 300_000


def test_only_what_is_compared_is_kept_and_judged_again(lab):
    tree = json.loads(json.dumps({"command": "iwm lab x.yaml", **publish_claims.numbers_of(lab)}))
    assert set(tree["values"]) == {"a mrr jitter mrr", "b mrr jitter mrr"}
    (outcome,) = publish_claims.outcomes_of(tree)
    assert outcome.claim == CLAIM and outcome.verdict == "holds"
    assert outcome.comparisons[0].values == ((0.5, 0.51, 0.52), (0.2, 0.2 + 0.01, 0.22))


def test_a_line_holds_means_difference_the_paper_and_the_verdict(lab):
    tree = {"command": "iwm lab x.yaml", **publish_claims.numbers_of(lab)}
    said = publish_claims.section(tree)
    assert (
        "| It listens. | a, 1,234 tuned 0.510, b 0.210 | +0.300 (+0.300 to +0.300) | 0.8 against 0 | **holds** |"
        in said
    )
    assert "`iwm lab x.yaml`, seeds 0, 1, 2; M; commit 1a2b." in said
    other = replace(lab, claims=(replace(CLAIM, compare=((WORSE, BETTER),)),))
    assert "**fails**" in publish_claims.section(tree | publish_claims.numbers_of(other))
    del tree["values"]["b mrr jitter mrr"]
    assert "| not measured |" in publish_claims.section(tree)


def test_nothing_but_what_is_between_the_marks_is_written(lab):
    tree = {"command": "iwm lab x.yaml", **publish_claims.numbers_of(lab)}
    (begin, end), (other, _) = publish_claims.marks("lab"), publish_claims.marks("lab_2")
    text = f"before\n{begin}\nstale\n{end}\nafter\n{other}\n"
    once = publish_claims.with_section(text, "lab", tree)
    assert once.startswith("before\n") and once.endswith(f"{end}\nafter\n{other}\n") and "stale" not in once
    assert publish_claims.with_section(once, "lab", tree) == once
    with pytest.raises(ValueError, match="README must hold the lines"):
        publish_claims.with_section("no marks", "lab", tree)
