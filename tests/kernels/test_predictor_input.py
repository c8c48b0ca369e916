import pytest
import torch

from kernels.predictor_input import predictor_input_reference, sequence_rows

WIDTH = 3


def offsets_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def draw(contexts, targets, num_action_tokens):
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(sum(contexts), WIDTH, generator=generator, dtype=torch.float64)
    target = torch.randn(sum(targets), WIDTH, generator=generator, dtype=torch.float64)
    shape = (len(contexts), num_action_tokens, WIDTH)
    return context, target, torch.randn(shape, generator=generator, dtype=torch.float64)


CASES = [
    ([2, 3], [4, 1], 2),
    ([2, 0, 3], [0, 2, 1], 1),
    ([0, 1], [0, 0], 0),
    ([1], [5], 7),
    ([0], [0], 0),
]


@pytest.mark.parametrize(("contexts", "targets", "num_action_tokens"), CASES)
def test_each_image_is_its_context_then_targets_then_action_tokens(contexts, targets, num_action_tokens):
    context, target, action = draw(contexts, targets, num_action_tokens)
    got = predictor_input_reference(context, target, action, offsets_of(contexts), offsets_of(targets))
    images = zip(context.split(contexts), target.split(targets), action, strict=True)
    assert torch.equal(got, torch.cat([part for image in images for part in image]))


@pytest.mark.parametrize(("contexts", "targets", "num_action_tokens"), CASES)
def test_rows_find_what_was_packed(contexts, targets, num_action_tokens):
    context, target, action = draw(contexts, targets, num_action_tokens)
    packed = predictor_input_reference(context, target, action, offsets_of(contexts), offsets_of(targets))
    sizes = {"num_context": len(context), "num_targets": len(target)}
    rows = sequence_rows(offsets_of(contexts), offsets_of(targets), num_action_tokens, **sizes)
    assert torch.equal(packed[rows.context], context)
    assert torch.equal(packed[rows.targets], target)
    assert torch.equal(packed[rows.action_tokens], action.flatten(0, 1))
    lengths = [c + t + num_action_tokens for c, t in zip(contexts, targets, strict=True)]
    assert torch.equal(rows.offsets, offsets_of(lengths))


def test_without_action_tokens_only_context_and_targets_are_packed():
    context, target, _ = draw([2, 1], [1, 2], 0)
    got = predictor_input_reference(context, target, None, offsets_of([2, 1]), offsets_of([1, 2]))
    assert torch.equal(got, torch.cat([context[:2], target[:1], context[2:], target[1:]]))


def test_gradient_matches_finite_differences():
    inputs = [tensor.requires_grad_() for tensor in draw([2, 0], [1, 2], 2)]
    context, target = offsets_of([2, 0]), offsets_of([1, 2])
    assert torch.autograd.gradcheck(lambda *x: predictor_input_reference(*x, context, target), inputs)


def test_offsets_of_different_batches_are_refused():
    with pytest.raises(ValueError, match=r"B \+ 1 entries"):
        sequence_rows(offsets_of([1, 2]), offsets_of([1]), 0, num_context=3, num_targets=1)
