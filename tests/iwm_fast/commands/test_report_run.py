"""Reports of runs: their content, that they need no network, and how a browser shows them."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from fixtures.tiny_pretraining import tiny_run
from iwm_fast.commands.report_run import write_run_report
from iwm_fast.evals.results import Result, Row, save_result
from iwm_fast.rendering.charts import (
    IntervalChart,
    IntervalPoint,
    draw_line_chart,
    draw_plot,
    draw_scatter_chart,
    draw_waterfall_chart,
)
from iwm_fast.rendering.forest_plot import ForestGroup, ForestRow, draw_forest_plot, save_forest_plot
from iwm_fast.rendering.html import metric_tiles, page, table
from iwm_fast.train import run

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

# Options that let Chromium run in a container, without a display and without background traffic.
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def report(tmp_path_factory, tiny_shards) -> Path:
    """Return the page of a trained run with one evaluation result; names contain characters that HTML reserves."""
    folder = tmp_path_factory.mktemp("report") / "run <&>"
    run(tiny_run(tiny_shards, folder))
    row = Row(subject="jitter", metric="mrr", value=0.4321, low=0.4, high=0.46, control=0.11,
              control_name="untrained <predictor>", chance=0.1, num_samples=16)  # fmt: skip
    save_result(folder, Result(task="mrr", name="mrr_default", rows=(row,), step=12, seed=0, settings={}))
    return write_run_report(folder)


class PageParser(HTMLParser):
    """Collects the text and the addresses of a page, and fails if a tag is not closed."""

    VOID = frozenset({"meta", "img", "br", "path", "use"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.addresses, self._open = "", [], []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_page_shows_results_and_settings(report):
    parsed = PageParser(report.read_text())
    for expected in ("run <&>", "status finished", "step-00000012", "Prediction loss", "Time per step",
                     "mrr_default, step 12, seed 0", "0.4321", "0.4000 to 0.4600", "untrained <predictor>",
                     "optim.global_batch_size", "all settings"):  # fmt: skip
        assert expected in parsed.text, expected


def test_a_page_needs_no_network(report):
    parsed = PageParser(report.read_text())
    assert all(address.startswith(("data:", "#")) for address in parsed.addresses)
    assert not re.search(r"url\(\s*['\"]?http|@import|<script|<link", report.read_text())


def test_charts_use_the_colours_of_the_page(report):
    text = report.read_text()
    assert "var(--series-1)" in text and not re.search(r"#0102\d\d", text)


def test_a_damaged_row_of_metrics_is_left_out(report, tmp_path):
    folder = shutil.copytree(report.parent, tmp_path / "damaged")
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes().replace(b'"step"', b'"sdep"', 1).replace(b"wait_s", b"wai4_s", 1))
    assert len(PageParser(write_run_report(folder).read_text()).text) > 1000


def test_results_have_a_column_for_each_arm_and_a_curve_over_checkpoints(report, tmp_path):
    folder = shutil.copytree(report.parent, tmp_path / "evaluated")
    for step, name in ((4, "finetune-step-00000004"), (12, "finetune")):
        rows = [Row(subject=arm, metric="accuracy", value=step / 100, control=0.01, num_tuned=num_tuned)
                for arm, num_tuned in (("predictor", 1234), ("encoder", 0))]  # fmt: skip
        save_result(folder, Result(task="finetune", name=name, rows=tuple(rows), step=step, seed=0, settings={}))
    text = write_run_report(folder).read_text()
    assert re.search(r"<th[^>]*></th><th[^>]*>predictor</th><th[^>]*>encoder</th>", text)
    assert re.search(r"<td[^>]*>trained parameters</td><td[^>]*>1,234</td><td[^>]*></td>", text)
    assert text.count("finetune of several checkpoints") == 1


def test_attempts_with_several_numbers_of_trained_parameters_give_a_curve(report, tmp_path):
    folder = shutil.copytree(report.parent, tmp_path / "attempts")
    for blocks, num_tuned in ((1, 1234), (None, 98765)):
        rows = [
            Row(subject=arm, metric="accuracy", value=0.5, low=0.4, high=0.6, num_tuned=count)
            for arm, count in (("predictor", num_tuned), ("attentive", 77))
        ]
        settings = {"data": {"label": "cls"}, "tune": {"blocks": blocks}}
        result = Result(task="finetune", name=f"finetune_{blocks}", rows=tuple(rows), step=12, seed=0, settings={})
        save_result(folder, replace(result, settings=settings))
        # One number of trained parameters is no curve, and results on other data do not belong to one.
        save_result(folder, replace(result, name=f"other_{blocks}", settings={"data": {"label": str(blocks)}}))
    text = write_run_report(folder).read_text()
    (curve,) = re.findall(r"<h3>accuracy against trained parameters</h3>.*?</table>", text, re.DOTALL)
    lines = [re.sub("<[^>]*>", " ", line).split() for line in re.findall("<tr>.*?</tr>", curve)[1:]]
    assert [line[:4] for line in lines] == [
        ["predictor", "finetune_1", "1", "1,234"],
        ["predictor", "finetune_None", "all", "98,765"],
        ["attentive", "finetune_1", "none", "77"],
        ["attentive", "finetune_None", "none", "77"],
    ]
    assert lines[0][4:] == ["0.5000", "0.4000", "to", "0.6000"] and curve.count("<svg") == 1


def test_a_setting_out_of_range_names_the_run(report, tmp_path):
    folder = shutil.copytree(report.parent, tmp_path / "changed")
    config = folder / "config.yaml"
    config.write_text(re.sub("log_every: .*", "log_every: 0", config.read_text()))
    with pytest.raises(ValueError, match="log_every") as error:
        write_run_report(folder)
    assert f"these are the settings of the run in {str(folder)!r}" in error.value.__notes__


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        write_run_report(tmp_path)


def test_text_is_escaped_and_numbers_are_aligned_to_the_right():
    text = table(["name", "value"], [("<b>", "0.5"), ("x & y", "-1")])
    assert "&lt;b&gt;" in text and "x &amp; y" in text and text.count('class="number"') == 3
    assert "<b>1</b>" in metric_tiles({"steps": "1"}) and PageParser(page("<t>", ["<p>x</p>"])).text.count("<t>") == 1


COMPARISONS = [
    ForestRow(label="a - b", mean=0.1, low=0.05, high=0.15, differences=[0.08, 0.12]),
    ForestRow(label="b - c", mean=-0.1, low=-math.inf, high=math.inf, differences=[-0.1]),
]


INTERVALS = IntervalChart(
    title="accuracy",
    note="of arms",
    x_label="trained parameters",
    y_label="accuracy",
    series={str(arm): [IntervalPoint(10, 0.5, 0.4, 0.6), IntervalPoint(5, 0.4, 0.3, 0.5)] for arm in range(6)},
)


def test_charts_are_complete_svg_elements_and_reproducible():
    for draw in (
        lambda: draw_line_chart({"a": ([0, 1], [1.0, 2.0]), "b": ([0, 1], [2.0, 1.0])}, unit="u"),
        lambda: draw_waterfall_chart({"forward": 2.0, "wait": 0.0}, unit="ms"),
        lambda: draw_forest_plot(COMPARISONS, bound=-0.02, unit="MRR"),
        lambda: draw_scatter_chart([(0.1, 0.2), (0.3, 0.1)], x_label="MRR", y_label="accuracy"),
        lambda: draw_plot(INTERVALS),
    ):
        chart = draw()
        assert chart.startswith("<svg") and chart.rstrip().endswith("</svg>") and chart == draw()
        assert " width=" not in chart.split(">", 1)[0]


def test_interval_charts_have_any_number_of_series_and_intervals_beside_their_values():
    series = {str(arm): [IntervalPoint(10, 0.25, 0.27, 0.345)] for arm in range(13)}
    assert draw_plot(replace(INTERVALS, series=series)).startswith("<svg")


def test_a_forest_plot_is_saved_as_a_png_file(tmp_path):
    groups = [
        ForestGroup(title=title, verdict="holds", note="the paper: 0.8", bound=-0.02, rows=COMPARISONS)
        for title in ("one", "two")
    ]
    save_forest_plot(tmp_path / "deep" / "claims.png", groups, unit="difference")
    with Image.open(tmp_path / "deep" / "claims.png") as picture:
        assert picture.format == "PNG" and picture.width == 1199


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: chromium)")
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_shows_the_page_without_scrolling_sideways(report, tmp_path, width):
    copy = tmp_path / "page.html"
    # The script writes the measured sizes into the title, where --dump-dom prints them.
    probe = (
        "<script>addEventListener('load', () => { document.title = JSON.stringify({width: innerWidth, "
        "page: document.documentElement.scrollWidth, svg: [...document.querySelectorAll('svg')].map(s => "
        "s.getBoundingClientRect().width), text: document.body.innerText.length}) })</script>"
    )
    copy.write_text(report.read_text().replace("</head>", probe + "</head>"))
    command = [
        BROWSER,
        *OPTIONS,
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},1200",
        "--dump-dom",
    ]
    output = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    title = re.search(r"<title>(\{.*?\})</title>", output.stdout)
    assert title, output.stdout[:500]
    sizes = json.loads(title[1])
    assert sizes["page"] <= sizes["width"] and sizes["text"] > 500
    assert len(sizes["svg"]) >= 5 and all(100 < width <= sizes["width"] for width in sizes["svg"])
