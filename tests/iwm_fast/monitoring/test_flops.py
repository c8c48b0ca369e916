"""Estimates of FLOPs and memory, compared with what PyTorch counts and keeps."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from iwm_fast.config.run import EncoderConfig, ModelConfig, PredictorConfig, RunConfig
from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models.student import build_student
from iwm_fast.monitoring.flops import (
    PatchCounts,
    encoder_flops,
    patch_counts,
    peak_flops,
    peak_of,
    predictor_flops,
    training_flops,
)
from iwm_fast.monitoring.memory_estimate import estimate_memory

# All images have lists of equal length, because the reference attention pads to the longest.
CONTEXT, TARGET = [[0, 1, 4, 5, 8, 9, 15]] * 3, [[2, 3, 6, 7]] * 3
COUNTS = PatchCounts(context=np.array([7] * 3), target=np.array([4] * 3))


def count_flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(("conditioning", "depth"), [("feature", 2), ("sequence", 2), ("none", 3), ("none", 0)])
def test_the_flops_of_a_forward_pass_equal_torchs_count(tiny_config, make_batch, conditioning, depth):
    config = tiny_config(conditioning=conditioning, predictor_depth=depth)
    student, batch = build_student(config, REFERENCE), make_batch(CONTEXT, TARGET)
    estimate = encoder_flops(config.model.encoder, COUNTS.context) + predictor_flops(config, COUNTS)
    assert count_flops(lambda: student(batch)) == 3 * estimate
    assert count_flops(lambda: student.encoder(batch.target_view, None)) == 3 * encoder_flops(
        config.model.encoder, np.array([16])
    )


def test_training_takes_three_forward_passes_except_for_input_gradients(tiny_config, make_batch):
    config = tiny_config()
    student, batch = build_student(config, REFERENCE), make_batch(CONTEXT, TARGET)
    estimate = 9 * (encoder_flops(config.model.encoder, COUNTS.context) + predictor_flops(config, COUNTS))
    measured = count_flops(lambda: student(batch).predicted_tokens.sum().backward())
    # Images, actions and the fixed positions need no gradient.
    assert 0.93 * estimate < measured <= estimate


def test_the_average_over_masks_is_near_the_flops_of_average_masks():
    config, counts = RunConfig(), patch_counts(RunConfig())
    assert 96 < counts.context.mean() < 109 and 87 < counts.target.mean() < 100
    assert (counts.context + counts.target == 196).all()
    at_the_mean = encoder_flops(config.model.encoder, np.array([round(counts.context.mean())]))
    assert training_flops(config).encoder / 3 == pytest.approx(at_the_mean, rel=0.02)


def run_config(dim: int, depth: int, heads: int, predictor: tuple[int, int, int]) -> RunConfig:
    names = ("dim", "depth", "num_heads")
    encoder = EncoderConfig(dim=dim, depth=depth, num_heads=heads)
    return RunConfig(
        model=ModelConfig(encoder=encoder, predictor=PredictorConfig(**dict(zip(names, predictor, strict=True))))
    )


@pytest.mark.parametrize(
    ("config", "teacher", "total"),
    [
        # GFLOP of a forward pass over all patches as commonly published, and of training.
        (run_config(384, 12, 6, (192, 12, 6)), 9.1, 30.3),
        (run_config(768, 12, 12, (384, 12, 12)), 34.9, 115.8),
        (run_config(768, 12, 12, (384, 18, 12)), 34.9, 129.4),
        (run_config(1024, 24, 16, (512, 36, 16)), 122.5, 452.6),
    ],
)
def test_the_flops_of_known_sizes_are_those_published(config, teacher, total):
    flops = training_flops(config)
    assert flops.teacher / 1e9 == pytest.approx(teacher, abs=0.1)
    assert flops.total / 1e9 == pytest.approx(total, rel=1e-3)
    assert flops.total == flops.encoder + flops.teacher + flops.predictor


def test_the_identity_predictor_takes_no_flops():
    model = ModelConfig(predictor=PredictorConfig(depth=0))
    assert training_flops(RunConfig(model=model)).predictor == 0


def test_the_peak_is_known_for_listed_gpus_only():
    names = {
        "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12, "NVIDIA L40S": 362e12, "NVIDIA GeForce RTX 4090": 165e12,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None, "Tesla T4": None,
    }  # fmt: skip
    assert {name: peak_of(name) for name in names} == names
    assert peak_of("NVIDIA H100 80GB HBM3", "fp32") == 67e12
    assert peak_flops(torch.device("cpu")) == (None, "CPU")


def test_float32_products_count_as_tf32_if_torch_may_use_it():
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_of("NVIDIA A100-SXM4-80GB", "fp32") == 156e12
    finally:
        torch.set_float32_matmul_precision("highest")


def saved_bytes(student: torch.nn.Module, batch) -> int:
    """Return the bytes that a forward pass saves for its backward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = student(batch)
    total = sum(storage.nbytes() for storage in saved.values())
    del output
    return total


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_of_activations_is_near_the_measured_bytes(tiny_config, make_batch, precision):
    config = tiny_config(conditioning="none", precision=precision)
    encoder = dataclasses.replace(config.model.encoder, dim=64, depth=6)
    predictor = dataclasses.replace(config.model.predictor, dim=32, depth=6)
    config = dataclasses.replace(config, model=ModelConfig(encoder=encoder, predictor=predictor))
    images, student = 32, build_student(config, REFERENCE)
    networks = (student.encoder, student.predictor)
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    estimate = estimate_memory(
        config, COUNTS, num_parameters=tuple(sizes), world_size=1, micro_batch_size=images, stage=0,
        checkpoints_activations=False,
    )  # fmt: skip
    measured = saved_bytes(student, make_batch(CONTEXT[:1] * images, TARGET[:1] * images))
    assert measured == pytest.approx(estimate.activations + estimate.bf16_copies, rel=0.05)


def test_each_zero_stage_shards_its_share_of_the_memory():
    def estimate(stage: int, ranks: int):
        return estimate_memory(
            RunConfig(), COUNTS, num_parameters=(80, 20), world_size=ranks, micro_batch_size=1, stage=stage,
            checkpoints_activations=False,
        )  # fmt: skip

    # Weights, gradients and two moments in float32. Stages 1 and 2 keep a copy of the partition that they update.
    assert [estimate(stage, 4).weights for stage in range(4)] == [400, 400, 400, 100]
    assert [estimate(stage, 4).gradients for stage in range(4)] == [400, 400, 100, 100]
    assert [estimate(stage, 4).adam for stage in range(4)] == [800, 300, 300, 200]
    assert {estimate(stage, 4).teacher for stage in range(4)} == {320}
    assert estimate(3, 1).weights == estimate(0, 1).weights
