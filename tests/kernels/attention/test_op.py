"""The fused attention against its reference: interpreted without a GPU, compiled with one."""

import itertools

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from fixtures.kernel_cases import DEVICE, DTYPES, LAYOUTS, TOLERANCE, draw, error, make_gradient, offsets_of
from fixtures.kernel_cases import values_and_gradients as differentiate
from iwm_fast.kernels.attention import op as module
from iwm_fast.kernels.attention.kernels import choose_configs
from iwm_fast.kernels.attention.op import ragged_attention
from iwm_fast.kernels.attention.reference import ragged_attention_reference
from iwm_fast.kernels.attention.sequences import Sequences
from iwm_fast.kernels.launch import IS_INTERPRETING
from iwm_fast.pipelines.config import MaskConfig
from iwm_fast.pipelines.sampling.masks import draw_masks

pytestmark = pytest.mark.fused

HEADS = 2
# On a GPU the kernels take half precision only. In the interpreter float32 shows smaller mistakes.
GROUP_DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.float16]
FUSED_DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else DTYPES
DTYPE = GROUP_DTYPES[0]
# Lengths around the boundaries of query tiles, key tiles, buckets and launches.
LENGTHS = [
    [1, 15, 16, 17, 63, 64, 65],
    [127, 128, 129],
    list(range(191, 198)),
    [207, 208, 209],
    [223, 224, 225],
    [255, 256],
]
RAGGED = [0, 5, 130, 0, 64, 1, 0]
only_interpreted = pytest.mark.skipif(not IS_INTERPRETING, reason="only the interpreter multiplies float64")


def qkv_of(lengths, head_dim=32, dtype=DTYPE, heads=HEADS):
    return draw(sum(lengths), 3, heads, head_dim, dtype=dtype)


def sequences_of(lengths):
    return Sequences(offsets_of(lengths), min(lengths, default=0), max(lengths, default=0))


def assert_matches_reference(qkv, sequences, tolerance=None):
    tolerance = TOLERANCE[qkv.dtype] if tolerance is None else tolerance
    actual = differentiate(lambda x: ragged_attention(x, sequences), [qkv])
    expected = differentiate(lambda x: ragged_attention_reference(x, sequences), [qkv.double()])
    assert all(error(*pair) < tolerance for pair in zip(actual, expected, strict=True))
    assert actual[0].dtype == actual[1].dtype == qkv.dtype


