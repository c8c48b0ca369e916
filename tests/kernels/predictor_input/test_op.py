import random

import pytest
import torch

from fixtures.kernel_cases import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    TOLERANCE,
    draw,
    error,
    make_gradient,
    offsets_of,
    values_and_gradients,
)
from iwm_fast.kernels.predictor_input.layout import PatchIndex, packed_layout
from iwm_fast.kernels.predictor_input.op import FeatureMixer, predictor_input, predictor_input_reference

pytestmark = pytest.mark.fused

CONDITIONINGS = ("feature", "sequence", "none")
RAGGED = [3, 0, 2, 5], [4, 2, 0, 1]
MANY_ROWS = [9, 0, 25, 1], [36, 35, 34, 36]


class Example:
    """Inputs for one kind of conditioning; `fused` and `reference` are functions of the inputs that have a gradient."""

    def __init__(self, conditioning, lengths=RAGGED, *, width=64, num_patches=9, dtype=torch.float64):
        contexts, targets = lengths
        self.conditioning, num_images = conditioning, len(contexts)
        num_tokens = 2 if conditioning == "sequence" else 0
        sizes = {"num_context": sum(contexts), "num_targets": sum(targets)}
        self.patches = PatchIndex(patch_rows(contexts, num_patches, 0), patch_rows(targets, num_patches, 1))
        self.layout = packed_layout(offsets_of(contexts), offsets_of(targets), num_tokens, **sizes)
        self.positions = draw(num_patches, width, dtype=dtype, seed=2)
        shapes = [(sum(contexts), width), (width,)]
        if conditioning == "sequence":
            shapes += [(num_images, num_tokens, width)]
        if conditioning == "feature":
            shapes += [(num_images, 3), (width, width + 3), (width,), *2 * [(width, width), (width,)]]
        # Weights of this size keep the scale of their inputs, and a power of two keeps the numbers exact.
        scale = [2.0**-3 if len(shape) == 2 and shape[0] == width else 1.0 for shape in shapes]
        self.inputs = [draw(*shape, dtype=dtype, seed=10 + i) * scale[i] for i, shape in enumerate(shapes)]
        conditions = ["action_tokens"] if conditioning == "sequence" else FeatureMixer._fields
        self.names = ["packed", "context", "mask_token", *conditions][: 1 + len(shapes)]

    def __call__(self, function, *inputs):
        context, mask_token, *conditions = inputs
        named = {}
        if self.conditioning == "sequence":
            named["action_tokens"] = conditions[0]
        if self.conditioning == "feature":
            named["mixer"] = FeatureMixer(*conditions)
        positions = self.positions.double() if context.dtype == torch.float64 else self.positions
        return function(context, mask_token, positions, self.patches, self.layout, **named)

    def fused(self, *inputs):
        return self(predictor_input, *inputs)

    def reference(self, *inputs):
        return self(predictor_input_reference, *inputs)


def patch_rows(lengths, num_patches, seed):
    generator = random.Random(seed)
    rows = [b * num_patches + p for b, n in enumerate(lengths) for p in generator.sample(range(num_patches), n)]
    return torch.tensor(rows, dtype=torch.int64, device=DEVICE)


def assert_matches_reference(example, dtype):
    actual = values_and_gradients(example.fused, example.inputs)
    expected = values_and_gradients(example.reference, [tensor.double() for tensor in example.inputs])
    assert actual[0].dtype == example.reference(*example.inputs).dtype
    errors = {name: error(*pair) for name, *pair in zip(example.names, actual, expected, strict=True)}
    assert all(value <= TOLERANCE[dtype] for value in errors.values()), errors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_output_and_every_gradient_match_the_reference(conditioning, dtype):
    assert_matches_reference(Example(conditioning, dtype=dtype), dtype)


# Two column blocks of 128, three of 64, a partial block with an inner size of 32, and of 16 with more rows than a tile.
@pytest.mark.parametrize(("width", "lengths"), [(256, RAGGED), (192, RAGGED), (96, RAGGED), (48, MANY_ROWS)])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_any_width_and_more_rows_than_a_tile_match_the_reference(conditioning, width, lengths):
    for dtype in DTYPES[:2]:
        assert_matches_reference(Example(conditioning, lengths, width=width, num_patches=36, dtype=dtype), dtype)


