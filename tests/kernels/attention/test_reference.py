import pytest
import torch
import torch.nn.functional as F

from iwm_fast.kernels.attention.op import ragged_attention_reference

HEADS, HEAD_DIM = 3, 4


def offsets_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def draw(lengths, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), 3, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)


def one_by_one(qkv, lengths):
    outs = []
    for part in qkv.split(lengths):
        query, key, value = part.permute(1, 2, 0, 3)
        outs.append(F.scaled_dot_product_attention(query, key, value).transpose(0, 1))
    return torch.cat(outs)


def value_and_gradient(function, qkv):
    qkv = qkv.clone().requires_grad_()
    out = function(qkv)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out.detach(), qkv.grad


@pytest.mark.parametrize("lengths", [[5, 3, 7], [1], [4, 4], [2, 0, 5], [0, 3, 0]])
def test_packed_attention_equals_one_sequence_at_a_time(lengths):
    qkv = draw(lengths)
    got = value_and_gradient(lambda x: ragged_attention_reference(x, offsets_of(lengths), max(lengths)), qkv)
    wanted = value_and_gradient(lambda x: one_by_one(x, lengths), qkv)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_dense_call_equals_packed_call_of_equal_lengths():
    qkv = draw([6, 6, 6])
    got = value_and_gradient(lambda x: ragged_attention_reference(x, None, 6), qkv)
    wanted = value_and_gradient(lambda x: ragged_attention_reference(x, offsets_of([6, 6, 6]), 6), qkv)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_longer_layout_than_needed_changes_nothing():
    qkv = draw([5, 2])
    wide = ragged_attention_reference(qkv, offsets_of([5, 2]), 11)
    torch.testing.assert_close(wide, ragged_attention_reference(qkv, offsets_of([5, 2]), 5), rtol=1e-12, atol=1e-12)


def test_only_empty_sequences_give_an_empty_result():
    assert ragged_attention_reference(draw([0, 0]), offsets_of([0, 0]), 0).shape == (0, HEADS, HEAD_DIM)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_stays_in_its_sequence(bad):
    lengths = [3, 6, 0, 2]
    qkv = draw(lengths)
    clean = value_and_gradient(lambda x: ragged_attention_reference(x, offsets_of(lengths), 6), qkv)
    qkv[3:9] = bad
    dirty = value_and_gradient(lambda x: ragged_attention_reference(x, offsets_of(lengths), 6), qkv)
    others = [0, 1, 2, 9, 10]
    assert dirty[0][3:9].isnan().all()
    for got, wanted in zip(dirty, clean, strict=True):
        assert torch.equal(got[others], wanted[others])


def test_empty_sequences_make_no_nan_on_the_way_back():
    # none would reach a row, but torch's anomaly detection would stop at it
    qkv = draw([2, 0, 5]).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        ragged_attention_reference(qkv, offsets_of([2, 0, 5]), 5).sum().backward()


def test_gradient_matches_finite_differences():
    lengths = [3, 0, 2]
    qkv = draw(lengths).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ragged_attention_reference(x, offsets_of(lengths), 3), (qkv,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_rounding_of_float64(dtype):
    lengths = [40, 17]
    qkv = draw(lengths, dtype)
    got = ragged_attention_reference(qkv, offsets_of(lengths), 40)
    assert got.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), one_by_one(qkv.double(), lengths), rtol=tolerance, atol=tolerance)


def test_softmax_of_half_precision_does_not_lose_small_weights():
    # 300 equal keys: summing 300 bfloat16 exponentials in bfloat16 would stop at 256
    qkv = torch.zeros(300, 3, 1, 4, dtype=torch.bfloat16)
    qkv[:, 2] = 1
    got = ragged_attention_reference(qkv, None, 300)
    torch.testing.assert_close(got, torch.ones_like(got), rtol=0, atol=5e-3)


def test_wrong_shapes_are_refused_with_what_was_given():
    with pytest.raises(ValueError, match=r"\(rows, 3, heads, head_dim\), got \(4, 12\)"):
        ragged_attention_reference(torch.zeros(4, 12), None, 2)
    with pytest.raises(ValueError, match="multiple of longest = 5 rows, got 9"):
        ragged_attention_reference(draw([9]), None, 5)
