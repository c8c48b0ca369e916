import pytest
import torch

from fixtures.kernel_cases import DEVICE, DTYPES, LAYOUTS, TOLERANCE, draw, error, make_gradient, values_and_gradients
from iwm_fast.kernels import launch
from iwm_fast.kernels import residual_norm as module
from iwm_fast.kernels.residual_norm import residual_norm, residual_norm_reference, shipped_launches

pytestmark = pytest.mark.fused

EPS = 1e-6
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
# Dtypes of x, of the residual stream, and of weight and bias.
MIXED = [(HALF, SINGLE, SINGLE), (torch.float16, SINGLE, SINGLE), (SINGLE, HALF, HALF), (HALF, torch.float16, SINGLE)]


def make_inputs(num_rows=9, width=128, dtypes=(SINGLE, SINGLE, SINGLE)):
    shapes = ((num_rows, width), (num_rows, width), (width,), (width,))
    pairs = zip(shapes, (*dtypes, dtypes[2]), strict=True)
    return [draw(*shape, dtype=dtype, seed=i) for i, (shape, dtype) in enumerate(pairs)]


def fused(x, residual, weight, bias):
    return residual_norm(x, residual, weight, bias, EPS)


def reference(x, residual, weight, bias):
    return residual_norm_reference(x, residual, weight, bias, EPS)


def assert_matches_reference(inputs, tolerance=0.0):
    actual = values_and_gradients(fused, inputs)
    expected = values_and_gradients(reference, [tensor.double() for tensor in inputs])
    for value, exact in zip(actual, expected, strict=True):
        assert value.shape == exact.shape
        assert error(value, exact) <= max(TOLERANCE[value.dtype], tolerance)
    assert [gradient.dtype for gradient in actual[2:]] == [tensor.dtype for tensor in inputs]
    return actual


def test_sum_and_norm_follow_the_formula():
    x, residual, weight, bias = make_inputs(5, 8, (DOUBLE,) * 3)
    total, normed = residual_norm_reference(x, residual, weight, bias, 1e-6)
    centred = total - total.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [fused, reference])
def test_a_bfloat16_update_leaves_the_residual_stream_in_float32(function):
    x, residual, weight, bias = make_inputs(dtypes=(HALF, SINGLE, SINGLE))
    total, normed = function(x, residual, weight, bias)
    assert total.dtype == normed.dtype == torch.float32
    assert torch.equal(total, x.float() + residual)


@pytest.mark.parametrize(
    "function",
    [reference, pytest.param(fused, marks=pytest.mark.skipif(DEVICE == "cuda", reason="float64 is not compiled"))],
)
def test_gradient_matches_finite_differences(function):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(2, 16, (DOUBLE,) * 3)]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=function is fused)


@pytest.mark.parametrize("dtypes", [(dtype,) * 3 for dtype in DTYPES] + MIXED)
def test_fused_agrees_with_float64_in_every_dtype(dtypes):
    total, normed, *_ = assert_matches_reference(make_inputs(9, 384, dtypes))
    assert total.dtype == normed.dtype == torch.promote_types(dtypes[0], dtypes[1])


@pytest.mark.parametrize("width", [16, 128, 192, 320, 384, 1024, 1408])
def test_fused_agrees_at_any_width(width):
    assert_matches_reference(make_inputs(5, width))


@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 9, 33, 100])
def test_fused_agrees_at_any_number_of_rows(num_rows):
    assert_matches_reference(make_inputs(num_rows))


@pytest.mark.parametrize("width", [128, 528])
def test_a_program_sums_weight_gradients_over_all_its_rows(monkeypatch, width):
    monkeypatch.setattr(module, "_MAX_PROGRAMS", 2)
    assert_matches_reference(make_inputs(21, width))


def test_the_norm_is_that_of_the_rounded_sum():
    # The float16 after 2048 is 2050, so the stored sum is constant and its norm is the bias.
    x, residual, weight, bias = make_inputs(dtypes=(torch.float16,) * 3)
    total, normed = fused(torch.full_like(x, 2048.0), residual.clamp(0.0, 0.9), weight, bias)
    assert total.eq(2048.0).all() and torch.equal(normed, bias.expand_as(normed))


def test_a_large_mean_does_not_drown_the_variance():
    x, residual, weight, bias = make_inputs()
    residual = residual + 3000.0
    expected = reference(x.double(), residual.double(), weight.double(), bias.double())[1]
    assert error(fused(x, residual, weight, bias)[1], expected) <= 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_incoming_gradients_may_have_any_memory_layout(layout):
    inputs = [tensor.requires_grad_() for tensor in make_inputs()]
    outputs = fused(*inputs)
    gradients = [make_gradient(layout, out.shape, out.dtype) for out in outputs]
    actual = torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)
    expected = torch.autograd.grad(
        outputs, inputs, [gradient.clone(memory_format=torch.contiguous_format) for gradient in gradients]
    )
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("dtypes", [(SINGLE,) * 3, (HALF, SINGLE, SINGLE)])
def test_either_result_may_be_unused(used, dtypes):
    def gradients(function, inputs):
        inputs = [tensor.requires_grad_() for tensor in inputs]
        out = function(*inputs)[used]
        return torch.autograd.grad(out, inputs, draw(*out.shape, dtype=torch.float16).to(out.dtype), allow_unused=True)

    inputs = make_inputs(dtypes=dtypes)
    for actual, expected in zip(
        gradients(fused, inputs), gradients(reference, [x.double() for x in inputs]), strict=True
    ):
        assert (actual is None) == (expected is None) == (used == 0 and expected is None)
        assert actual is None or error(actual, expected) <= TOLERANCE[actual.dtype]


