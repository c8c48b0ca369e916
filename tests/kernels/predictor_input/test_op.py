import random

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
    offsets_of,
    values_and_gradients,
)
from iwm_fast.kernels.predictor_input.autograd import copied_input, mixed_input
from iwm_fast.kernels.predictor_input.layout import PatchIndex, packed_layout
from iwm_fast.kernels.predictor_input.op import Mixer, predictor_input, predictor_input_reference

pytestmark = pytest.mark.fused

CONDITIONINGS = ("feature", "sequence", "none")
RAGGED = [3, 0, 2, 5], [4, 2, 0, 1]
MANY = [9, 0, 25, 1], [36, 35, 34, 36]


class Case:
    """Inputs of one conditioning, and both twins as functions of what has a gradient."""

    def __init__(self, conditioning, lengths=RAGGED, *, width=64, num_patches=9, dtype=torch.float64):
        contexts, targets = lengths
        self.conditioning, num_images = conditioning, len(contexts)
        num_tokens = 2 if conditioning == "sequence" else 0
        sizes = {"num_context": sum(contexts), "num_targets": sum(targets)}
        self.patches = PatchIndex(patch_rows(contexts, num_patches, 0), patch_rows(targets, num_patches, 1))
        self.places = packed_layout(offsets_of(contexts), offsets_of(targets), num_tokens, **sizes)
        self.positions = draw(num_patches, width, dtype=dtype, seed=2)
        shapes = [(sum(contexts), width), (width,)]
        if conditioning == "sequence":
            shapes += [(num_images, num_tokens, width)]
        if conditioning == "feature":
            shapes += [(num_images, 3), (width, width + 3), (width,), *2 * [(width, width), (width,)]]
        # a power of two keeps numbers exact, and weights of this size keep signals as large as they are
        scale = [2.0**-3 if len(shape) == 2 and shape[0] == width else 1.0 for shape in shapes]
        self.inputs = [draw(*shape, dtype=dtype, seed=10 + i) * scale[i] for i, shape in enumerate(shapes)]
        conditions = ["action_tokens"] if conditioning == "sequence" else Mixer._fields
        self.names = ["packed", "context", "mask_token", *conditions][: 1 + len(shapes)]

    def __call__(self, function, *inputs):
        context, mask_token, *conditions = inputs
        named = {}
        if self.conditioning == "sequence":
            named["action_tokens"] = conditions[0]
        if self.conditioning == "feature":
            named["mixer"] = Mixer(*conditions)
        positions = self.positions.double() if context.dtype == torch.float64 else self.positions
        return function(context, mask_token, positions, self.patches, self.places, **named)

    def fused(self, *inputs):
        return self(predictor_input, *inputs)

    def reference(self, *inputs):
        return self(predictor_input_reference, *inputs)


def patch_rows(lengths, num_patches, seed):
    chosen = random.Random(seed)
    rows = [b * num_patches + p for b, n in enumerate(lengths) for p in chosen.sample(range(num_patches), n)]
    return torch.tensor(rows, dtype=torch.int64, device=DEVICE)


def compare(case, dtype):
    got = values_and_gradients(case.fused, case.inputs)
    wanted = values_and_gradients(case.reference, [tensor.double() for tensor in case.inputs])
    assert got[0].dtype == case.reference(*case.inputs).dtype
    errors = {name: error(*pair) for name, *pair in zip(case.names, got, wanted, strict=True)}
    assert all(one <= TOLERANCE[dtype] for one in errors.values()), errors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_packed_and_every_gradient_are_the_references(conditioning, dtype):
    compare(Case(conditioning, dtype=dtype), dtype)


# two column blocks of 128; three of 64; edges within 64 in steps of 32 and of 16; more rows than a tile has
@pytest.mark.parametrize(("width", "lengths"), [(256, RAGGED), (192, RAGGED), (96, RAGGED), (48, MANY)])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_any_width_and_more_rows_than_a_tile(conditioning, width, lengths):
    for dtype in DTYPES[:2]:
        compare(Case(conditioning, lengths, width=width, num_patches=36, dtype=dtype), dtype)


