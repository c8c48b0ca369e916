"""Speed of a run: by hand on round numbers, and in the log rows of a run."""

import mmap
import re
from dataclasses import replace

import pytest
import torch

from fixtures.tiny_pretraining import tiny_run
from iwm_fast.monitoring.flops import training_flops
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.monitoring.step_timer import PARTS
from iwm_fast.monitoring.throughput import ThroughputMeter, build_throughput_meter, used_memory_mb
from iwm_fast.runtime import distributed
from iwm_fast.train import run

YARDSTICK = ThroughputMeter(
    global_batch_size=2048, num_ranks=8, flops_per_image=100e9, peak_flops=1000e12, peak_name="X with bf16"
)


def test_speed_by_hand():
    # 10 steps of 2048 images in 2 s: 10,240 images/s of 100 GFLOP, so 1.024 of 8 PFLOP/s
    assert YARDSTICK.values(10, 2.0) == {
        "speed/images_per_s": 10_240.0,
        "speed/images_per_s_per_rank": 1_280.0,
        "speed/step_s": 0.2,
        "speed/mfu": pytest.approx(0.128),
    }
    assert str(YARDSTICK) == "100 GFLOP per image; speed/mfu is the share of 1000 TFLOP/s per rank, X with bf16"


def test_without_a_known_peak_no_share_of_it_is_claimed():
    unknown = replace(YARDSTICK, peak_flops=None)
    assert "speed/mfu" not in unknown.values(10, 2.0) and "peak of X with bf16 is not known" in str(unknown)


def test_memory_is_counted_in_millions_of_bytes():
    cpu = torch.device("cpu")
    before = used_memory_mb(cpu)
    # not from what an allocator has kept
    with mmap.mmap(-1, 50_000_000) as held:
        held.write(bytes(50_000_000))
        assert 45 < used_memory_mb(cpu) - before < 110


def test_a_log_row_says_where_a_steps_time_went(tiny_shards, tmp_path, caplog):
    caplog.set_level("INFO")
    config = tiny_run(tiny_shards, tmp_path / "run")
    run(config)
    for row in read_metrics(tmp_path / "run"):
        parts = {part: row[f"time/{part}_s"] for part in PARTS}
        assert all(seconds > 0 for seconds in parts.values()), parts
        assert sum(parts.values()) + row["time/other_s"] == pytest.approx(row["speed/step_s"])
        assert row["time/slowest_rank"] == 0
        assert row["time/slowest_rank_s"] == pytest.approx(sum(parts[part] for part in ("wait", "forward", "teacher")))
        assert row["data/wait_share"] == pytest.approx(parts["wait"] / row["speed/step_s"])
        assert row["memory/used_mb"] > 100 and "speed/mfu" not in row
    need = training_flops(config).total / 1e9
    assert re.search(rf"{need:.3g} GFLOP per image; no speed/mfu: the peak of CPU with fp32 is not known", caplog.text)


def test_the_yardstick_counts_the_runs_own_images_and_ranks(tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path)
    rank_info = distributed.RankInfo(rank=1, local_rank=1, world_size=2, device=torch.device("cpu"))
    yardstick = build_throughput_meter(config, rank_info)
    assert (yardstick.global_batch_size, yardstick.num_ranks) == (16, 2)
    assert yardstick.values(1, 1.0)["speed/images_per_s_per_rank"] == 8
