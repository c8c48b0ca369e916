"""The report: tables of records, and no figure that was not measured."""

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
    fields = {"what": "attention", "shape": SHAPE, "pass_": "forward", "machine": GPU, "dtype": "bfloat16"}
    return Record(provider=provider, median_ms=median_ms, **(fields | values))


COUNTS = ("registers", "shared_bytes", "fast_products", "matrix_products", "warps", "stages", "programs")
LAUNCH = dict.fromkeys(COUNTS, 7)
OFFLINE = Record(
    what="launch",
    provider="fused",
    shape={"arch": 90, "module": "ragged_attention", "launch": "some launch"},
    figures=LAUNCH | {"spill_bytes": 8},
    machine={"triton": "3.6.0"},
)


def kernel_goals(records):
    return {(goal.text, goal.pass_): goal.verdict(records) for goal in kernel_tables.GOALS}


def test_without_results_all_goals_are_unmeasured():
    text = report.render([])
    num_goals = sum(len(report.GOALS) for report in (kernel_tables, pipeline_tables, step_tables, feature_tables))
    # The text occurs once per goal, for each of the four benchmarks, and for the offline figures.
    assert text.count(goals.NOT_MEASURED) == num_goals + 4 + 1


def test_offline_figures_are_shown_without_times():
    text = report.render(offline=[OFFLINE])
    assert "On a GPU: not yet measured." in text
    assert "some launch" in text and "triton 3.6.0, sm_90: 1 launches, 1 spill." in text
    # 196 rows are 208 keys and 256 queries; four tensors of 256 x 12 x 196 x 64 half-precision numbers take 0.072 ms.
    assert "1.39" in text and "0.072" in text


def test_goals_are_ratios_of_one_run():
    records = [timing("fused", 0.10, share_of_floor=0.8), timing("cuDNN", 0.15), timing("FA2", None, failure="no")]
    rows = kernel_goals(records)
    assert rows["attention N=196 d=64: cuDNN / fused", "forward"] == ["at least 1.3", "1.50", "yes"]
    assert rows["attention N=196 d=64: share of copy bandwidth", "forward"] == ["at least 0.71", "0.80", "yes"]
    assert rows["attention N=196 d=64: cuDNN / fused", "backward"][1] == goals.NOT_MEASURED
    text = report.render(records)
    assert "## NVIDIA X" in text and "| 35 %" in text and "0.100 (80 %)" in text and "error" in text
    assert "attention N=196 d=64 H=12 B=256 forward, FA2: no" in text
    # A later run of the fused operation alone is not compared with the baseline of an earlier run.
    later = dataclasses.replace(records[0], machine=GPU | {"run": "2026-02-01T00:00:00"})
    assert "| 1.50" not in report.render([*records, later])


def test_a_missing_provider_leaves_a_goal_unmeasured():
    assert kernel_tables.GOALS[0].metric([timing("fused", 0.1, shape=SHAPE | {"d": 32})]) is None
    assert kernel_tables.GOALS[0].metric([timing("cuDNN", 0.1, shape=SHAPE | {"d": 32})]) is None


@pytest.mark.parametrize(("error", "plain", "worst"), [(0.02, 0.01, 2.0), (0.004, 1e-7, 0.8)])
def test_errors_are_relative_to_plain_bfloat16_or_rounding(error, plain, worst):
    checks = [timing(name, None, what="attention error", pass_="", figures={"out": value})
              for name, value in (("fused", error), ("plain", plain))]  # fmt: skip
    assert kernel_tables.worst_error(checks) == pytest.approx(worst)
    assert f"{error:.1e}" in kernel_tables.errors(checks)


def test_numbers_are_aligned_to_the_right_and_words_to_the_left():
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
    """Return the record of a stream that keeps all cores busy."""
    figures = {"images_per_s": images_per_s, "images_per_s_per_core": images_per_s / 16}
    figures["cpu_ms_per_image"] = 16e3 / images_per_s
    figures |= {"batch_p50_ms": 1.0, "batch_p99_ms": 2.0}
    times = {"median_ms": 64e3 / images_per_s, "p20_ms": 60e3 / images_per_s, "p80_ms": 70e3 / images_per_s}
    return Record(what=what, provider=provider, shape=VIEWS | shape, figures=figures, machine=machine, **times)


