from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, varlen
from torch.utils._python_dispatch import TorchDispatchMode

from iwm_fast.kernels.attention import reference
from iwm_fast.kernels.attention.reference import _dense, ragged_attention_reference
from iwm_fast.kernels.attention.sequences import Sequences

HEADS, HEAD_DIM = 3, 4
FLASH = int(SDPBackend.FLASH_ATTENTION)


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


class _Calls(TorchDispatchMode):
    """Keep the names of all operations of PyTorch that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_gradients_of_queries_keys_and_values_are_combined_without_another_copy():
    qkv = draw([6, 6], torch.float32).requires_grad_()
    # What runs on a GPU in half precision.
    out = _dense(qkv, 6, is_gpu_half=True)
    torch.testing.assert_close(out, ragged_attention_reference(qkv, dense(6)))
    with _Calls() as calls:
        (gradient,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert gradient.is_contiguous() and "stack" in calls.names and "clone" not in calls.names


@pytest.fixture
def varlen_calls(monkeypatch):
    """Return the list of SDPA backends, cuDNN and FlashAttention, that were enabled in each call of varlen_attn."""
    calls = []

    def record(query, *_):
        calls.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()))
        return query

    monkeypatch.setattr(varlen, "varlen_attn", record)
    return calls


@pytest.mark.parametrize(("major", "calls"), [(9, [(False, True)]), (8, [(False, True)]), (7, [])])
def test_packed_half_precision_is_left_to_flash_attention_where_it_runs(monkeypatch, varlen_calls, major, calls):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    with FakeTensorMode():
        qkv = torch.empty(9, 3, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        offsets = torch.empty(3, dtype=torch.int32, device="cuda")
        out = ragged_attention_reference(qkv, Sequences(offsets, 3, 6))
    assert out.shape == (9, HEADS, HEAD_DIM) and varlen_calls == calls
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_compiled_model_leaves_packed_half_precision_to_flash_attention(monkeypatch):
    monkeypatch.setattr(reference, "_has_flash_attention", lambda _: True)
    # Some versions of PyTorch would otherwise choose cuDNN.
    monkeypatch.setattr(varlen, "_cudnn_rejection_reasons", lambda *_: [], raising=False)
    backends = []

    def compile_graph(graph, _):
        nodes = [node for node in graph.graph.nodes if "_varlen_attn" in str(node.target)]
        # PyTorch 2.11 has FlashAttention only; versions with a choice pass it as the last argument.
        backends.extend(node.args[-1] if hasattr(varlen, "_select_backend") else FLASH for node in nodes)
        return graph.forward

    compiled = torch.compile(ragged_attention_reference, backend=compile_graph, fullgraph=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        qkv = torch.empty(9, 3, HEADS, 8, dtype=torch.bfloat16, device="cuda")
        compiled(qkv, Sequences(torch.empty(3, dtype=torch.int32, device="cuda"), 3, 6))
    assert backends == [FLASH]


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
