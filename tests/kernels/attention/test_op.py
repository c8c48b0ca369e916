"""The fused attention against its reference: interpreted without a GPU, compiled with one."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fixtures.kernel_cases import DEVICE, DTYPES, LAYOUTS, TOLERANCE, draw, error, make_gradient, offsets_of
from fixtures.kernel_cases import values_and_gradients as differentiate
from iwm_fast.kernels.attention import op as module
from iwm_fast.kernels.attention.op import ragged_attention, ragged_attention_reference
from iwm_fast.kernels.attention.packed import PackedQKV
from iwm_fast.kernels.launch import IS_INTERPRETING

pytestmark = pytest.mark.fused

HEADS = 2
# Lengths around the boundaries of query tiles, key tiles, buckets and launches.
LENGTHS = [
    [1, 15, 16, 17, 63, 64, 65],
    [127, 128, 129],
    list(range(191, 198)),
    [207, 208, 209],
    [223, 224, 225],
    [255, 256, 257],
    [400],
]
RAGGED = [0, 5, 130, 0, 64, 1, 0]
only_interpreted = pytest.mark.skipif(not IS_INTERPRETING, reason="only the interpreter multiplies float64")


def qkv_of(lengths, head_dim=32, dtype=torch.float32, heads=HEADS):
    return draw(sum(lengths), 3, heads, head_dim, dtype=dtype)


def assert_matches_reference(qkv, offsets, longest, tolerance=TOLERANCE[torch.float32]):
    actual = differentiate(lambda x: ragged_attention(x, offsets, longest), [qkv])
    expected = differentiate(lambda x: ragged_attention_reference(x, offsets, longest), [qkv.double()])
    assert all(error(*pair) < tolerance for pair in zip(actual, expected, strict=True))
    assert actual[0].dtype == actual[1].dtype == qkv.dtype


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_output_and_gradient_match_the_reference_at_tile_boundaries(lengths, head_dim):
    assert_matches_reference(qkv_of(lengths, head_dim, heads=1), offsets_of(lengths), max(lengths))


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_and_empty_sequences_match_the_reference_in_every_dtype(dtype, head_dim):
    assert_matches_reference(qkv_of(RAGGED, head_dim, dtype), offsets_of(RAGGED), max(RAGGED), TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("lengths", [[50, 130, 256, 7], [196] * 8, [400, 300]], ids=str)
def test_bfloat16_errors_are_at_most_twice_those_of_the_reference(lengths, head_dim):
    qkv, offsets = qkv_of(lengths, head_dim, torch.bfloat16), offsets_of(lengths)
    fused, plain, exact = (
        differentiate(lambda x, attend=attend: attend(x, offsets, max(lengths)), [tensor])
        for attend, tensor in (
            (ragged_attention, qkv),
            (ragged_attention_reference, qkv),
            (ragged_attention_reference, qkv.double()),
        )
    )
    for fused_value, plain_value, exact_value in zip(fused, plain, exact, strict=True):
        assert error(fused_value, exact_value) <= 2 * error(plain_value, exact_value)


@pytest.mark.parametrize("length", [7, 70, 196, 300])
def test_dense_batches_need_no_offsets(length):
    assert_matches_reference(qkv_of([length, length], heads=1), None, length)


@pytest.mark.parametrize("longest", [65, 150, 250, 500])
def test_a_larger_bound_of_the_lengths_changes_nothing(longest):
    qkv, offsets = qkv_of([65, 3]), offsets_of([65, 3])
    actual = differentiate(lambda x: ragged_attention(x, offsets, longest), [qkv])
    expected = differentiate(lambda x: ragged_attention(x, offsets, 65), [qkv])
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("head_dim", [32, 64])
def test_configurations_for_other_gpus_match_the_reference(head_dim):
    # sm_90 has larger tiles than the default for other GPUs. Every device can run both.
    lengths = [64, 130, 200, 260]
    qkv, offsets = qkv_of(lengths, head_dim, torch.float16, heads=1), offsets_of(lengths)
    out, lse = torch.empty_like(qkv[:, 0]), torch.empty(1, sum(lengths), device=DEVICE)
    d_out, d_qkv = draw(*out.shape, dtype=torch.float16, seed=1), torch.empty_like(qkv)
    packed = PackedQKV(qkv, offsets, max(lengths))
    for launch in module.forward_launches(0, packed, out, lse):
        launch.run()
    for launch in module.backward_launches(0, packed, out=out, lse=lse, d_out=d_out, d_qkv=d_qkv):
        launch.run()
    expected = differentiate(lambda x: ragged_attention_reference(x, offsets, max(lengths)), [qkv.double()])
    assert error(out, expected[0]) < TOLERANCE[torch.float16] and error(d_qkv, expected[1]) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_a_batch_without_rows_gives_an_empty_result(lengths):
    qkv = qkv_of(lengths).requires_grad_()
    out = ragged_attention(qkv, offsets_of(lengths), 0)
    out.sum().backward()
    assert out.shape == (0, HEADS, 32) and qkv.grad.shape == qkv.shape


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # in weights that are then set to zero
@pytest.mark.parametrize("lengths", [[65, 5], [130, 200], [300]], ids=str)
def test_very_negative_scores_do_not_give_nan(lengths):
    # Scores of some tens of either sign, and of some hundreds at one key.
    qkv, offsets = qkv_of(lengths, dtype=torch.float32, heads=1), offsets_of(lengths)
    qkv[:, :2] *= 4
    qkv[3, 1] = -100
    assert_matches_reference(qkv, offsets, max(lengths), 1e-3)
    # All scores are about -5,000: exp(-lse) overflows unless padding is masked.
    qkv[:, 0], qkv[:, 1] = 30.0, -30.0
    assert_matches_reference(qkv, offsets, max(lengths), 1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("lengths", [[5, 60, 3], [64, 130, 61], [200, 9, 193], [260, 300, 270]], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN slice")  # the inputs hold such values
def test_nan_and_inf_stay_in_their_sequence(lengths, bad):
    qkv, offsets = qkv_of(lengths, heads=1), offsets_of(lengths)
    clean = differentiate(lambda x: ragged_attention(x, offsets, max(lengths)), [qkv])
    begin, end = lengths[0], lengths[0] + lengths[1]
    qkv[begin:end] = bad
    dirty = differentiate(lambda x: ragged_attention(x, offsets, max(lengths)), [qkv])
    assert dirty[0][begin:end].isnan().all()
    for actual, expected in zip(dirty, clean, strict=True):
        assert torch.equal(actual[:begin], expected[:begin]) and torch.equal(actual[end:], expected[end:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_incoming_gradients_may_have_any_memory_layout(layout):
    qkv, offsets = qkv_of(RAGGED).requires_grad_(), offsets_of(RAGGED)
    out = ragged_attention(qkv, offsets, max(RAGGED))
    d_out = make_gradient(layout, out.shape, out.dtype)
    (actual,) = torch.autograd.grad(out, qkv, d_out, retain_graph=True)
    (expected,) = torch.autograd.grad(out, qkv, d_out.clone(memory_format=torch.contiguous_format))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("lengths", [RAGGED, [196, 196], [300, 257]], ids=str)
def test_gradients_are_bitwise_reproducible(lengths):
    qkv, offsets = qkv_of(lengths, dtype=torch.float16, heads=1), offsets_of(lengths)
    first, second = (differentiate(lambda x: ragged_attention(x, offsets, max(lengths)), [qkv]) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_activation_checkpointing_changes_no_bit():
    qkv, offsets = qkv_of([40, 70]), offsets_of([40, 70])

    def attend(x):
        return ragged_attention(x * 2, offsets, 70)

    actual = differentiate(lambda x: checkpoint(attend, x, use_reentrant=False), [qkv])
    assert all(torch.equal(*pair) for pair in zip(actual, differentiate(attend, [qkv]), strict=True))


@only_interpreted
@pytest.mark.parametrize(("lengths", "longest"), [([3, 0, 2], 3), ([17, 1], 17), ([5], 300)])
def test_gradient_matches_finite_differences(lengths, longest):
    offsets = offsets_of(lengths)
    qkv = qkv_of(lengths, dtype=torch.float64, heads=1).requires_grad_()
    # A bound above 256 also starts the kernels for long sequences, but they compute none of these.
    assert torch.autograd.gradcheck(lambda x: ragged_attention(x, offsets, longest), (qkv,), fast_mode=True)


@only_interpreted
def test_gradient_of_a_long_sequence_matches_finite_differences():
    qkv = qkv_of([257], dtype=torch.float64, heads=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ragged_attention(x, None, 257), (qkv,), fast_mode=True)


# opcheck itself reads .grad of tensors that are not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("offsets", [[6, 3], None])
def test_the_operation_passes_opcheck(offsets):
    offsets = None if offsets is None else offsets_of(offsets)
    longest = 9 if offsets is None else 6
    qkv = qkv_of([9]).requires_grad_()
    torch.library.opcheck(torch.ops.iwm_fast.ragged_attention.default, (qkv, offsets, longest))


def test_torch_compile_does_not_recompile_for_new_lengths():
    counter = CompileCounterWithBackend("aot_eager")

    def function(qkv, offsets, longest):
        return ragged_attention(qkv * 2, offsets, longest) + 1

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for lengths in ([4, 2], [9, 3, 6], [7, 70], [20, 5, 1], [11, 40], [33, 2, 8, 1]):
        qkv, offsets = qkv_of(lengths), offsets_of(lengths)
        actual = differentiate(lambda x: compiled(x, offsets, max(lengths)), [qkv])  # noqa: B023
        expected = differentiate(lambda x: function(x, offsets, max(lengths)), [qkv])  # noqa: B023
        torch.testing.assert_close(actual, expected)
    # Once for the sizes of the first batch, once with symbolic sizes.
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_unsupported_dtypes_are_refused_with_the_supported_ones(dtype):
    with pytest.raises(TypeError, match=r"qkv must have one of the dtypes bfloat16, float16, float32"):
        ragged_attention(torch.zeros(4, 3, 1, 32, dtype=dtype, device=DEVICE), None, 4)


def test_unsupported_head_sizes_and_shapes_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"heads of 32 or 64, got 80; .*runtime.ops=reference"):
        ragged_attention(torch.zeros(4, 3, 1, 80, device=DEVICE), None, 4)
    with pytest.raises(ValueError, match=r"\(rows, 3, heads, head_dim\), got \(4, 96\)"):
        ragged_attention(torch.zeros(4, 96, device=DEVICE), None, 4)
    with pytest.raises(ValueError, match=r"qkv must be contiguous, .*pass tensor.contiguous\(\)"):
        ragged_attention(torch.zeros(4, 3, 32, 2, device=DEVICE).transpose(2, 3), None, 4)
    with pytest.raises(ValueError, match=r"offsets must be an int32 vector on .*got torch.int64"):
        ragged_attention(torch.zeros(4, 3, 1, 32, device=DEVICE), torch.tensor([0, 4], device=DEVICE), 4)
    with pytest.raises(ValueError, match="multiple of longest = 3 rows, got 4"):
        ragged_attention(torch.zeros(4, 3, 1, 32, device=DEVICE), None, 3)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_exactly_one_launch_computes_each_length(architecture):
    for head_dim, is_ragged in itertools.product((32, 64), (True, False)):
        for longest in (1, 64, 129, 208, 209, 224, 225, 256, 257, 600):
            qkv = torch.empty(longest, 3, 1, head_dim, dtype=torch.bfloat16, device="meta")
            offsets = torch.empty(2, dtype=torch.int32, device="meta") if is_ragged else None
            packed = PackedQKV(qkv, offsets, longest)
            launches = module.forward_launches(architecture, packed, qkv[:, 0], qkv[:, 0, :, 0])
            # The kernels for long sequences have no upper limit.
            spans = [(*launch.constants["LIMITS"], 10**9) for launch in launches]
            spans = [span[: max(2, len(span) - 1)] for span in spans]
            assert sum(span[0] < longest <= span[-1] for span in spans) == 1
            # Ranges of lengths adjoin, none lies beyond the longest, and a dense batch needs only one.
            assert all(span[-1] == next_span[0] for span, next_span in itertools.pairwise(spans))
            assert all(span[0] < longest for span in spans) and (is_ragged or len(spans) == 1)
