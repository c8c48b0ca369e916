import pytest
import torch

from fixtures.kernel_cases import (
    AWKWARD_GRADIENTS,
    DEVICE,
    DTYPES,
    TOLERANCE,
    awkward,
    draw,
    error,
    values_and_gradients,
)
from iwm_fast.kernels import launch
from iwm_fast.kernels import residual_norm as module
from iwm_fast.kernels.residual_norm import residual_norm, residual_norm_reference, shipped_launches

pytestmark = pytest.mark.fused

EPS = 1e-6
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
# of the update, of the stream and of weight and bias
MIXED = [(HALF, SINGLE, SINGLE), (torch.float16, SINGLE, SINGLE), (SINGLE, HALF, HALF), (HALF, torch.float16, SINGLE)]


def inputs(rows=9, width=128, dtypes=(SINGLE, SINGLE, SINGLE)):
    shapes = ((rows, width), (rows, width), (width,), (width,))
    kinds = (dtypes[0], dtypes[1], dtypes[2], dtypes[2])
    return [draw(*shape, dtype=kind, seed=i) for i, (shape, kind) in enumerate(zip(shapes, kinds, strict=True))]


def fused(x, residual, weight, bias):
    return residual_norm(x, residual, weight, bias, EPS)


def reference(x, residual, weight, bias):
    return residual_norm_reference(x, residual, weight, bias, EPS)


def assert_twins_agree(given, tolerance=0.0):
    got = values_and_gradients(fused, given)
    wanted = values_and_gradients(reference, [tensor.double() for tensor in given])
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        assert error(one, other) <= max(TOLERANCE[one.dtype], tolerance)
    assert [one.dtype for one in got[2:]] == [tensor.dtype for tensor in given]
    return got


def test_sum_and_norm_follow_the_formula():
    x, residual, weight, bias = inputs(5, 8, (DOUBLE,) * 3)
    total, normed = residual_norm_reference(x, residual, weight, bias, 1e-6)
    centred = total - total.mean(-1, keepdim=True)
    wanted = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [fused, reference])
def test_a_bfloat16_update_leaves_the_stream_in_float32(function):
    x, residual, weight, bias = inputs(dtypes=(HALF, SINGLE, SINGLE))
    total, normed = function(x, residual, weight, bias)
    assert total.dtype == normed.dtype == torch.float32
    assert torch.equal(total, x.float() + residual)


@pytest.mark.parametrize(
    "function",
    [reference, pytest.param(fused, marks=pytest.mark.skipif(DEVICE == "cuda", reason="float64 is not compiled"))],
)
def test_gradient_matches_finite_differences(function):
    given = [tensor.requires_grad_() for tensor in inputs(2, 16, (DOUBLE,) * 3)]
    assert torch.autograd.gradcheck(function, given, fast_mode=function is fused)


@pytest.mark.parametrize("dtypes", [(dtype,) * 3 for dtype in DTYPES] + MIXED)
def test_fused_agrees_with_float64_in_every_dtype(dtypes):
    total, normed, *_ = assert_twins_agree(inputs(9, 384, dtypes))
    assert total.dtype == normed.dtype == torch.promote_types(dtypes[0], dtypes[1])


@pytest.mark.parametrize("width", [16, 128, 192, 320, 384, 1024, 1408])
def test_fused_agrees_at_any_width(width):
    assert_twins_agree(inputs(5, width))


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 33, 100])
def test_fused_agrees_at_any_number_of_rows(rows):
    assert_twins_agree(inputs(rows))


@pytest.mark.parametrize("width", [128, 528])
def test_a_program_adds_up_the_weights_of_all_its_rows(monkeypatch, width):
    monkeypatch.setattr(module, "_MAX_PROGRAMS", 2)
    assert_twins_agree(inputs(21, width))


def test_the_sum_is_normalised_as_it_is_stored():
    # the next float16 after 2048 is 2050: the stored sum is constant and its norm zero
    x, residual, weight, bias = inputs(dtypes=(torch.float16,) * 3)
    total, normed = fused(torch.full_like(x, 2048.0), residual.clamp(0.0, 0.9), weight, bias)
    assert total.eq(2048.0).all() and torch.equal(normed, bias.expand_as(normed))


def test_a_large_mean_does_not_drown_the_variance():
    x, residual, weight, bias = inputs()
    residual = residual + 3000.0
    wanted = reference(x.double(), residual.double(), weight.double(), bias.double())[1]
    assert error(fused(x, residual, weight, bias)[1], wanted) <= 1e-3


@pytest.mark.parametrize("kind", AWKWARD_GRADIENTS)
def test_gradients_may_come_in_any_layout(kind):
    given = [tensor.requires_grad_() for tensor in inputs()]
    outs = fused(*given)
    gradients = [awkward(kind, out.shape, out.dtype) for out in outs]
    got = torch.autograd.grad(outs, given, gradients, retain_graph=True)
    wanted = torch.autograd.grad(
        outs, given, [gradient.clone(memory_format=torch.contiguous_format) for gradient in gradients]
    )
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("dtypes", [(SINGLE,) * 3, (HALF, SINGLE, SINGLE)])
def test_one_of_the_results_may_be_unused(used, dtypes):
    def gradients(function, given):
        given = [tensor.requires_grad_() for tensor in given]
        out = function(*given)[used]
        return torch.autograd.grad(out, given, draw(*out.shape, dtype=torch.float16).to(out.dtype), allow_unused=True)

    given = inputs(dtypes=dtypes)
    for got, wanted in zip(gradients(fused, given), gradients(reference, [x.double() for x in given]), strict=True):
        assert (got is None) == (wanted is None) == (used == 0 and wanted is None)
        assert got is None or error(got, wanted) <= TOLERANCE[got.dtype]


