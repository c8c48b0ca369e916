import pytest
import torch
import torch.nn.functional as F

from iwm_fast.kernels.attention.reference import ragged_attention_reference
from iwm_fast.kernels.attention.sequences import Sequences

HEADS, HEAD_DIM = 3, 4


def packed(lengths, longest=None):
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return Sequences(offsets, min(lengths), longest or max(lengths))


def dense(length):
    return Sequences.of_equal_length(length)


def draw(lengths, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), 3, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)


def attend_one_by_one(qkv, lengths):
    outputs = []
    for sequence in qkv.split(lengths):
        query, key, value = sequence.permute(1, 2, 0, 3)
        outputs.append(F.scaled_dot_product_attention(query, key, value).transpose(0, 1))
    return torch.cat(outputs)


def value_and_gradient(function, qkv):
    qkv = qkv.clone().requires_grad_()
    out = function(qkv)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out.detach(), qkv.grad


@pytest.mark.parametrize("lengths", [[5, 3, 7], [1], [4, 4], [2, 0, 5], [0, 3, 0]])
def test_packed_attention_equals_attention_of_single_sequences(lengths):
    qkv = draw(lengths)
    actual = value_and_gradient(lambda x: ragged_attention_reference(x, packed(lengths)), qkv)
    expected = value_and_gradient(lambda x: attend_one_by_one(x, lengths), qkv)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_dense_batch_equals_a_packed_batch_of_equal_lengths():
    qkv = draw([6, 6, 6])
    actual = value_and_gradient(lambda x: ragged_attention_reference(x, dense(6)), qkv)
    expected = value_and_gradient(lambda x: ragged_attention_reference(x, packed([6, 6, 6])), qkv)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_larger_bound_of_the_lengths_changes_nothing():
    qkv = draw([5, 2])
    padded = ragged_attention_reference(qkv, packed([5, 2], 11))
    torch.testing.assert_close(padded, ragged_attention_reference(qkv, packed([5, 2])), rtol=1e-12, atol=1e-12)


def test_only_empty_sequences_give_an_empty_result():
    assert ragged_attention_reference(draw([0, 0]), packed([0, 0])).shape == (0, HEADS, HEAD_DIM)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_sequence(bad):
    lengths = [3, 6, 0, 2]
    qkv = draw(lengths)
    clean = value_and_gradient(lambda x: ragged_attention_reference(x, packed(lengths)), qkv)
    qkv[3:9] = bad
    dirty = value_and_gradient(lambda x: ragged_attention_reference(x, packed(lengths)), qkv)
    others = [0, 1, 2, 9, 10]
    assert dirty[0][3:9].isnan().all()
    for actual, expected in zip(dirty, clean, strict=True):
        assert torch.equal(actual[others], expected[others])


def test_empty_sequences_give_no_nan_in_the_backward_pass():
    # Such a NaN would not reach any row, but torch's anomaly detection would stop at it.
    qkv = draw([2, 0, 5]).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        ragged_attention_reference(qkv, packed([2, 0, 5])).sum().backward()


def test_gradient_matches_finite_differences():
    lengths = [3, 0, 2]
    qkv = draw(lengths).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ragged_attention_reference(x, packed(lengths)), (qkv,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_rounding_of_float64(dtype):
    lengths = [40, 17]
    qkv = draw(lengths, dtype)
    actual = ragged_attention_reference(qkv, packed(lengths))
    assert actual.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        actual.double(), attend_one_by_one(qkv.double(), lengths), rtol=tolerance, atol=tolerance
    )


def test_softmax_of_half_precision_does_not_lose_small_weights():
    # All 300 weights are equal: a sum in bfloat16 would stop at 256, where adding 1 changes nothing.
    qkv = torch.zeros(300, 3, 1, 4, dtype=torch.bfloat16)
    qkv[:, 2] = 1
    actual = ragged_attention_reference(qkv, dense(300))
    torch.testing.assert_close(actual, torch.ones_like(actual), rtol=0, atol=5e-3)


def test_wrong_shapes_are_refused_with_the_shape():
    with pytest.raises(ValueError, match=r"\(rows, 3, heads, head_dim\), got \(4, 12\)"):
        ragged_attention_reference(torch.zeros(4, 12), dense(2))
    with pytest.raises(ValueError, match="multiple of longest = 5 rows, got 9"):
        ragged_attention_reference(draw([9]), dense(5))