@pytest.mark.parametrize("lengths", [([], []), ([0, 0], [0, 0]), ([2, 1], [0, 0]), ([0, 0], [1, 3])])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_context_targets_and_the_batch_may_be_empty(conditioning, lengths):
    assert_matches_reference(Example(conditioning, lengths, width=16, dtype=torch.float32), torch.float32)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_under_autocast_only_the_products_are_in_half_precision(conditioning):
    example = Example(conditioning, width=64, dtype=torch.float32)
    example.inputs[0] = example.inputs[0].bfloat16()

    def under_autocast(function):
        def call(*inputs):
            with torch.autocast(DEVICE, torch.bfloat16):
                return example(function, *inputs)

        return call

    expected = values_and_gradients(example.reference, [tensor.double() for tensor in example.inputs])
    actual = values_and_gradients(under_autocast(predictor_input), example.inputs)
    plain = values_and_gradients(under_autocast(predictor_input_reference), example.inputs)
    dtypes = [torch.float32, *(tensor.dtype for tensor in example.inputs)]
    assert [value.dtype for value in actual] == [value.dtype for value in plain] == dtypes
    for name, value, plain_value, exact in zip(example.names, actual, plain, expected, strict=True):
        assert error(value, exact) <= 1.1 * error(plain_value, exact) + TOLERANCE[torch.float32], name
    # An error as small as float32's would mean that products were not in half precision.
    assert conditioning != "feature" or error(actual[0], expected[0]) > 1e-4


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_autocast_around_backward_does_not_change_gradients(conditioning):
    example = Example(conditioning, width=16, dtype=torch.float32)
    inputs = [tensor.requires_grad_() for tensor in example.inputs]
    loss = example.fused(*inputs).square().sum()
    outside = torch.autograd.grad(loss, inputs, retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = torch.autograd.grad(loss, inputs)
    for name, gradient, under_autocast in zip(example.names[1:], outside, inside, strict=True):
        # The mixer's layers are products of torch, whose gradients follow autocast.
        assert torch.equal(gradient, under_autocast) or (conditioning == "feature" and name != "context"), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_incoming_gradients_may_have_any_memory_layout(conditioning, layout):
    example = Example(conditioning, width=16, dtype=torch.float32)
    inputs = [tensor.requires_grad_() for tensor in example.inputs]
    packed = example.fused(*inputs)
    gradient = make_gradient(layout, packed.shape, packed.dtype)
    actual = torch.autograd.grad(packed, inputs, gradient)
    expected = torch.autograd.grad(example.reference(*inputs), inputs, gradient)
    for name, value, exact in zip(example.names[1:], actual, expected, strict=True):
        assert error(value, exact) <= TOLERANCE[torch.float32], name


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 is not compiled")
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_gradient_matches_finite_differences(conditioning):
    example = Example(conditioning, ([1, 0], [1, 2]), width=16, num_patches=4)
    inputs = [tensor.requires_grad_() for tensor in example.inputs]
    # Fast mode checks one random direction instead of every entry.
    assert torch.autograd.gradcheck(example.fused, inputs, fast_mode=True)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_gradients_are_bitwise_reproducible(conditioning):
    example = Example(conditioning, ([9, 4], [20, 25]), num_patches=36, dtype=torch.float32)
    first, second = (values_and_gradients(example.fused, example.inputs) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_nan_stays_in_its_image_and_is_not_hidden(conditioning):
    example = Example(conditioning, dtype=torch.float32)
    example.inputs[0][example.patches.context // 9 == 2] = float("nan")
    if conditioning != "none":
        example.inputs[2][1] = float("nan")
    actual = values_and_gradients(example.fused, example.inputs)
    expected = values_and_gradients(example.reference, example.inputs)
    assert torch.equal(actual[0].isnan(), expected[0].isnan()) and actual[0].isnan().any()
    # The gradients of what belongs to one image: context, and action or action tokens.
    for value, reference in zip(actual[1:4:2], expected[1:4:2], strict=True):
        assert torch.equal(value.isnan(), reference.isnan())


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_compiled_as_one_graph_equals_eager(conditioning):
    example = Example(conditioning, width=16, dtype=torch.float32)
    compiled = torch.compile(example.fused, backend="aot_eager", fullgraph=True)
    actual = values_and_gradients(compiled, example.inputs)
    expected = values_and_gradients(example.fused, example.inputs)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_the_operations_pass_opcheck():
    example, ops = Example("none", width=16, dtype=torch.float32), torch.ops.iwm_fast
    by_patch, by_image = draw(9, 16, dtype=torch.float32), draw(4, 16, dtype=torch.float32)
    targets = example.patches.targets
    for gate in (None, by_image):
        out = ops.combine_rows(by_patch, gate, targets, torch.float16)
        torch.library.opcheck(ops.combine_rows.default, (by_patch, gate, targets, torch.float16))
        backward = (out, None if gate is None else out, targets, [9, 4], torch.float32)
        torch.library.opcheck(ops.combine_rows_backward.default, backward)
    rows = [example.layout.context, example.layout.targets]
    place = [example.inputs[0], out], rows, example.positions, example.patches.context, torch.float32
    torch.library.opcheck(ops.place_rows.default, place)
    torch.library.opcheck(ops.gather_rows.default, (ops.place_rows(*place), rows[0], torch.float16))


def test_unsupported_inputs_are_refused():
    example = Example("feature", width=16, dtype=torch.float32)
    context, mask_token, *mixer = example.inputs
    with pytest.raises(ValueError, match="context must be contiguous, got shape"):
        example.fused(context.t().contiguous().t(), mask_token, *mixer)
    with pytest.raises(ValueError, match=r"mixer.w2 must be contiguous"):
        example.fused(context, mask_token, *mixer[:3], mixer[3].t(), *mixer[4:])
    with pytest.raises(TypeError, match="mask_token must have one of the dtypes bfloat16, float16, float32"):
        example.fused(context, mask_token.to(torch.float8_e5m2), *mixer)
    with pytest.raises(ValueError, match=r"multiples of 16, got 24; set runtime.ops=reference"):
        narrow = Example("none", width=24, dtype=torch.float32)
        narrow.fused(*narrow.inputs)
    with pytest.raises(ValueError, match=r"mixer\.w3 must have shape"):
        example.fused(context, mask_token, *mixer[:5], mixer[5][:8], mixer[6])
