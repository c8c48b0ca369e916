from dataclasses import replace

import pytest
import torch

from fixtures.kernel_cases import DEVICE, error
from iwm_fast.kernels.ops import FUSED, REFERENCE
from iwm_fast.models.predictor import IdentityPredictor
from iwm_fast.models.student import build_student

CONTEXT, TARGET = [[0, 1, 5], [2, 3, 7, 10], [4]], [[6, 9], [11], [12, 13, 14]]
CONDITIONINGS = ("feature", "sequence", "none")


@pytest.fixture
def student(tiny_config):
    def build(**settings):
        return build_student(tiny_config(**settings), REFERENCE)

    return build


def per_patch(gradient):
    """Return the absolute gradient of each image and patch, summed over pixels."""
    return gradient.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((1, 4, 5)).flatten(1)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_hidden_source_patches_do_not_reach_the_prediction(student, make_batch, conditioning):
    batch = make_batch(CONTEXT, TARGET)
    batch.source_view.requires_grad_()
    student(conditioning=conditioning)(batch).predicted_tokens.square().sum().backward()
    reached = [norms.nonzero().flatten().tolist() for norms in per_patch(batch.source_view.grad)]
    assert reached == CONTEXT


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_images_of_a_batch_do_not_influence_each_other(student, make_batch, conditioning):
    batch = make_batch(CONTEXT, TARGET)
    batch.source_view.requires_grad_()
    batch.action.requires_grad_()
    predicted = student(conditioning=conditioning)(batch).predicted_tokens
    # Row 2 is the only prediction of the second image.
    predicted[2].square().sum().backward()
    assert per_patch(batch.source_view.grad).sum(1).nonzero().flatten().tolist() == [1]
    if conditioning != "none":
        assert batch.action.grad.abs().sum(1).nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("conditioning", ["feature", "sequence"])
def test_every_action_entry_reaches_the_prediction(student, make_batch, conditioning):
    batch = make_batch(CONTEXT, TARGET)
    batch.action.requires_grad_()
    student(conditioning=conditioning)(batch).predicted_tokens.square().sum().backward()
    assert batch.action.grad.ne(0).all()


@pytest.mark.parametrize("conditioning", ["feature", "sequence"])
def test_action_entries_are_distinguished(student, make_batch, conditioning):
    module, batch = student(conditioning=conditioning), make_batch(CONTEXT, TARGET)
    swapped = replace(batch, action=batch.action.flip(1))
    assert not torch.allclose(module(batch).predicted_tokens, module(swapped).predicted_tokens, atol=1e-4)


def test_the_mixer_holds_the_parameters_layer_by_layer(student, make_batch):
    conditioning, action = student(conditioning="feature").predictor.mixer, make_batch(CONTEXT, TARGET).action
    mixed_action, *layers = conditioning(action)
    names = [f"layers.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    assert mixed_action is action
    assert all(layer is conditioning.get_parameter(name) for layer, name in zip(layers, names, strict=True))


def test_without_conditioning_the_action_does_not_reach_the_prediction(student, make_batch):
    batch = make_batch(CONTEXT, TARGET)
    batch.action.requires_grad_()
    module = student(conditioning="none")
    loss = module(batch).predicted_tokens.square().sum()
    assert torch.autograd.grad(loss, batch.action, allow_unused=True) == (None,)


def single_batches(batch, make_batch, ragged):
    """Yield the three images of a batch as batches of one image."""
    for i in range(3):
        fields = {"source_view": batch.source_view[i : i + 1], "action": batch.action[i : i + 1]}
        fields |= {"context": ragged(CONTEXT[i : i + 1]), "target": ragged(TARGET[i : i + 1])}
        yield replace(make_batch(CONTEXT[:1], TARGET[:1]), **fields)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_packed_images_equal_one_image_at_a_time(student, make_batch, ragged, conditioning):
    module, batch = student(conditioning=conditioning), make_batch(CONTEXT, TARGET)
    alone = [module(single).predicted_tokens for single in single_batches(batch, make_batch, ragged)]
    torch.testing.assert_close(module(batch).predicted_tokens, torch.cat(alone))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_order_of_patches_does_not_matter(student, make_batch, conditioning):
    module = student(conditioning=conditioning)
    forward = module(make_batch([[0, 1, 5]], [[6, 9, 2]])).predicted_tokens
    backward = module(make_batch([[5, 0, 1]], [[2, 9, 6]])).predicted_tokens
    torch.testing.assert_close(forward.flip(0), backward)


def test_targets_may_be_all_patches_and_an_image_may_have_none(student, make_batch):
    predicted = student()(make_batch([[1, 2], [3]], [range(16), []])).predicted_tokens
    assert predicted.shape == (16, 16) and predicted.isfinite().all()


def test_depth_zero_returns_the_context_tokens_and_patches(student, make_batch):
    module, batch = student(predictor_depth=0), make_batch(CONTEXT, TARGET)
    prediction = module(batch)
    assert isinstance(module.predictor, IdentityPredictor)
    assert torch.equal(prediction.predicted_tokens, prediction.context_tokens)
    assert prediction.patches is module.predictor.predicted_patches(batch.context, batch.target) is batch.context
    assert student()(batch).patches is batch.target


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_parameter_gets_a_gradient(student, make_batch, conditioning):
    module = student(conditioning=conditioning)
    module(make_batch(CONTEXT, TARGET)).predicted_tokens.square().sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("depth", [0, 2])
def test_a_hook_on_each_output_sees_every_gradient_once(student, make_batch, depth):
    # DeepSpeed has such hooks, which scale gradients. In fp32 and at depth 0, outputs would share tensors.
    module, batch = student(predictor_depth=depth), make_batch(CONTEXT, TARGET)

    def gradient(scale):
        module.zero_grad()
        outputs = module(batch)[:2]
        for output in outputs:
            output.register_hook(lambda grad: grad * scale)
        sum(output.square().sum() for output in outputs).backward()
        return module.encoder.patch_embed.proj.weight.grad.clone()

    torch.testing.assert_close(gradient(0.5), 0.5 * gradient(1.0))


def test_weights_follow_from_the_seed_alone(tiny_config):
    torch.manual_seed(1)
    first = build_student(tiny_config(seed=3), REFERENCE).state_dict()
    torch.manual_seed(2)
    second = build_student(tiny_config(seed=3), REFERENCE).state_dict()
    other = build_student(tiny_config(seed=4), REFERENCE).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["predictor.mask_token"], other["predictor.mask_token"])


