"""Rooflines, tiles and occupancy against numbers calculated independently."""

import pytest
import torch

from benchmarks.harness import rooflines
from benchmarks.harness.records import BACKWARD, BOTH, FORWARD
from benchmarks.kernels import compiler_report
from iwm_fast.kernels.attention.kernels import LaunchConfig, _attention_forward, build_launches
from iwm_fast.kernels.attention.sequences import Sequences


def milliseconds(num_bytes):
    return 1e3 * num_bytes / rooflines.H200_BYTES_PER_S


@pytest.mark.parametrize(
    ("length", "head_dim", "forward_ms", "backward_ms"),
    [
        (64, 32, 0.048, 0.082),
        (196, 32, 0.146, 0.251),
        (256, 32, 0.190, 0.328),
        (128, 64, 0.189, 0.328),
        (196, 64, 0.289, 0.502),
        (212, 64, 0.313, 0.543),
        (256, 64, 0.377, 0.655),
    ],
)
def test_attention_moves_four_tensors_forward_and_seven_backward(length, head_dim, forward_ms, backward_ms):
    costs = rooflines.attention_costs([length] * 1024, 12, head_dim)
    assert milliseconds(costs[FORWARD].bytes) == pytest.approx(forward_ms, abs=5e-4)
    # The expected figures ignore the log-sum-exp, a 56th of the seven tensors at d = 32.
    assert milliseconds(costs[BACKWARD].bytes) == pytest.approx(backward_ms, rel=0.01)


def test_attention_multiplies_twice_forward_and_five_times_backward():
    costs = rooflines.attention_costs([196] * 1024, 12, 64)
    assert costs[FORWARD].flops == 4 * 1024 * 12 * 196**2 * 64
    assert costs[BACKWARD].flops / 1e9 == pytest.approx(302, abs=0.5)
    assert costs[BOTH].bytes == costs[FORWARD].bytes + costs[BACKWARD].bytes


def test_costs_of_packed_sequences_add_up():
    cost = rooflines.attention_costs([3, 5], 2, 32)[FORWARD]
    assert cost.flops == 4 * 2 * 32 * (9 + 25)
    assert cost.bytes == 4 * (8 * 2 * 32 * 2) + 4 * 8 * 2


def test_a_norm_moves_12_bytes_per_element_forward_and_16_backward():
    costs = rooflines.norm_costs(1000, 384)
    assert costs[FORWARD].bytes == 12 * 384_000 + 8000
    assert costs[BACKWARD].bytes == 16 * 384_000 + 8000


def test_conditioning_reads_and_writes_rows_once():
    rows = 256 * 98, 256 * 98, 256 * 5
    sequence = rooflines.conditioning_costs(rows, 384, has_mixer=False)[FORWARD]
    # The context is read in bfloat16, tokens in float32. All packed rows are written in float32.
    assert sequence.bytes == 384 * (2 * rows[0] + 4 * rows[2] + 4 * sum(rows))
    feature = rooflines.conditioning_costs((*rows[:2], 0), 384, has_mixer=True)
    assert feature[FORWARD].flops / 1e9 == pytest.approx(14.8, abs=0.05)
    assert feature[BACKWARD].flops == 2 * feature[FORWARD].flops


@pytest.mark.parametrize(("length", "tile", "waste"), [(196, 192, 3.84), (196, 128, 1.71), (256, 128, 1.0)])
def test_square_tiles_compute_scores_beyond_the_length(length, tile, waste):
    assert rooflines.square_tile_waste(length, tile) == pytest.approx(waste, abs=0.005)


def launch_of(config, length):
    qkv = torch.empty(length, 3, 1, 64, dtype=torch.bfloat16, device="meta")
    return build_launches(_attention_forward, (config,), qkv, Sequences.of_equal_length(length), {})[0]


def test_waste_of_a_launch_follows_from_its_bucket_and_queries():
    config = LaunchConfig(((128, 64), (128, 64, 16)), 64, 4, 1)
    launch = launch_of(config, 196)
    # The launch computes 208 keys times 256 queries.
    assert rooflines.launch_waste([launch], 196) == pytest.approx(1.39, abs=0.005)
    assert rooflines.scores_computed(launch, 192) == 192 * 192
    assert rooflines.scores_computed(launch, 209) == 0, "no bucket holds this length"
    assert rooflines.launch_waste([launch_of(config._replace(num_queries=16), 196)], 196) == pytest.approx(
        1.13, abs=0.005
    )


@pytest.mark.parametrize("arch", compiler_report.ARCHITECTURES)
@pytest.mark.parametrize("length", compiler_report.WASTE_LENGTHS)
def test_shipped_launches_compute_every_score(arch, length):
    for launches in compiler_report.dense_launches(arch, length, 64):
        # On GPUs that multiply from registers, heads of 64 have no kernel for more than 128 keys.
        assert rooflines.launch_waste(launches, length) >= 1 or (arch == 80 and length > 128 and not launches)


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "num_warps", "arch", "programs"),
    [
        (128, 20_000, 4, 90, 4),  # 16 warps of 32 threads with 128 registers use all 64 K.
        (129, 20_000, 4, 90, 3),  # Rounded up to 136 registers per thread, three warps fit into a quarter.
        (168, 30_720, 4, 90, 3),
        (255, 0, 8, 90, 1),
        (32, 0, 4, 90, 16),  # The limit is 64 warps.
        (32, 139_520, 8, 90, 1),
        (32, 113 * 1024, 8, 90, 2),
        (32, 113 * 1024, 8, 80, 1),
        (16, 0, 1, 90, 32),
    ],
)
def test_number_of_programs_per_multiprocessor(registers, shared_bytes, num_warps, arch, programs):
    assert rooflines.programs_per_multiprocessor(registers, shared_bytes, num_warps, arch) == programs