@pytest.mark.parametrize("dtype", GROUP_DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_output_and_gradient_match_the_reference_at_tile_boundaries(lengths, head_dim, dtype):
    assert_matches_reference(qkv_of(lengths, head_dim, dtype, heads=1), sequences_of(lengths))


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("dtype", FUSED_DTYPES)
def test_ragged_and_empty_sequences_match_the_reference_in_every_dtype(dtype, head_dim):
    assert_matches_reference(qkv_of(RAGGED, head_dim, dtype), sequences_of(RAGGED))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("lengths", [[50, 130, 256, 7], [196] * 8], ids=str)
def test_bfloat16_errors_are_at_most_twice_those_of_the_reference(lengths, head_dim):
    qkv, sequences = qkv_of(lengths, head_dim, torch.bfloat16), sequences_of(lengths)
    fused, plain, exact = (
        differentiate(lambda x, attend=attend: attend(x, sequences), [tensor])
        for attend, tensor in (
            (ragged_attention, qkv),
            (ragged_attention_reference, qkv),
            (ragged_attention_reference, qkv.double()),
        )
    )
    for fused_value, plain_value, exact_value in zip(fused, plain, exact, strict=True):
        assert error(fused_value, exact_value) <= 2 * error(plain_value, exact_value)


@pytest.mark.gpu
def test_the_reference_of_packed_sequences_is_flash_attention_in_both_passes():
    # Longer than 128, because PyTorch does not choose every version of cuDNN for shorter ones.
    qkv, sequences = qkv_of([200, 130], 64, torch.bfloat16), sequences_of([200, 130])
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        differentiate(lambda x: ragged_attention_reference(x, sequences), [qkv])
        torch.cuda.synchronize()
    names = " ".join(event.name for event in profiler.events())
    assert "flash_fwd" in names and "flash_bwd" in names and "cudnn" not in names


@pytest.mark.parametrize("length", [7, 70, 196, 256])
def test_dense_batches_need_no_offsets(length):
    assert_matches_reference(qkv_of([length, length], heads=1), Sequences.of_equal_length(length))


@pytest.mark.parametrize(("shortest", "longest"), [(3, 65), (0, 150), (3, 250)])
def test_wider_bounds_of_the_lengths_change_nothing(shortest, longest):
    qkv, sequences = qkv_of([65, 3]), sequences_of([65, 3])
    actual = differentiate(lambda x: ragged_attention(x, Sequences(sequences.offsets, shortest, longest)), [qkv])
    expected = differentiate(lambda x: ragged_attention(x, sequences), [qkv])
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("head_dim", [32, 64])
def test_configurations_for_other_gpus_match_the_reference(head_dim, monkeypatch):
    # sm_90 has larger tiles than the default for other GPUs. Every device can run both.
    monkeypatch.setattr(module, "architecture", lambda device: 80)
    limit = choose_configs(80, head_dim).max_length
    lengths = [length for length in (64, 100, 128, 130, 200) if length <= limit]
    assert_matches_reference(qkv_of(lengths, head_dim, torch.float16, heads=1), sequences_of(lengths))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_a_batch_without_rows_gives_an_empty_result(lengths):
    qkv = qkv_of(lengths).requires_grad_()
    out = ragged_attention(qkv, sequences_of(lengths))
    out.sum().backward()
    assert out.shape == (0, HEADS, 32) and qkv.grad.shape == qkv.shape


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # in weights that are then set to zero
@pytest.mark.parametrize("lengths", [[65, 5], [130, 200], [256]], ids=str)
def test_very_negative_scores_do_not_give_nan(lengths):
    # Scores of some tens of either sign, and of some hundreds at one key.
    qkv, sequences = qkv_of(lengths, heads=1), sequences_of(lengths)
    # Where one key has all the weight, the gradient of its score is a difference of two almost equal sums, whose
    # rounding the key multiplies by 100. How they are rounded depends on the CPU's instructions.
    tolerance = max(5e-3, TOLERANCE[DTYPE])
    qkv[:, :2] *= 4
    qkv[3, 1] = -100
    assert_matches_reference(qkv, sequences, tolerance)
    # All scores are about -5,000: exp(-lse) overflows unless padding is masked.
    qkv[:, 0], qkv[:, 1] = 30.0, -30.0
    assert_matches_reference(qkv, sequences, tolerance)


@pytest.mark.parametrize(("bad", "head_dim"), [(float("nan"), 32), (float("inf"), 64)])
@pytest.mark.parametrize("dtype", GROUP_DTYPES if DEVICE == "cuda" else [DTYPE])
@pytest.mark.parametrize(
    "lengths", [[5, 60, 3], [64, 130, 61], [100, 90, 128], [200, 9, 193], [220, 256, 224]], ids=str
)
@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN slice")  # the inputs hold such values
def test_nan_and_inf_stay_in_their_sequence(lengths, bad, head_dim, dtype):
    qkv, sequences = qkv_of(lengths, head_dim, dtype, heads=1), sequences_of(lengths)
    clean = differentiate(lambda x: ragged_attention(x, sequences), [qkv])
    begin, end = lengths[0], lengths[0] + lengths[1]
    qkv[begin:end] = bad
    dirty = differentiate(lambda x: ragged_attention(x, sequences), [qkv])
    assert dirty[0][begin:end].isnan().all()
    for actual, expected in zip(dirty, clean, strict=True):
        assert torch.equal(actual[:begin], expected[:begin]) and torch.equal(actual[end:], expected[end:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_incoming_gradients_may_have_any_memory_layout(layout):
    qkv, sequences = qkv_of(RAGGED).requires_grad_(), sequences_of(RAGGED)
    out = ragged_attention(qkv, sequences)
    d_out = make_gradient(layout, out.shape, out.dtype)
    (actual,) = torch.autograd.grad(out, qkv, d_out, retain_graph=True)
    (expected,) = torch.autograd.grad(out, qkv, d_out.clone(memory_format=torch.contiguous_format))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", GROUP_DTYPES[-2:] if DEVICE == "cuda" else [torch.float16])
@pytest.mark.parametrize("lengths", [RAGGED, [196, 196], [256, 210]], ids=str)
def test_gradients_are_bitwise_reproducible(lengths, dtype):
    qkv, sequences = qkv_of(lengths, dtype=dtype, heads=1), sequences_of(lengths)
    first, second = (differentiate(lambda x: ragged_attention(x, sequences), [qkv]) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_activation_checkpointing_changes_no_bit():
    qkv, sequences = qkv_of([40, 70]), sequences_of([40, 70])

    def attend(x):
        return ragged_attention(x * 2, sequences)

    actual = differentiate(lambda x: checkpoint(attend, x, use_reentrant=False), [qkv])
    assert all(torch.equal(*pair) for pair in zip(actual, differentiate(attend, [qkv]), strict=True))


@only_interpreted
@pytest.mark.parametrize("lengths", [[3, 0, 2], [17, 1], [5], [130]])
def test_gradient_matches_finite_differences(lengths):
    qkv = qkv_of(lengths, dtype=torch.float64, heads=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ragged_attention(x, sequences_of(lengths)), (qkv,), fast_mode=True)


@pytest.mark.parametrize("offsets", [[6, 3], None])
def test_the_operations_pass_opcheck(offsets):
    offsets, bounds = (None, (9, 9)) if offsets is None else (offsets_of(offsets), (3, 6))
    qkv = qkv_of([9])
    out, lse = torch.ops.iwm_fast.ragged_attention(qkv, offsets, *bounds)
    torch.library.opcheck(torch.ops.iwm_fast.ragged_attention.default, (qkv, offsets, *bounds))
    torch.library.opcheck(torch.ops.iwm_fast.ragged_attention_backward.default, (out, qkv, lse, offsets, *bounds))


def test_torch_compile_does_not_recompile_for_new_lengths():
    counter = CompileCounterWithBackend("aot_eager")

    def function(qkv, sequences):
        return ragged_attention(qkv * 2, sequences) + 1

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for lengths in ([4, 2], [9, 3, 6], [7, 70], [20, 5, 1], [11, 40], [33, 2, 8, 1]):
        qkv, sequences = qkv_of(lengths), sequences_of(lengths)
        actual = differentiate(lambda x: compiled(x, sequences), [qkv])  # noqa: B023
        expected = differentiate(lambda x: function(x, sequences), [qkv])  # noqa: B023
        torch.testing.assert_close(actual, expected)
    # Once for the sizes of the first batch, once with symbolic sizes.
    assert counter.frame_count <= 2


FOUR = Sequences.of_equal_length(4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_unsupported_dtypes_are_refused_with_the_supported_ones(dtype):
    with pytest.raises(TypeError, match=r"qkv must have one of the dtypes bfloat16, float16, float32"):
        ragged_attention(torch.zeros(4, 3, 1, 32, dtype=dtype, device=DEVICE), FOUR)


def test_unsupported_head_sizes_and_shapes_are_refused_with_a_remedy():
    zeros = torch.zeros(4, 3, 1, 32, dtype=DTYPE, device=DEVICE)
    with pytest.raises(ValueError, match=r"heads of 32 or 64, got 80; .*runtime.ops=reference"):
        ragged_attention(torch.zeros(4, 3, 1, 80, device=DEVICE), FOUR)
    with pytest.raises(ValueError, match=r"\(rows, 3, heads, head_dim\), got \(4, 96\)"):
        ragged_attention(torch.zeros(4, 96, device=DEVICE), FOUR)
    with pytest.raises(ValueError, match=r"qkv must be contiguous, .*pass tensor.contiguous\(\)"):
        ragged_attention(torch.zeros(4, 3, 32, 2, device=DEVICE).transpose(2, 3), FOUR)
    with pytest.raises(ValueError, match=r"offsets must be an int32 vector on .*got torch.int64"):
        ragged_attention(zeros, Sequences(torch.tensor([0, 4], device=DEVICE), 4, 4))
    with pytest.raises(ValueError, match="multiple of longest = 3 rows, got 4"):
        ragged_attention(zeros, Sequences.of_equal_length(3))


def test_sequences_that_are_too_long_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"up to 256 tokens .* got 257; set runtime.ops=reference"):
        ragged_attention(qkv_of([257], heads=1), Sequences.of_equal_length(257))


def launches_of(architecture, head_dim, sequences, num_rows):
    qkv = torch.empty(num_rows, 3, 1, head_dim, dtype=torch.bfloat16, device="meta")
    forward = module.forward_launches(architecture, qkv, sequences, qkv[:, 0], qkv[:, 0, :, 0])
    return forward, module.backward_launches(architecture, qkv, sequences, qkv[:, 0], qkv, qkv[:, 0, :, 0])


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("head_dim", [32, 64])
def test_exactly_one_launch_computes_each_length(architecture, head_dim):
    limit = choose_configs(architecture, head_dim).max_length
    for shortest, longest in itertools.product((1, 64, 129, 208, 209, 224, 225, 256), repeat=2):
        if not shortest <= longest <= limit:
            continue
        offsets = torch.empty(3, dtype=torch.int32, device="meta")
        for launches in launches_of(architecture, head_dim, Sequences(offsets, shortest, longest), 2 * longest):
            spans = [(launch.constants["LIMITS"][0], launch.constants["LIMITS"][-1]) for launch in launches]
            # Ranges of lengths adjoin, and none lies outside the bounds.
            assert all(span[1] == next_span[0] for span, next_span in itertools.pairwise(spans))
            assert spans[0][0] < shortest <= spans[0][1] and spans[-1][0] < longest <= spans[-1][1]
        for launches in launches_of(architecture, head_dim, Sequences.of_equal_length(longest), 2 * longest):
            assert len(launches) == 1


@pytest.mark.parametrize("head_dim", [32, 64])
def test_launches_on_masks_as_drawn_in_training(head_dim):
    masks = draw_masks(MaskConfig(), 14, 0, 0, np.arange(64))
    context = masks.context.sum(1).tolist()
    joint = (masks.context.sum(1) + masks.target.sum(1)).tolist()
    for lengths, most in ((joint, 1), (context, 2)):
        offsets = torch.empty(len(lengths) + 1, dtype=torch.int32, device="meta")
        sequences = Sequences.from_lengths(offsets, lengths)
        assert all(len(launches) <= most for launches in launches_of(90, head_dim, sequences, sum(lengths)))
    # Complementary masks: context and targets together are all patches.
    assert Sequences.from_lengths(offsets, joint) == Sequences.of_equal_length(196)