def test_bf16_outputs_are_float32_and_near_those_of_fp32(student, make_batch):
    batch = make_batch(CONTEXT, TARGET)
    mixed, plain = student(precision="bf16")(batch), student(precision="fp32")(batch)
    for actual, expected in zip(mixed[:2], plain[:2], strict=True):
        assert actual.dtype == torch.float32 and not torch.equal(actual, expected)
        torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.05)


EXTRA = torch.linspace(-1, 1, 3 * 2 * 8).view(3, 2, 8)


def predict(module, batch, **extra):
    tokens = module.encoder(batch.source_view, batch.context)
    return module.predictor(tokens, batch.action, batch.context, batch.target, **extra)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_extra_tokens_reach_their_own_images_and_have_no_output(student, make_batch, conditioning):
    module, batch = student(conditioning=conditioning), make_batch(CONTEXT, TARGET)
    extra = EXTRA.clone().requires_grad_()
    without, predicted = predict(module, batch), predict(module, batch, extra_tokens=extra)
    assert predicted.shape == without.shape and not torch.allclose(predicted, without, atol=1e-4)
    # Row 2 is the only prediction of the second image.
    predicted[2].square().sum().backward()
    reached = extra.grad.abs().sum(-1)
    assert (reached > 0).tolist() == [[False, False], [True, True], [False, False]]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_with_extra_tokens_packed_images_equal_one_at_a_time(student, make_batch, ragged, conditioning):
    module, batch = student(conditioning=conditioning), make_batch(CONTEXT, TARGET)
    singles = single_batches(batch, make_batch, ragged)
    alone = [predict(module, single, extra_tokens=EXTRA[i : i + 1].flip(1)) for i, single in enumerate(singles)]
    torch.testing.assert_close(predict(module, batch, extra_tokens=EXTRA), torch.cat(alone))


def test_extra_tokens_act_like_further_action_tokens(student, make_batch):
    # An action token with weight 0 is its bias, which is the same for all images.
    module, batch = student(conditioning="sequence"), make_batch(CONTEXT, TARGET)
    tokenizer = module.predictor.tokenizer
    extra = tokenizer.bias.new_tensor([0.5, -1, 2, 0, 1, 0, 0, 3])
    expected = predict(module, batch, extra_tokens=extra.expand(3, 1, 8))
    tokenizer.weight = torch.nn.Parameter(torch.cat([tokenizer.weight, torch.zeros(1, 8)]))
    tokenizer.bias = torch.nn.Parameter(torch.cat([tokenizer.bias, extra[None]]))
    longer = replace(batch, action=torch.cat([batch.action, torch.ones(3, 1)], dim=1))
    assert torch.equal(predict(module, longer), expected)


def test_extra_tokens_take_the_dtype_of_the_stream(student, make_batch):
    module, batch = student(precision="bf16"), make_batch(CONTEXT, TARGET)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = predict(module, batch, extra_tokens=EXTRA)
    torch.testing.assert_close(mixed.float(), predict(module, batch, extra_tokens=EXTRA), atol=0.05, rtol=0.05)


@pytest.mark.fused
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_extra_tokens_work_the_same_with_fused_operations(tiny_config, make_batch, conditioning):
    small = tiny_config(conditioning=conditioning)
    # Fused attention requires heads of width 32.
    networks = {"encoder": {"dim": 32, "num_heads": 1}, "predictor": {"dim": 32, "num_heads": 1, "depth": 1}}
    model = replace(
        small.model, **{name: replace(getattr(small.model, name), **sizes) for name, sizes in networks.items()}
    )
    batch, extra = on_device(make_batch(CONTEXT, TARGET)), torch.linspace(-1, 1, 3 * 2 * 32, device=DEVICE)
    outputs = {}
    for ops in (REFERENCE, FUSED):
        module = build_student(replace(small, model=model), ops).to(DEVICE)
        tokens = extra.view(3, 2, 32).clone().requires_grad_()
        # Compiled, fused attention takes half precision only.
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            predicted = predict(module, batch, extra_tokens=tokens)
        predicted.float().square().sum().backward()
        outputs[ops] = [predicted, tokens.grad, module.predictor.mask_token.grad]
    # On a GPU, rounding can also turn a hidden unit of the mixer on or off, which the mask token's gradient passes.
    tolerances = (0.05, 0.05, 0.3) if DEVICE == "cuda" else (1e-4, 1e-4, 1e-4)
    errors = map(error, outputs[FUSED], outputs[REFERENCE])
    assert all(each < tolerance for each, tolerance in zip(errors, tolerances, strict=True))


def on_device(batch):
    device = torch.device(DEVICE)
    moved = {name: getattr(batch, name).to(device) for name in ("source_view", "action", "context", "target")}
    return replace(batch, **moved)
