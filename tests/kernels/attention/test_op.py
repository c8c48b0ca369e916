"""The fused attention against its reference: interpreted without a GPU, compiled with one."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fixtures.kernel_cases import AWKWARD_GRADIENTS, DEVICE, DTYPES, TOLERANCE, awkward, draw, error, offsets_of
from fixtures.kernel_cases import values_and_gradients as differentiate
from iwm_fast.kernels.attention import op as module
from iwm_fast.kernels.attention.op import ragged_attention, ragged_attention_reference
from iwm_fast.kernels.attention.packed import Packed
from iwm_fast.kernels.launch import IS_INTERPRETING

pytestmark = pytest.mark.fused

HEADS = 2
# around every border of a tile, a piece of keys, a rung and a group
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
only_interpreted = pytest.mark.skipif(not IS_INTERPRETING, reason="float64 exists in the interpreter only")


def qkv_of(lengths, head_dim=32, dtype=torch.float32, heads=HEADS):
    return draw(sum(lengths), 3, heads, head_dim, dtype=dtype)


def compare(qkv, offsets, longest, tolerance):
    got = differentiate(lambda x: ragged_attention(x, offsets, longest), [qkv])
    wanted = differentiate(lambda x: ragged_attention_reference(x, offsets, longest), [qkv.double()])
    assert [error(*pair) < tolerance for pair in zip(got, wanted, strict=True)] == [True, True]
    assert got[0].dtype == got[1].dtype == qkv.dtype


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_output_and_gradient_are_the_references_at_every_border(lengths, head_dim):
    compare(qkv_of(lengths, head_dim, heads=1), offsets_of(lengths), max(lengths), TOLERANCE[torch.float32])


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_and_empty_sequences_in_every_dtype(dtype, head_dim):
    compare(qkv_of(RAGGED, head_dim, dtype), offsets_of(RAGGED), max(RAGGED), TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("lengths", [[50, 130, 256, 7], [196] * 8, [400, 300]], ids=str)
def test_in_bfloat16_errors_are_at_most_twice_those_of_plain_arithmetic(lengths, head_dim):
    qkv, offsets = qkv_of(lengths, head_dim, torch.bfloat16), offsets_of(lengths)
    fused, plain, exact = (
        differentiate(lambda x, attend=attend: attend(x, offsets, max(lengths)), [tensor])
        for attend, tensor in (
            (ragged_attention, qkv),
            (ragged_attention_reference, qkv),
            (ragged_attention_reference, qkv.double()),
        )
    )
    for one, other, wanted in zip(fused, plain, exact, strict=True):
        assert error(one, wanted) <= 2 * error(other, wanted)


@pytest.mark.parametrize("length", [7, 70, 196, 300])
def test_dense_batches_need_no_offsets(length):
    compare(qkv_of([length, length], heads=1), None, length, TOLERANCE[torch.float32])


@pytest.mark.parametrize("longest", [65, 150, 250, 500])
def test_a_longer_bound_than_needed_changes_nothing(longest):
    qkv, offsets = qkv_of([65, 3]), offsets_of([65, 3])
    got = differentiate(lambda x: ragged_attention(x, offsets, longest), [qkv])
    wanted = differentiate(lambda x: ragged_attention(x, offsets, 65), [qkv])
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


@pytest.mark.parametrize("head_dim", [32, 64])
def test_the_settings_for_other_gpus_give_the_same(head_dim):
    # sm_90 has larger tiles than the default; both tables run anywhere
    lengths = [64, 130, 200, 260]
    qkv, offsets = qkv_of(lengths, head_dim, torch.float16, heads=1), offsets_of(lengths)
    out, lse = torch.empty_like(qkv[:, 0]), torch.empty(1, sum(lengths), device=DEVICE)
    d_out, d_qkv = draw(*out.shape, dtype=torch.float16, seed=1), torch.empty_like(qkv)
    packed = Packed(qkv, offsets, max(lengths))
    for launch in module.forward_launches(0, packed, out, lse):
        launch.run()
    for launch in module.backward_launches(0, packed, out=out, lse=lse, d_out=d_out, d_qkv=d_qkv):
        launch.run()
    wanted = differentiate(lambda x: ragged_attention_reference(x, offsets, max(lengths)), [qkv.double()])
    assert error(out, wanted[0]) < TOLERANCE[torch.float16] and error(d_qkv, wanted[1]) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_rows_give_no_rows(lengths):
    qkv = qkv_of(lengths).requires_grad_()
    out = ragged_attention(qkv, offsets_of(lengths), 0)
    out.sum().backward()
    assert out.shape == (0, HEADS, 32) and qkv.grad.shape == qkv.shape


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of weights that are then set to zero
@pytest.mark.parametrize("lengths", [[65, 5], [130, 200], [300]], ids=str)
def test_very_negative_scores_are_no_nan(lengths):
    # scores of some tens either way, and of some hundreds at one key
    qkv, offsets = qkv_of(lengths, dtype=torch.float32, heads=1), offsets_of(lengths)
    qkv[:, :2] *= 4
    qkv[3, 1] = -100
    compare(qkv, offsets, max(lengths), 1e-3)
    # every score at minus 5,000: exp(-lse) overflows where padding is not masked
    qkv[:, 0], qkv[:, 1] = 30.0, -30.0
    compare(qkv, offsets, max(lengths), 1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("lengths", [[5, 60, 3], [64, 130, 61], [200, 9, 193], [260, 300, 270]], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN slice")  # they are asked for
def test_a_bad_value_stays_in_its_sequence(lengths, bad):
    qkv, offsets = qkv_of(lengths, heads=1), offsets_of(lengths)
    clean = differentiate(lambda x: ragged_attention(x, offsets, max(lengths)), [qkv])
    begin, end = lengths[0], lengths[0] + lengths[1]
    qkv[begin:end] = bad
    dirty = differentiate(lambda x: ragged_attention(x, offsets, max(lengths)), [qkv])
    assert dirty[0][begin:end].isnan().all()
    for got, wanted in zip(dirty, clean, strict=True):
        assert torch.equal(got[:begin], wanted[:begin]) and torch.equal(got[end:], wanted[end:])


@pytest.mark.parametrize("kind", AWKWARD_GRADIENTS)
def test_gradients_may_arrive_in_any_layout(kind):
    qkv, offsets = qkv_of(RAGGED).requires_grad_(), offsets_of(RAGGED)
    out = ragged_attention(qkv, offsets, max(RAGGED))
    d_out = awkward(kind, out.shape, out.dtype)
    (got,) = torch.autograd.grad(out, qkv, d_out, retain_graph=True)
    (wanted,) = torch.autograd.grad(out, qkv, d_out.clone(memory_format=torch.contiguous_format))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("lengths", [RAGGED, [196, 196], [300, 257]], ids=str)
def test_gradients_are_the_same_bits_every_time(lengths):
    qkv, offsets = qkv_of(lengths, dtype=torch.float16, heads=1), offsets_of(lengths)
    first, second = (differentiate(lambda x: ragged_attention(x, offsets, max(lengths)), [qkv]) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_recomputing_in_the_backward_pass_changes_no_bit():
    qkv, offsets = qkv_of([40, 70]), offsets_of([40, 70])

    def attend(x):
        return ragged_attention(x * 2, offsets, 70)

    got = differentiate(lambda x: checkpoint(attend, x, use_reentrant=False), [qkv])
    assert all(torch.equal(*pair) for pair in zip(got, differentiate(attend, [qkv]), strict=True))


@only_interpreted
@pytest.mark.parametrize(("lengths", "longest"), [([3, 0, 2], 3), ([17, 1], 17), ([5], 300)])
def test_gradient_matches_finite_differences(lengths, longest):
    offsets = offsets_of(lengths)
    qkv = qkv_of(lengths, dtype=torch.float64, heads=1).requires_grad_()
    # a bound above 256 is worked on whole all the same: the tiled kernels are reached by one sequence of 257
    assert torch.autograd.gradcheck(lambda x: ragged_attention(x, offsets, longest), (qkv,), fast_mode=True)


@only_interpreted
def test_gradient_of_long_sequences_matches_finite_differences():
    qkv = qkv_of([257], dtype=torch.float64, heads=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ragged_attention(x, None, 257), (qkv,), fast_mode=True)


# opcheck itself looks at .grad of copies
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("offsets", [[6, 3], None])
def test_the_operation_keeps_the_contract_of_torch(offsets):
    offsets = None if offsets is None else offsets_of(offsets)
    longest = 9 if offsets is None else 6
    qkv = qkv_of([9]).requires_grad_()
    torch.library.opcheck(torch.ops.iwm_fast.ragged_attention.default, (qkv, offsets, longest))


def test_compiled_models_do_not_compile_anew_for_other_lengths():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, o, n: ragged_attention(x * 2, o, n) + 1, backend=counter, fullgraph=True)
    for lengths in ([4, 2], [9, 3, 6], [7, 70], [20, 5, 1], [11, 40], [33, 2, 8, 1]):
        offsets = offsets_of(lengths)
        qkv = qkv_of(lengths)
        got = differentiate(lambda x: compiled(x, offsets, max(lengths)), [qkv])  # noqa: B023
        wanted = differentiate(lambda x: ragged_attention(x * 2, offsets, max(lengths)) + 1, [qkv])  # noqa: B023
        torch.testing.assert_close(got, wanted)
    # once for the first lengths, once with sizes left open
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_other_dtypes_are_refused_with_what_is_accepted(dtype):
    with pytest.raises(TypeError, match=r"qkv must have one of the dtypes bfloat16, float16, float32"):
        ragged_attention(torch.zeros(4, 3, 1, 32, dtype=dtype, device=DEVICE), None, 4)


def test_other_heads_and_layouts_are_refused_with_the_remedy():
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
def test_every_length_has_exactly_one_kernel(architecture):
    for head_dim, is_ragged in itertools.product((32, 64), (True, False)):
        for longest in (1, 64, 129, 208, 209, 224, 225, 256, 257, 600):
            qkv = torch.empty(longest, 3, 1, head_dim, dtype=torch.bfloat16, device="meta")
            offsets = torch.empty(2, dtype=torch.int32, device="meta") if is_ragged else None
            packed = Packed(qkv, offsets, longest)
            launches = module.forward_launches(architecture, packed, qkv[:, 0], qkv[:, 0, :, 0])
            # the tiled kernels have no upper limit
            spans = [(*launch.constants["LIMITS"], 10**9) for launch in launches]
            spans = [span[: max(2, len(span) - 1)] for span in spans]
            assert sum(span[0] < longest <= span[-1] for span in spans) == 1
            # neighbours meet, none beyond the longest is started, and a dense batch starts one
            assert all(one[-1] == other[0] for one, other in itertools.pairwise(spans))
            assert all(span[0] < longest for span in spans) and (is_ragged or len(spans) == 1)
