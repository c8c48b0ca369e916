import pytest
import torch

from iwm_fast.kernels.predictor_input.layout import PatchIndex, packed_layout
from iwm_fast.kernels.predictor_input.op import FeatureMixer, predictor_input_reference

WIDTH, NUM_PATCHES, NUM_ACTIONS = 3, 9, 2


def offsets_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def patches_and_layout(contexts, targets, num_action_tokens):
    def patches(lengths):
        return torch.tensor([b * NUM_PATCHES + p for b, n in enumerate(lengths) for p in range(n)], dtype=torch.int64)

    sizes = {"num_context": sum(contexts), "num_targets": sum(targets)}
    layout = packed_layout(offsets_of(contexts), offsets_of(targets), num_action_tokens, **sizes)
    return PatchIndex(patches(contexts), patches(targets)), layout


def mixer_of(num_images):
    sizes = [(num_images, NUM_ACTIONS), (WIDTH, WIDTH + NUM_ACTIONS), (WIDTH,), *2 * [(WIDTH, WIDTH), (WIDTH,)]]
    return FeatureMixer(*(draw(*size, seed=10 + i) for i, size in enumerate(sizes)))


LENGTHS = [
    ([2, 3], [4, 1], 2),
    ([2, 0, 3], [0, 2, 1], 1),
    ([0, 1], [0, 0], 0),
    ([1], [5], 7),
    ([0], [0], 0),
]


@pytest.mark.parametrize(("contexts", "targets", "num_action_tokens"), LENGTHS)
def test_each_image_is_its_context_then_targets_then_action_tokens(contexts, targets, num_action_tokens):
    context, mask_token, positions = draw(sum(contexts), WIDTH), draw(WIDTH, seed=1), draw(NUM_PATCHES, WIDTH, seed=2)
    tokens = draw(len(contexts), num_action_tokens, WIDTH, seed=3)
    patches, layout = patches_and_layout(contexts, targets, num_action_tokens)
    actual = predictor_input_reference(context, mask_token, positions, patches, layout, action_tokens=tokens)
    expected = []
    for visible, num_targets, action in zip(context.split(contexts), targets, tokens, strict=True):
        expected += [visible + positions[: len(visible)], mask_token + positions[:num_targets], action]
    assert torch.equal(actual, torch.cat(expected))


@pytest.mark.parametrize(("contexts", "targets", "num_action_tokens"), LENGTHS)
def test_the_layout_names_the_packed_row_of_each_token(contexts, targets, num_action_tokens):
    context, mask_token, positions = draw(sum(contexts), WIDTH), draw(WIDTH, seed=1), draw(NUM_PATCHES, WIDTH, seed=2)
    tokens = draw(len(contexts), num_action_tokens, WIDTH, seed=3)
    patches, layout = patches_and_layout(contexts, targets, num_action_tokens)
    packed = predictor_input_reference(context, mask_token, positions, patches, layout, action_tokens=tokens)
    assert torch.equal(packed[layout.context], context + positions[patches.context % NUM_PATCHES])
    assert torch.equal(packed[layout.targets], mask_token + positions[patches.targets % NUM_PATCHES])
    assert torch.equal(packed[layout.action_tokens], tokens.flatten(0, 1))
    lengths = [c + t + num_action_tokens for c, t in zip(contexts, targets, strict=True)]
    assert torch.equal(layout.offsets, offsets_of(lengths))


def test_the_mixer_combines_mask_token_position_and_action():
    contexts, targets = [1, 0, 2], [2, 3, 0]
    mask_token, positions, mixer = draw(WIDTH, seed=1), draw(NUM_PATCHES, WIDTH, seed=2), mixer_of(3)
    patches, layout = patches_and_layout(contexts, targets, 0)
    packed = predictor_input_reference(draw(3, WIDTH), mask_token, positions, patches, layout, mixer=mixer)
    for packed_row, patch_row in zip(layout.targets, patches.targets, strict=True):
        image, patch = divmod(int(patch_row), NUM_PATCHES)
        hidden = torch.cat([mask_token + positions[patch], mixer.action[image]])
        hidden = (mixer.w1 @ hidden + mixer.b1).relu()
        hidden = mixer.w3 @ (mixer.w2 @ hidden + mixer.b2).relu() + mixer.b3
        torch.testing.assert_close(packed[packed_row], hidden)


@pytest.mark.parametrize("conditioning", ["feature", "sequence"])
def test_gradient_matches_finite_differences(conditioning):
    patches, layout = patches_and_layout([2, 0], [1, 2], 2 if conditioning == "sequence" else 0)
    conditions = [draw(2, 2, WIDTH)] if conditioning == "sequence" else mixer_of(2)
    inputs = [tensor.requires_grad_() for tensor in (draw(2, WIDTH), draw(WIDTH, seed=1), *conditions)]

    def assemble(context, mask_token, *conditions):
        named = {"action_tokens": conditions[0]} if conditioning == "sequence" else {"mixer": FeatureMixer(*conditions)}
        return predictor_input_reference(context, mask_token, draw(9, WIDTH, seed=2), patches, layout, **named)

    assert torch.autograd.gradcheck(assemble, inputs)


def test_positions_get_no_gradient():
    patches, layout = patches_and_layout([2], [2], 0)
    positions = draw(NUM_PATCHES, WIDTH).requires_grad_()
    assert not predictor_input_reference(draw(2, WIDTH), draw(WIDTH), positions, patches, layout).requires_grad


def test_offsets_of_different_numbers_of_images_are_refused():
    with pytest.raises(ValueError, match=r"B \+ 1 entries"):
        packed_layout(offsets_of([1, 2]), offsets_of([1]), 0, num_context=3, num_targets=1)


def test_wrong_shapes_are_refused_with_the_name_of_the_input():
    patches, layout = patches_and_layout([2], [2], 0)
    inputs = draw(2, WIDTH), draw(WIDTH), draw(NUM_PATCHES, WIDTH), patches, layout
    tokens, mixer = draw(1, 0, WIDTH), mixer_of(1)
    with pytest.raises(ValueError, match="exclude each other"):
        predictor_input_reference(*inputs, action_tokens=tokens, mixer=mixer)
    with pytest.raises(ValueError, match=r"layout.action_tokens must have shape \(2,\), got \(0,\)"):
        predictor_input_reference(*inputs, action_tokens=draw(1, 2, WIDTH))
    with pytest.raises(ValueError, match=r"mixer.w1 must have shape \(3, 5\), got \(5, 3\)"):
        predictor_input_reference(*inputs, mixer=mixer._replace(w1=mixer.w1.t()))
    with pytest.raises(ValueError, match=r"mixer.action must have shape \(1, 2\), got \(2, 2\)"):
        predictor_input_reference(*inputs, mixer=mixer_of(2))
    with pytest.raises(ValueError, match=r"patches.context must have shape \(1,\), got \(2,\)"):
        predictor_input_reference(draw(1, WIDTH), *inputs[1:])