@pytest.mark.parametrize("lengths", [([], []), ([0, 0], [0, 0]), ([2, 1], [0, 0]), ([0, 0], [1, 3])])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_context_targets_and_the_batch_may_be_empty(conditioning, lengths):
    compare(Case(conditioning, lengths, width=16, dtype=torch.float32), torch.float32)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_under_autocast_products_are_half_and_the_stream_is_float32(conditioning):
    case = Case(conditioning, width=64, dtype=torch.float32)
    case.inputs[0] = case.inputs[0].bfloat16()

    def under_autocast(function):
        def call(*inputs):
            with torch.autocast(DEVICE, torch.bfloat16):
                return case(function, *inputs)

        return call

    wanted = values_and_gradients(case.reference, [tensor.double() for tensor in case.inputs])
    got, plain = (
        values_and_gradients(under_autocast(f), case.inputs) for f in (predictor_input, predictor_input_reference)
    )
    assert (
        [one.dtype for one in got] == [one.dtype for one in plain] == [torch.float32, *(x.dtype for x in case.inputs)]
    )
    for name, one, other, exact in zip(case.names, got, plain, wanted, strict=True):
        assert error(one, exact) <= 1.1 * error(other, exact) + TOLERANCE[torch.float32], name
    # not computed in float32 unnoticed
    assert conditioning != "feature" or error(got[0], wanted[0]) > 1e-4


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_autocast_around_backward_does_not_change_the_operations_gradients(conditioning):
    case = Case(conditioning, width=16, dtype=torch.float32)
    inputs = [tensor.requires_grad_() for tensor in case.inputs]
    loss = case.fused(*inputs).square().sum()
    outside = torch.autograd.grad(loss, inputs, retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = torch.autograd.grad(loss, inputs)
    for name, one, other in zip(case.names[1:], outside, inside, strict=True):
        # the first layer's tables are torch's own products, as much under autocast as any
        assert torch.equal(one, other) or name in ("mask_token", "action", "w1", "b1"), name


@pytest.mark.parametrize("kind", AWKWARD_GRADIENTS)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_gradients_may_arrive_expanded_transposed_or_offset(conditioning, kind):
    case = Case(conditioning, width=16, dtype=torch.float32)
    inputs = [tensor.requires_grad_() for tensor in case.inputs]
    packed = case.fused(*inputs)
    gradient = awkward(kind, packed.shape, packed.dtype)
    got = torch.autograd.grad(packed, inputs, gradient)
    wanted = torch.autograd.grad(case.reference(*inputs), inputs, gradient)
    for name, one, other in zip(case.names[1:], got, wanted, strict=True):
        assert error(one, other) <= TOLERANCE[torch.float32], name


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 is not compiled")
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_gradient_matches_finite_differences(conditioning):
    case = Case(conditioning, ([1, 0], [1, 2]), width=16, num_patches=4)
    inputs = [tensor.requires_grad_() for tensor in case.inputs]
    # fast mode: one random direction through all entries
    assert torch.autograd.gradcheck(case.fused, inputs, fast_mode=True)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_gradients_are_bitwise_the_same_in_every_run(conditioning):
    case = Case(conditioning, ([9, 4], [20, 25]), num_patches=36, dtype=torch.float32)
    first, second = (values_and_gradients(case.fused, case.inputs) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_nan_in_one_image_is_not_hidden_and_stays_there(conditioning):
    case = Case(conditioning, dtype=torch.float32)
    case.inputs[0][case.patches.context // 9 == 2] = float("nan")
    if conditioning != "none":
        case.inputs[2][1] = float("nan")
    got = values_and_gradients(case.fused, case.inputs)
    wanted = values_and_gradients(case.reference, case.inputs)
    assert torch.equal(got[0].isnan(), wanted[0].isnan()) and got[0].isnan().any()
    # of context, and of action or action tokens: what belongs to one image
    for one, other in zip(got[1:4:2], wanted[1:4:2], strict=True):
        assert torch.equal(one.isnan(), other.isnan())


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_compiled_in_one_graph_it_gives_the_same(conditioning):
    case = Case(conditioning, width=16, dtype=torch.float32)
    compiled = torch.compile(case.fused, backend="aot_eager", fullgraph=True)
    got, wanted = values_and_gradients(compiled, case.inputs), values_and_gradients(case.fused, case.inputs)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


# opcheck itself looks at .grad of copies
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_operations_keep_the_rules_of_torch_library():
    case = Case("none", width=16, dtype=torch.float32)
    rows = [*case.patches, *case.places]
    context, table, tokens = case.inputs[0], draw(9, 16, dtype=torch.float32), draw(0, 16, dtype=torch.float32)
    given = [tensor.requires_grad_() for tensor in (context, table, tokens)]
    torch.library.opcheck(copied_input, (given[0], case.positions, *given[1:], rows))
    weights = [draw(*shape, dtype=torch.float32).requires_grad_() for shape in [(4, 16), *2 * [(16, 16), (16,)]]]
    tables = [case.positions, table, weights[0]]
    half = context.detach().half().requires_grad_()
    torch.library.opcheck(mixed_input, (half, tables, weights[1:], rows, torch.float32))


def test_what_kernels_cannot_read_is_refused():
    case = Case("feature", width=16, dtype=torch.float32)
    context, mask_token, *mixer = case.inputs
    with pytest.raises(ValueError, match="context must be contiguous, got shape"):
        case.fused(context.t().contiguous().t(), mask_token, *mixer)
    with pytest.raises(ValueError, match=r"mixer.w2 must be contiguous"):
        case.fused(context, mask_token, *mixer[:3], mixer[3].t(), *mixer[4:])
    with pytest.raises(TypeError, match="mask_token must have one of the dtypes bfloat16, float16, float32"):
        case.fused(context, mask_token.to(torch.float8_e5m2), *mixer)
    with pytest.raises(ValueError, match="multiple of 16, got 24"):
        narrow = Case("none", width=24, dtype=torch.float32)
        narrow.fused(*narrow.inputs)
    with pytest.raises(ValueError, match=r"mixer\.w3 must have shape"):
        case.fused(context, mask_token, *mixer[:5], mixer[5][:8], mixer[6])