def test_gradients_are_bitwise_repeatable():
    given = inputs(9, 384)
    first, second = values_and_gradients(fused, given), values_and_gradients(fused, given)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("place", [0, 1])
def test_a_row_of_nan_stays_alone(place):
    given = inputs(6)
    clean = values_and_gradients(fused, given)
    given[place][2, 5] = float("nan")
    spoilt = values_and_gradients(fused, given)
    others = torch.tensor([0, 1, 3, 4, 5], device=DEVICE)
    for one, other in zip(clean[:4], spoilt[:4], strict=True):
        assert torch.equal(one[others], other[others]) and other[2].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, HALF])
def test_under_autocast_the_norm_has_its_dtype(dtype):
    given = inputs(dtypes=(dtype, SINGLE, SINGLE))
    with torch.autocast(DEVICE, dtype=dtype):
        total, normed = fused(*given)
        # the gradient of the norm arrives rounded to its dtype
        cast = assert_twins_agree(given, TOLERANCE[dtype])
    plain = fused(*given)
    assert torch.equal(total, plain[0]) and cast[1].dtype == dtype
    assert torch.equal(normed, plain[1].to(dtype))


# torch filters its own warning, but not where warnings are errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("dtypes", [(SINGLE,) * 3, (HALF, SINGLE, SINGLE)])
def test_the_operations_keep_the_contract_of_torch_library(dtypes):
    given = [tensor.requires_grad_() for tensor in inputs(dtypes=dtypes)]
    settings = {"eps": EPS, "normed_dtype": dtypes[0]}
    torch.library.opcheck(torch.ops.iwm_fast.residual_norm.default, given, settings)
    total, normed, stats = (out.detach() for out in torch.ops.iwm_fast.residual_norm(*given, **settings))
    saved = [total, stats, given[2].detach()]
    for d_total in (total, None):
        torch.library.opcheck(
            torch.ops.iwm_fast.residual_norm_backward.default, (d_total, normed, saved, dtypes[0], dtypes[1])
        )


@pytest.mark.parametrize("is_mixed", [False, True])
def test_compiled_equals_eager_for_changing_numbers_of_rows(is_mixed):
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 9):
        given = inputs(rows, dtypes=(HALF, SINGLE, SINGLE))
        with torch.autocast(DEVICE, dtype=HALF, enabled=is_mixed):
            got, wanted = values_and_gradients(compiled, given), values_and_gradients(fused, given)
        assert wanted[1].dtype == (HALF if is_mixed else SINGLE)
        for one, other in zip(got, wanted, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({0: lambda x: x[:, :24]}, ValueError, r"multiple of 16 up to 1536, got \(9, 24\)"),
        ({0: lambda x: x.repeat(1, 13)}, ValueError, r"multiple of 16 up to 1536, got \(9, 1664\)"),
        ({0: lambda x: x[None]}, ValueError, r"x must have shape \(M, D\).*got \(1, 9, 128\)"),
        ({1: lambda x: x[:8]}, ValueError, r"residual must have shape \(9, 128\) to fit x, got \(8, 128\)"),
        ({2: lambda x: x[None]}, ValueError, r"weight must have shape \(128,\)"),
        ({3: lambda x: x[:16]}, ValueError, r"bias must have shape \(128,\)"),
        ({0: lambda x: x.T.contiguous().T}, ValueError, r"x must be contiguous.*strides \(1, 9\)"),
        ({1: lambda x: x.T.contiguous().T}, ValueError, "residual must be contiguous"),
        ({0: lambda x: x.int()}, TypeError, "x must have one of the dtypes bfloat16, float16, float32.*got int32"),
        ({2: lambda x: x.int()}, TypeError, "weight must have one of the dtypes"),
    ],
)
def test_what_does_not_fit_is_refused(change, kind, message):
    given = [change.get(i, lambda x: x)(tensor) for i, tensor in enumerate(inputs())]
    with pytest.raises(kind, match=message):
        fused(*given)


def test_on_a_cpu_the_fused_operation_names_the_setting_to_change(monkeypatch):
    monkeypatch.setattr(launch, "IS_INTERPRETING", False)
    with pytest.raises(RuntimeError, match=r"'cpu'; set runtime.ops=reference"):
        fused(*(tensor.cpu() for tensor in inputs()))


def test_every_usual_width_ships_forward_and_backward():
    for name, shipped in shipped_launches(90).items():
        assert shipped.arguments.keys() | shipped.constants.keys() == set(shipped.kernel.arg_names), name
    assert {shipped.constants["WIDTH"] for shipped in shipped_launches(90).values()} >= {
        192,
        384,
        768,
        1024,
        1280,
        1408,
    }
