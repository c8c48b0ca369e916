"""The report: tables from lines, and no number where none was measured."""

import dataclasses

import pytest

from benchmarks import report
from benchmarks.features import report as feature_tables
from benchmarks.harness import goals, tables
from benchmarks.harness.records import Record
from benchmarks.kernels import report as kernel_tables
from benchmarks.pipelines import report as pipeline_tables
from benchmarks.train_step import report as step_tables

GPU = {"gpu": "NVIDIA X", "run": "2026-01-01T00:00:00", "command": "python -m benchmarks.kernels"}
SHAPE = {"N": 196, "d": 64, "H": 12, "B": 256}


def timing(provider, median_ms, **values):
    fields = {"what": "attention", "shape": SHAPE, "pass_": "forward", "machine": GPU}
    return Record(provider=provider, median_ms=median_ms, **(fields | values))


def figures(what, shape, **values):
    return Record(what=what, provider="fused", shape=shape, figures=values, machine={"gpu": None, "torch": "2"})


COUNTS = ("registers", "shared_bytes", "fast_products", "matrix_products", "warps", "stages", "programs")
LAUNCH = dict.fromkeys(COUNTS, 7)
SQUARES = {"128x128": 1.7, "192x192": 3.8}
OFFLINE = [
    figures("launch", {"arch": 90, "module": "ragged_attention", "launch": "some launch"}, spill_bytes=8, **LAUNCH),
    figures("tile waste", {"arch": 90, "d": 64, "N": 196}, forward=1.39, backward=1.5, **SQUARES),
    figures("binaries", {"arch": 90, "d": 64, "N": "50-400"}, kernels=8),
    figures("floor", {"task": "attention", "N": 196}, bytes_ms=0.289, flops_ms=0.153),
]


def kernel_goals(records):
    return {(one.text, one.pass_): one.verdict(records) for one in kernel_tables.GOALS}


def test_without_results_nothing_is_claimed():
    text = report.render([])
    of_goals = sum(len(one.GOALS) for one in (kernel_tables, pipeline_tables, step_tables, feature_tables))
    # the four benchmarks, and the offline figures
    assert text.count(goals.NOT_YET) == of_goals + 4 + 1


def test_offline_figures_stand_beside_times_not_yet_measured():
    text = report.render(OFFLINE)
    assert "On a GPU: not yet measured." in text
    assert "some launch" in text and "sm_90: 1 launches, 1 spill." in text
    assert "1.39" in text and "8 kernels for N=50-400 at d=64" in text and "0.2890" in text


def test_goals_are_ratios_of_one_run():
    found = [timing("fused", 0.10, share_of_floor=0.8), timing("cuDNN", 0.15), timing("FA2", None, failure="no")]
    rows = kernel_goals(found)
    assert rows["attention N=196 d=64: cuDNN / fused", "forward"] == ["at least 1.3", "1.50", "yes"]
    assert rows["attention N=196 d=64: fused / byte floor", "forward"] == ["at most 1.4", "1.25", "yes"]
    assert rows["attention N=196 d=64: cuDNN / fused", "backward"][1] == goals.NOT_YET
    text = report.render(found)
    assert "## NVIDIA X" in text and "0.100 (80 %)" in text and "raises" in text
    assert "attention N=196 d=64 H=12 B=256 forward, FA2: no" in text
    # a later run of the fused operation alone is not compared with an earlier run's peer
    later = dataclasses.replace(found[0], machine=GPU | {"run": "2026-02-01T00:00:00"})
    assert "| 1.50" not in report.render([*found, later])


def test_a_failed_peer_or_a_missing_one_meets_no_goal():
    assert kernel_tables.GOALS[0].measured([timing("fused", 0.1, shape=SHAPE | {"d": 32})]) is None
    assert kernel_tables.GOALS[0].measured([timing("cuDNN", 0.1, shape=SHAPE | {"d": 32})]) is None


@pytest.mark.parametrize(("error", "plain", "worst"), [(0.02, 0.01, 2.0), (0.004, 1e-7, 0.8)])
def test_errors_are_told_relative_to_plain_bfloat16_and_rounding(error, plain, worst):
    checks = [timing(name, None, what="attention error", pass_="", figures={"out": value})
              for name, value in (("fused", error), ("plain", plain))]  # fmt: skip
    assert kernel_tables.worst_error(checks) == pytest.approx(worst)
    assert f"{error:.1e}" in kernel_tables.errors(checks)


def test_a_new_length_tells_what_was_compiled():
    values = {"mean_ms": 1.0, "longest_ms": 2.0, "first_calls_ms": 3.0, "calls": 200, "compilations": 0}
    one = timing("fused", 0.9, p80_ms=1.1, what="new lengths", pass_="forward+backward", figures=values)
    assert "|   200 |" in kernel_tables.sections([one])
    assert kernel_goals([one])["new length every call: compilations", "forward+backward"] == [
        "at most 0",
        "0.00",
        "yes",
    ]


