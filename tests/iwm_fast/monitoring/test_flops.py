"""Arithmetic and memory told beforehand, against what torch counts and keeps."""

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

# of equal length in every image: the plain attention pads to the longest
CONTEXT, TARGET = [[0, 1, 4, 5, 8, 9, 15]] * 3, [[2, 3, 6, 7]] * 3
COUNTS = PatchCounts(context=np.array([7] * 3), target=np.array([4] * 3))


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(("conditioning", "depth"), [("feature", 2), ("sequence", 2), ("none", 3), ("none", 0)])
def test_a_forward_pass_takes_what_torch_counts(tiny_config, make_batch, conditioning, depth):
    config = tiny_config(conditioning=conditioning, predictor_depth=depth)
    student, batch = build_student(config, REFERENCE), make_batch(CONTEXT, TARGET)
    told = encoder_flops(config.model.encoder, COUNTS.context) + predictor_flops(config, COUNTS)
    assert counted(lambda: student(batch)) == 3 * told
    assert counted(lambda: student.encoder(batch.target_view, None)) == 3 * encoder_flops(
        config.model.encoder, np.array([16])
    )


def test_training_takes_three_forward_passes_but_for_the_pixels_gradient(tiny_config, make_batch):
    config = tiny_config()
    student, batch = build_student(config, REFERENCE), make_batch(CONTEXT, TARGET)
    told = 9 * (encoder_flops(config.model.encoder, COUNTS.context) + predictor_flops(config, COUNTS))
    found = counted(lambda: student(batch).predicted_tokens.sum().backward())
    # no image and no action needs a gradient, nor does the mixer's first layer to the fixed positions
    assert 0.93 * told < found <= told


def test_masks_of_one_size_are_no_special_case_of_the_mean():
    config, counts = RunConfig(), patch_counts(RunConfig())
    assert 96 < counts.context.mean() < 109 and 87 < counts.target.mean() < 100
    assert (counts.context + counts.target == 196).all()
    at_the_mean = encoder_flops(config.model.encoder, np.array([round(counts.context.mean())]))
    assert training_flops(config).encoder / 3 == pytest.approx(at_the_mean, rel=0.02)


def sized(dim: int, depth: int, heads: int, predictor: tuple[int, int, int]) -> RunConfig:
    parts = ("dim", "depth", "num_heads")
    encoder = EncoderConfig(dim=dim, depth=depth, num_heads=heads)
    return RunConfig(
        model=ModelConfig(encoder=encoder, predictor=PredictorConfig(**dict(zip(parts, predictor, strict=True))))
    )


@pytest.mark.parametrize(
    ("config", "teacher", "total"),
    [
        # GFLOP of a whole forward pass as commonly listed, and of training: 3 x (context) + 1 x + 3 x (predictor)
        (sized(384, 12, 6, (192, 12, 6)), 9.1, 30.3),
        (sized(768, 12, 12, (384, 12, 12)), 34.9, 115.8),
        (sized(768, 12, 12, (384, 18, 12)), 34.9, 129.4),
        (sized(1024, 24, 16, (512, 36, 16)), 122.5, 452.6),
    ],
)
def test_known_sizes_take_known_work(config, teacher, total):
    found = training_flops(config)
    assert found.teacher / 1e9 == pytest.approx(teacher, abs=0.1)
    assert found.total / 1e9 == pytest.approx(total, rel=1e-3)
    assert found.total == found.encoder + found.teacher + found.predictor


def test_the_identity_predictor_is_free():
    model = ModelConfig(predictor=PredictorConfig(depth=0))
    assert training_flops(RunConfig(model=model)).predictor == 0


def test_the_peak_is_known_by_name_and_unknown_elsewhere():
    names = {
        "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12, "NVIDIA L40S": 362e12, "NVIDIA GeForce RTX 4090": 165e12,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None, "Tesla T4": None,
    }  # fmt: skip
    assert {name: peak_of(name) for name in names} == names
    assert peak_of("NVIDIA H100 80GB HBM3", "fp32") == 67e12
    assert peak_flops(torch.device("cpu")) == (None, "CPU")


def test_float32_products_count_as_tf32_where_torch_may_round_to_it():
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_of("NVIDIA A100-SXM4-80GB", "fp32") == 156e12
    finally:
        torch.set_float32_matmul_precision("highest")


def kept_bytes(student: torch.nn.Module, batch) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, beside the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = student(batch)
    total = sum(storage.nbytes() for storage in kept.values())
    del output
    return total


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_forward_pass_keeps_about_the_bytes_that_are_told(tiny_config, make_batch, precision):
    config = tiny_config(conditioning="none", precision=precision)
    encoder = dataclasses.replace(config.model.encoder, dim=64, depth=6)
    predictor = dataclasses.replace(config.model.predictor, dim=32, depth=6)
    config = dataclasses.replace(config, model=ModelConfig(encoder=encoder, predictor=predictor))
    images, student = 32, build_student(config, REFERENCE)
    sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in (student.encoder, student.predictor)]
    told = estimate_memory(
        config, COUNTS, num_parameters=tuple(sizes), world_size=1, micro_batch_size=images, stage=0,
        checkpoints_activations=False,
    )  # fmt: skip
    found = kept_bytes(student, make_batch(CONTEXT[:1] * images, TARGET[:1] * images))
    assert found == pytest.approx(told.activations + told.bf16_copies, rel=0.05)


def test_stages_shard_what_they_are_named_after():
    def at(stage: int, ranks: int):
        return estimate_memory(
            RunConfig(), COUNTS, num_parameters=(80, 20), world_size=ranks, micro_batch_size=1, stage=stage,
            checkpoints_activations=False,
        )  # fmt: skip

    # float32: weights, gradients, two moments; stages 1 and 2 keep a copy of the part that they update
    assert [at(stage, 4).weights for stage in range(4)] == [400, 400, 400, 100]
    assert [at(stage, 4).gradients for stage in range(4)] == [400, 400, 100, 100]
    assert [at(stage, 4).adam for stage in range(4)] == [800, 300, 300, 200]
    assert {at(stage, 4).teacher for stage in range(4)} == {320}
    assert at(3, 1).weights == at(0, 1).weights
