"""Speed of a run: compared with hand computations, and in the log rows of a run."""

import mmap
import re
from dataclasses import replace

import pytest
import torch

from fixtures.tiny_pretraining import tiny_run
from iwm_fast.monitoring.flops import training_flops
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.monitoring.step_timer import PHASES
from iwm_fast.monitoring.throughput import ThroughputMeter, build_throughput_meter, format_rate, used_memory_mb
from iwm_fast.runtime import distributed
from iwm_fast.train import run

METER = ThroughputMeter(
    global_batch_size=2048, num_ranks=8, flops_per_image=100e9, peak_flops=1000e12, peak_name="X with bf16"
)


@pytest.mark.parametrize(("rate", "text"), [(0.1634, "0.16"), (9.06, "9.1"), (10.4, "10"), (2450.2, "2,450")])
def test_rates_below_ten_keep_two_digits(rate, text):
    assert format_rate(rate) == text


def test_speed_equals_a_hand_computation():
    # 10 steps of 2048 images in 2 s are 10,240 images/s. At 100 GFLOP per image, that is 1.024 of 8 PFLOP/s.
    assert METER.values(10, 2.0) == {
        "speed/images_per_s": 10_240.0,
        "speed/images_per_s_per_rank": 1_280.0,
        "speed/step_s": 0.2,
        "speed/mfu": pytest.approx(0.128),
    }
    assert str(METER) == "100 GFLOP per image; speed/mfu is the share of 1000 TFLOP/s per rank, X with bf16"


def test_without_a_known_peak_there_is_no_mfu():
    unknown = replace(METER, peak_flops=None)
    assert "speed/mfu" not in unknown.values(10, 2.0) and "peak of X with bf16 is not known" in str(unknown)


def test_memory_is_measured_in_millions_of_bytes():
    cpu = torch.device("cpu")
    before = used_memory_mb(cpu)
    # A memory map, because an allocator could reuse memory that the process already has.
    with mmap.mmap(-1, 50_000_000) as held:
        held.write(bytes(50_000_000))
        assert 45 < used_memory_mb(cpu) - before < 110


def test_a_log_row_has_the_time_of_each_phase(tiny_shards, tmp_path, caplog):
    caplog.set_level("INFO")
    config = tiny_run(tiny_shards, tmp_path / "run")
    run(config)
    for row in read_metrics(tmp_path / "run"):
        phases = {phase: row[f"time/{phase}_s"] for phase in PHASES}
        assert all(seconds > 0 for seconds in phases.values()), phases
        assert sum(phases.values()) + row["time/other_s"] == pytest.approx(row["speed/step_s"])
        assert row["time/slowest_rank"] == 0
        assert row["time/slowest_rank_s"] == pytest.approx(
            sum(phases[phase] for phase in ("wait", "forward", "teacher"))
        )
        assert row["data/wait_share"] == pytest.approx(phases["wait"] / row["speed/step_s"])
        assert row["memory/used_mb"] > 100 and "speed/mfu" not in row
    gflops = training_flops(config).total / 1e9
    assert re.search(
        rf"{gflops:.3g} GFLOP per image; no speed/mfu: the peak of CPU with fp32 is not known", caplog.text
    )


def test_the_throughput_meter_uses_the_runs_batch_and_ranks(tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path)
    rank_info = distributed.RankInfo(rank=1, local_rank=1, world_size=2, device=torch.device("cpu"))
    meter = build_throughput_meter(config, rank_info)
    assert (meter.global_batch_size, meter.num_ranks) == (16, 2)
    assert meter.values(1, 1.0)["speed/images_per_s_per_rank"] == 8