def test_numbers_stand_to_the_right_and_words_to_the_left():
    text = tables.table(["name", "ms"], [["a", "1.5"], ["bcdef", "10.25"]])
    assert text.splitlines() == [
        "| name  |    ms |",
        "| ----- | ----: |",
        "| a     |   1.5 |",
        "| bcdef | 10.25 |",
    ]


CPU = {"cpu": "AMD X", "cores": 16, "run": "2026-01-01T00:00:00", "command": "python -m benchmarks.pipelines"}
VIEWS = {"from": "memory", "B": 64, "threads": 16, "image": "500x375, 110 KB", "view": 224}


def stream(provider, images_per_s, machine=CPU, what="two views", **shape):
    figures = {"images_per_s": images_per_s, "images_per_s_per_core": images_per_s / 16}
    figures |= {"batch_p50_ms": 1.0, "batch_p99_ms": 2.0}
    times = {"median_ms": 64e3 / images_per_s, "p20_ms": 60e3 / images_per_s, "p80_ms": 70e3 / images_per_s}
    return Record(what=what, provider=provider, shape=VIEWS | shape, figures=figures, machine=machine, **times)


def goal(records, text):
    (found,) = [one for one in pipeline_tables.GOALS if text in one.text]
    return tuple(found.verdict(records))


def test_ours_is_compared_with_the_fastest_peer_from_memory():
    slow, fast = "webdataset + torchvision, tensors", "webdataset + torchvision, Pillow"
    found = [stream("ours", 3200), stream(slow, 800), stream(fast, 1000), stream("ours", 10, **{"from": "disk"})]
    assert goal(found, "two views: ours") == ("at least 3", "3.20", "yes")
    assert goal(found[1:], "two views: ours")[1] == goals.NOT_YET
    broken = dataclasses.replace(found[2], figures={}, median_ms=None, failure="RuntimeError: no")
    assert goal([found[0], found[1], broken], "two views: ours")[1] == "4.00"


def test_the_logs_share_is_its_time_over_that_of_all_cores():
    log = Record(
        what="action log", provider="ours, action log", shape={}, figures={"cpu_us_per_image": 40.0}, machine=CPU
    )
    # 200 images per second and core: 5000 us for each
    assert goal([stream("ours", 3200), log], "action log") == ("at most 1", "0.80", "yes")
    assert goal([log], "action log")[1] == goals.NOT_YET


def test_a_gpus_goal_counts_only_there_and_only_with_so_many_cores():
    gpu = CPU | {"gpu": "NVIDIA X"}
    text = "two views on a GPU"
    assert goal([stream("ours", 1e4)], text)[1] == goals.NOT_YET
    assert goal([stream("ours", 1e4, gpu | {"cores": 17})], text)[1] == goals.NOT_YET
    swept = stream("ours", 9500, gpu, what="two views, decoder sweep", hw_decoder_load="0.5")
    assert goal([stream("ours", 8000, gpu), swept], text) == ("at least 9,000", "9500.00", "yes")


def test_memory_and_opening_have_goals_of_their_own():
    grown = Record(what="memory", provider="ours", shape={}, figures={"growth_percent": 2.5}, machine=CPU)
    opened = Record(what="opening shards", provider="ours", shape={}, median_ms=1200.0, machine=CPU)
    assert goal([grown], "growth") == ("at most 2", "2.50", "no")
    assert goal([opened], "opening") == ("at most 5", "1.20", "yes")


def test_every_machines_data_line_has_its_table_beside_the_fused_operations():
    cold = stream("ours", 2000, **{"from": "disk"})
    doubtful = dataclasses.replace(
        cold, provider="DALI webdataset", figures=cold.figures | {"share_left_in_memory": 0.5}
    )
    failed = Record(what="two views", provider="peer", shape=VIEWS, failure="RuntimeError: no", machine=CPU)
    elsewhere = stream("ours", 9000, CPU | {"gpu": "NVIDIA X"})
    text = report.render([], [stream("ours", 3200), cold, doubtful, failed, elsewhere])
    assert "## AMD X, 16 cores" in text and "## NVIDIA X, AMD X, 16 cores" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "| two views | memory | ours | 3200 | 2926-3413 | 200 | 1.0 | 2.0 |" in lines
    assert any(line.startswith("| two views | disk, or memory | DALI webdataset |") for line in lines)
    assert any(line.startswith("- two views") and "RuntimeError: no" in line for line in lines)
    assert "On a GPU: not yet measured." in text, "of the fused operations"


def test_the_committed_readme_is_what_the_results_say():
    assert report.README.read_text(encoding="utf-8") == report.committed_readme(), "run python -m benchmarks.report"