def test_gradients_are_bitwise_reproducible():
    inputs = make_inputs(9, 384)
    first, second = values_and_gradients(fused, inputs), values_and_gradients(fused, inputs)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("index", [0, 1])
def test_nan_stays_in_its_row(index):
    inputs = make_inputs(6)
    clean = values_and_gradients(fused, inputs)
    inputs[index][2, 5] = float("nan")
    dirty = values_and_gradients(fused, inputs)
    others = torch.tensor([0, 1, 3, 4, 5], device=DEVICE)
    for before, after in zip(clean[:4], dirty[:4], strict=True):
        assert torch.equal(before[others], after[others]) and after[2].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, HALF])
def test_under_autocast_the_norm_has_autocasts_dtype(dtype):
    inputs = make_inputs(dtypes=(dtype, SINGLE, SINGLE))
    with torch.autocast(DEVICE, dtype=dtype):
        total, normed = fused(*inputs)
        # The gradient of the norm arrives rounded to its dtype.
        cast = assert_matches_reference(inputs, TOLERANCE[dtype])
    plain = fused(*inputs)
    assert torch.equal(total, plain[0]) and cast[1].dtype == dtype
    assert torch.equal(normed, plain[1].to(dtype))


@pytest.mark.parametrize("dtypes", [(SINGLE,) * 3, (HALF, SINGLE, SINGLE)])
def test_the_operations_pass_opcheck(dtypes):
    inputs = make_inputs(dtypes=dtypes)
    torch.library.opcheck(torch.ops.iwm_fast.residual_norm.default, (inputs, EPS, dtypes[0]))
    total, normed, stats = torch.ops.iwm_fast.residual_norm(inputs, EPS, dtypes[0])
    for d_total in (total, None):
        gradients = (d_total, normed, [total, stats, inputs[2]], dtypes[0], dtypes[1])
        torch.library.opcheck(torch.ops.iwm_fast.residual_norm_backward.default, gradients)


@pytest.mark.parametrize("is_mixed", [False, True])
def test_compiled_equals_eager_for_changing_numbers_of_rows(is_mixed):
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=True)
    for num_rows in (5, 9):
        inputs = make_inputs(num_rows, dtypes=(HALF, SINGLE, SINGLE))
        with torch.autocast(DEVICE, dtype=HALF, enabled=is_mixed):
            actual, expected = values_and_gradients(compiled, inputs), values_and_gradients(fused, inputs)
        assert expected[1].dtype == (HALF if is_mixed else SINGLE)
        for value, eager in zip(actual, expected, strict=True):
            assert value.dtype == eager.dtype and torch.equal(value, eager)


@pytest.mark.parametrize(
    ("change", "error_type", "message"),
    [
        ({0: lambda x: x[:, :24]}, ValueError, r"multiples of 16 up to 1536, got 24.*\(9, 24\)"),
        ({0: lambda x: x.repeat(1, 13)}, ValueError, r"multiples of 16 up to 1536, got 1664.*\(9, 1664\)"),
        ({0: lambda x: x[None]}, ValueError, r"takes a matrix: x has shape \(1, 9, 128\), not \(M, D\)"),
        ({1: lambda x: x[:8]}, ValueError, r"residual must have shape \(9, 128\) to fit x, got \(8, 128\)"),
        ({2: lambda x: x[None]}, ValueError, r"weight must have shape \(128,\)"),
        ({3: lambda x: x[:16]}, ValueError, r"bias must have shape \(128,\)"),
        ({0: lambda x: x.T.contiguous().T}, ValueError, r"x must be contiguous.*strides \(1, 9\)"),
        ({1: lambda x: x.T.contiguous().T}, ValueError, "residual must be contiguous"),
        ({0: lambda x: x.int()}, TypeError, "x must have one of the dtypes bfloat16, float16, float32.*got int32"),
        ({2: lambda x: x.int()}, TypeError, "weight must have one of the dtypes"),
    ],
)
def test_unsupported_inputs_are_refused(change, error_type, message):
    inputs = [change.get(i, lambda x: x)(tensor) for i, tensor in enumerate(make_inputs())]
    with pytest.raises(error_type, match=message):
        fused(*inputs)


def test_without_a_gpu_the_error_names_the_setting_to_change(monkeypatch):
    monkeypatch.setattr(launch, "IS_INTERPRETING", False)
    with pytest.raises(RuntimeError, match=r"'cpu'; set runtime.ops=reference"):
        fused(*(tensor.cpu() for tensor in make_inputs()))


def test_launches_of_usual_widths_pass_every_kernel_parameter():
    launches = shipped_launches(90)
    for name, shipped in launches.items():
        assert shipped.arguments.keys() | shipped.constants.keys() == set(shipped.kernel.arg_names), name
    assert {shipped.constants["WIDTH"] for shipped in launches.values()} >= {192, 384, 768, 1024, 1280, 1408}
