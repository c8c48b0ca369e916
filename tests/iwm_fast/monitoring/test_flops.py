"""Estimates of FLOPs and memory, compared with what PyTorch counts and keeps."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from iwm_fast.config.run import EncoderConfig, ModelConfig, OptimConfig, PredictorConfig, RunConfig
from iwm_fast.kernels.attention.sequences import Sequences
from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models.student import build_student
from iwm_fast.monitoring.flops import (
    KNOWN_GPUS,
    PatchCounts,
    encoder_flops,
    gpu_peak_flops,
    memory_gb_of,
    patch_counts,
    peak_flops,
    predictor_flops,
    training_flops,
)
from iwm_fast.monitoring.memory_estimate import estimate_memory, largest_micro_batch
from iwm_fast.pipelines.batch import RaggedIndex
from iwm_fast.pipelines.sampling.masks import draw_masks

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
    assert {name: gpu_peak_flops(name) for name in names} == names
    assert gpu_peak_flops("NVIDIA H100 80GB HBM3", "fp32") == 67e12
    assert peak_flops(torch.device("cpu")) == (None, "CPU")


def test_the_memory_of_listed_gpus_is_that_of_their_data_sheets():
    names = {
        "A100": 40, "NVIDIA A100-SXM4-80GB": 80, "A100-80GB": 80, "NVIDIA A100-SXM4-40GB": 40, "H100": 80,
        "NVIDIA H100 NVL": 94, "NVIDIA H200": 141, "NVIDIA GH200 480GB": 96, "NVIDIA L4": 24, "L40S": 48,
        "NVIDIA A10": 24, "NVIDIA A10G": None, "NVIDIA RTX A6000": 48, "rtx 4090": 24, "RTX 5090": 32,
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None, "Tesla T4": None,
    }  # fmt: skip
    assert {name: memory_gb_of(name) for name in names} == names
    for name in KNOWN_GPUS.replace(" or ", ", ").split(", "):
        assert gpu_peak_flops(name) and gpu_peak_flops(name, "fp32") and memory_gb_of(name)


def test_float32_products_count_as_tf32_if_torch_may_use_it():
    torch.set_float32_matmul_precision("high")
    try:
        assert gpu_peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 156e12
    finally:
        torch.set_float32_matmul_precision("highest")


def saved_bytes(networks: torch.nn.Module, forward) -> int:
    """Return the bytes that a forward pass saves for its backward pass, without the weights."""
    # Addresses do not identify storages: on the meta device all of them are 0.
    weights = {parameter.untyped_storage()._cdata for parameter in networks.parameters()}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    total = sum(storage.nbytes() for storage in saved.values())
    del output
    return total


def num_parameters(student: torch.nn.Module) -> tuple[int, ...]:
    networks = (student.encoder, student.predictor)
    return tuple(sum(parameter.numel() for parameter in network.parameters()) for network in networks)


class Flash(torch.autograd.Function):
    """Keeps what a fused attention keeps on a GPU: its input, its output and a number for each row and head."""

    @staticmethod
    def forward(ctx, qkv, sequences):
        out = qkv[:, 0].contiguous()
        ctx.save_for_backward(qkv, out, torch.empty(qkv.shape[2], len(qkv)))
        return out

    @staticmethod
    def backward(ctx, d_out):
        raise NotImplementedError


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_of_activations_is_near_the_measured_bytes(tiny_config, make_batch, precision):
    config = tiny_config(conditioning="none", precision=precision)
    encoder = dataclasses.replace(config.model.encoder, dim=64, depth=6)
    predictor = dataclasses.replace(config.model.predictor, dim=32, depth=6)
    config = dataclasses.replace(config, model=ModelConfig(encoder=encoder, predictor=predictor))
    ops = REFERENCE if precision == "fp32" else REFERENCE._replace(ragged_attention=Flash.apply)
    images, student = 32, build_student(config, ops)
    estimate = estimate_memory(
        config, COUNTS, num_parameters=num_parameters(student), world_size=1, micro_batch_size=images, stage=0,
        checkpoints_activations=False,
    )  # fmt: skip
    batch = make_batch(CONTEXT[:1] * images, TARGET[:1] * images)
    measured = saved_bytes(student, lambda: student(batch))
    assert measured == pytest.approx(estimate.activations + estimate.bf16_copies, rel=0.05)


def ragged_on_meta(mask: np.ndarray) -> RaggedIndex:
    lengths = mask.sum(axis=1)
    rows = torch.empty(mask.sum(), dtype=torch.int64, device="meta")
    offsets = torch.empty(len(mask) + 1, dtype=torch.int32, device="meta")
    return RaggedIndex(patch=rows, row=rows, offsets=offsets, lengths=tuple(lengths.tolist()), total=int(lengths.sum()))


def test_the_padding_of_the_reference_attention_is_estimated():
    # ViT-B on the meta device.
    config, images = RunConfig(optim=OptimConfig(precision="fp32")), 64
    masks = draw_masks(config.mask, config.grid, config.seed, 0, np.arange(images))
    counts = PatchCounts(context=masks.context.sum(axis=1), target=masks.target.sum(axis=1))
    context, target = ragged_on_meta(masks.context), ragged_on_meta(masks.target)
    with torch.device("meta"):
        student = build_student(config, REFERENCE)
        patches, action = torch.empty(len(context.row), 768), torch.empty(images, len(config.views.entries))

    def forward() -> torch.Tensor:
        # Without the last norm, which asks for autocast: the meta device has none.
        tokens, _ = student.encoder.blocks(patches, Sequences.from_lengths(context.offsets, context.lengths))
        return student.predictor(tokens, action, context, target)

    measured = saved_bytes(student, forward)
    estimate = estimate_memory(
        config, counts, num_parameters=num_parameters(student), world_size=1, micro_batch_size=images, stage=0,
        checkpoints_activations=False,
    )  # fmt: skip
    assert measured == pytest.approx(estimate.activations, rel=0.05)


def test_each_zero_stage_shards_its_share_of_the_memory():
    def estimate(stage: int, ranks: int):
        return estimate_memory(
            RunConfig(), COUNTS, num_parameters=(80, 20), world_size=ranks, micro_batch_size=1, stage=stage,
            checkpoints_activations=False,
        )  # fmt: skip

    # Weights, gradients and two moments in float32. ZeRO keeps a copy of the partition that it updates, and stage 3
    # gathers the weights.
    assert [estimate(stage, 4).weights for stage in range(4)] == [400, 400, 400, 500]
    assert [estimate(stage, 4).gradients for stage in range(4)] == [400, 400, 100, 100]
    assert [estimate(stage, 4).adam for stage in range(4)] == [800, 300, 300, 300]
    assert {estimate(stage, 4).teacher for stage in range(4)} == {320}
    assert [estimate(stage, 4).bf16_copies for stage in range(4)] == [200, 200, 200, 0]


def test_the_largest_micro_batch_fits_and_divides_the_share():
    def estimate(size: int):
        return estimate_memory(
            RunConfig(), COUNTS, num_parameters=(80, 20), world_size=1, micro_batch_size=size, stage=0,
            checkpoints_activations=False,
        )  # fmt: skip

    assert largest_micro_batch(estimate, 12, estimate(5).total) == 4
    assert largest_micro_batch(estimate, 12, estimate(12).total) == 12
    assert largest_micro_batch(estimate, 12, estimate(1).total - 1) is None