def goal(records, text):
    (goal,) = [goal for goal in pipeline_tables.GOALS if text in goal.text]
    return tuple(goal.verdict(records))


def test_our_loader_is_compared_by_cpu_time_with_the_fastest_baselines_from_memory():
    slow, fast = "webdataset + torchvision, tensors", "webdataset + torchvision, Pillow"
    dali = "DALI webdataset, DALI's operators"
    records = [
        stream("ours", 10_000), stream(slow, 1600), stream(fast, 2000), stream(dali, 4000),
        stream("ours, action log", 10), stream("ours", 10, **{"from": "disk"}),
    ]  # fmt: skip
    assert goal(records, "two views on a CPU") == ("at most 1.75", "1.60", "yes")
    assert goal(records, "torchvision / ours") == ("at least 3.5", "5.00", "yes")
    assert goal(records, "DALI's webdataset pipeline / ours") == ("at least 2.2", "2.50", "yes")
    assert goal(records[1:], "torchvision / ours")[1] == goals.NOT_MEASURED
    broken = dataclasses.replace(records[2], figures={}, median_ms=None, failure="RuntimeError: no")
    assert goal([*records[:2], broken], "torchvision / ours")[1] == "6.25"
    on_gpu = [stream(record.provider, 1, CPU | {"gpu": "NVIDIA X"}) for record in records]
    assert goal(on_gpu, "torchvision / ours")[1] == goals.NOT_MEASURED


def test_the_share_of_the_action_log_is_relative_to_the_time_of_all_cores():
    log = Record(
        what="action log", provider="ours, action log", shape={}, figures={"cpu_us_per_image": 40.0}, machine=CPU
    )
    # 200 images per second and core are 5000 us per image and core.
    assert goal([stream("ours", 3200), log], "action log") == ("at most 1", "0.80", "yes")
    assert goal([log], "action log")[1] == goals.NOT_MEASURED


def test_the_goal_for_a_gpu_needs_a_gpu_and_limits_the_cores():
    gpu = CPU | {"gpu": "NVIDIA X"}
    text = "two views on a GPU"
    assert goal([stream("ours", 1e4)], text)[1] == goals.NOT_MEASURED
    assert goal([stream("ours", 1e4, gpu | {"cores": 17})], text)[1] == goals.NOT_MEASURED
    sweep = stream("ours", 9500, gpu, what="two views, decoder sweep", hw_decoder_load="0.5")
    assert goal([stream("ours", 8000, gpu), sweep], text) == ("at least 9,000", "9500.00", "yes")


def test_loader_memory_and_opening_shards_have_goals():
    grown = Record(what="memory", provider="ours", shape={}, figures={"growth_percent": 2.5}, machine=CPU)
    opened = Record(what="opening shards", provider="ours", shape={}, median_ms=1200.0, machine=CPU)
    assert goal([grown], "growth") == ("at most 2", "2.50", "no")
    assert goal([opened], "opening 1,000 shards") == ("at most 0.5", "1.20", "no")


def test_each_machine_has_its_own_section():
    cold = stream("ours", 2000, **{"from": "disk"})
    partly_cached = dataclasses.replace(
        cold, provider="DALI webdataset", figures=cold.figures | {"share_left_in_memory": 0.5}
    )
    failed = Record(what="two views", provider="peer", shape=VIEWS, failure="RuntimeError: no", machine=CPU)
    on_gpu = stream("ours", 9000, CPU | {"gpu": "NVIDIA X"})
    text = report.render(pipelines=[stream("ours", 3200), cold, partly_cached, failed, on_gpu])
    assert "## AMD X, 16 cores" in text and "## NVIDIA X, AMD X, 16 cores" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "| two views | memory | ours | 5.00 | 3200 | 2926-3413 | 200 | 1.0 | 2.0 |" in lines
    assert any(line.startswith("| two views | disk, partly memory | DALI webdataset |") for line in lines)
    assert any(line.startswith("- two views") and "RuntimeError: no" in line for line in lines)
    assert "On a GPU: not yet measured." in text, "there are no fused operations"


def test_the_committed_readme_matches_the_committed_results():
    assert report.README.read_text(encoding="utf-8") == report.committed_readme(), "run python -m benchmarks.report"
