"""The report page of a lab shows comparisons and verdicts, and draws no chart for a claim that was not measured."""

import re

from iwm_fast.lab.claims import judge, values_by_seed
from iwm_fast.lab.config import LabConfig, parse_claim, parse_curves
from iwm_fast.lab.report import write_lab_report

CLAIMS = {
    "worth": [["a finetune predictor accuracy", "a finetune_new random_predictor accuracy"],
              ["a segment predictor mean_iou", "a segment head mean_iou"]],
    "capacity": [["a linear encoder accuracy", "b linear encoder accuracy"]],
    "listens": [["a mrr jitter mrr", "b mrr jitter mrr"]],
}  # fmt: skip
CURVES = {
    "text": "Heads by labels",
    "x_label": "labels",
    "y_label": "accuracy",
    "x": [10, 100],
    "lines": {
        "predictor": ["a finetune predictor accuracy", "a finetune_new random_predictor accuracy"],
        "one seed": ["a linear encoder accuracy", "b linear encoder accuracy"],
        "missing": ["b finetune predictor accuracy", "b finetune predictor accuracy"],
    },
}
ROWS = [
    ("a", "finetune", "predictor", "accuracy", (0.7, 0.8), 461329),
    ("a", "finetune_new", "random_predictor", "accuracy", (0.6, 0.7), 461329),
    ("a", "segment", "predictor", "mean_iou", (0.79, 0.78), 278279),
    ("a", "segment", "head", "mean_iou", (0.78, 0.78), 903),
    ("a", "linear", "encoder", "accuracy", (0.5,), 51),
    ("b", "linear", "encoder", "accuracy", (0.75,), 51),
    ("a", "mrr_default", "jitter", "mrr", (0.1, 0.2, 0.3, 0.4), 0),
    ("a", "attentive", "encoder", "accuracy", (0.5, 0.7, 0.4, 0.6), 51),
]


def test_the_page_shows_comparisons_verdicts_and_charts(tmp_path):
    names = ("cell", "result", "subject", "metric")
    rows = [
        {**dict(zip(names, name, strict=True)), "seed": seed, "value": value, "num_tuned": tuned}
        for *name, values, tuned in ROWS
        for seed, value in enumerate(values)
    ]
    claims = [
        parse_claim(name, {"text": f"Text of {name}.", "paper": "0.8", "compare": pairs})
        for name, pairs in CLAIMS.items()
    ]
    base = tmp_path / "base.yaml"
    base.write_text("seed: 0")
    lab = LabConfig(
        folder=tmp_path, base=base, settings=(), has_demo_data=False, seeds=(0, 1), workers=None,
        cells=dict.fromkeys("ab", ()), evaluations=(), claims=tuple(claims),
        curves=(parse_curves("labels", CURVES),),
    )  # fmt: skip
    judged = [judge(claim, lambda selector: values_by_seed(selector, rows)) for claim in claims]
    page = write_lab_report(lab, judged, rows).read_text(encoding="utf-8")
    worth, capacity, listens = (page.split(f"<h3>Text of {name}.</h3>")[1].split("</table>")[0] for name in CLAIMS)
    # Labels contain only the fields that distinguish the results of a claim; what both sides share comes first.
    assert "accuracy: predictor 0.750, random_predictor 0.650" in worth
    assert "mean_iou: predictor 0.785 (278,279 tuned), head 0.780 (903 tuned)" in worth
    assert "+0.100 (+0.100 to +0.100)" in worth and ">a 0.500, b 0.750<" in capacity
    assert "accuracy, mean_iou<" in worth and "accuracy (linear)<" in capacity
    assert "-0.250 (one seed)" in capacity and "undecided" in capacity
    assert "not measured" in listens
    assert [text.count("<svg") for text in (worth, capacity, listens)] == [1, 1, 0]
    curves = page.split("<h2>Curves")[1].split("<h2>")[0]
    assert curves.count("<svg") == 1 and "Heads by labels" in curves and "one seed" in curves
    assert "missing" not in curves
    (correlation,) = re.findall(r"<tr><td[^>]*>mrr_default</td>.*?</tr>", page.split("<h2>All numbers")[0])
    cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall("<td.*?</td>", correlation)]
    assert cells == ["mrr_default", "attentive encoder accuracy", "+0.00", "-0.96 to +0.96", "4", "1", "-0.37"]
    assert page.count("<h3>attentive encoder accuracy: +0.00</h3>") == 1
