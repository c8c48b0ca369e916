import pytest
import torch
import torch.nn.functional as F

from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models.student import build_student
from iwm_fast.training.teacher import Teacher

CONTEXT, TARGET = [[0, 1, 5], [2, 3]], [[6, 9], [11]]


@pytest.fixture
def encoder(tiny_config):
    return build_student(tiny_config(), REFERENCE).encoder


def shifted(encoder, by):
    return [(name, parameter.detach() + by) for name, parameter in encoder.named_parameters()]


def test_the_update_equals_the_recurrence_in_float64(encoder):
    teacher = Teacher(encoder, None)
    expected = {name: parameter.detach().double() for name, parameter in encoder.named_parameters()}
    for step, momentum in enumerate((0.9, 0.5, 0.99), start=1):
        parameters = shifted(encoder, step)
        teacher.update(reversed(parameters), momentum)
        expected = {name: momentum * expected[name] + (1 - momentum) * value.double() for name, value in parameters}
    for name, value in expected.items():
        torch.testing.assert_close(teacher.state_dict()[name].double(), value, rtol=1e-6, atol=1e-6)


def test_momentum_one_freezes_and_zero_copies_exactly(encoder):
    teacher = Teacher(encoder, None)
    parameters = shifted(encoder, 0.3)
    teacher.update(parameters, 1.0)
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in encoder.state_dict().items())
    teacher.update(parameters, 0.0)
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in parameters)


def test_training_the_encoder_does_not_move_the_teacher(encoder):
    teacher = Teacher(encoder, None)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in before.items())


def test_teacher_gets_no_gradient(encoder, make_batch):
    teacher, batch = Teacher(encoder, None), make_batch(CONTEXT, TARGET)
    batch.target_view.requires_grad_()
    assert not teacher.encode(batch.target_view, batch.target).requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.encoder.parameters())


def test_targets_are_normalised_tokens_of_the_complete_view(encoder, make_batch):
    teacher, batch = Teacher(encoder, None), make_batch(CONTEXT, TARGET)
    actual = teacher.encode(batch.target_view, batch.target)
    tokens = encoder(batch.target_view, None).detach()[batch.target.row]
    torch.testing.assert_close(actual, F.layer_norm(tokens, (16,), eps=1e-6))
    assert torch.equal(teacher.encode(batch.target_view, None)[batch.target.row], actual)


def test_bf16_targets_are_float32(encoder, make_batch):
    batch = make_batch(CONTEXT, TARGET)
    actual = Teacher(encoder, torch.bfloat16).encode(batch.target_view, batch.target)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(
        actual, Teacher(encoder, None).encode(batch.target_view, batch.target), atol=0.1, rtol=0.1
    )


def test_state_survives_a_round_trip(encoder):
    teacher, other = Teacher(encoder, None), Teacher(encoder, None)
    teacher.update(shifted(encoder, 0.1), 0.5)
    other.load_state_dict({name: value.clone() for name, value in teacher.state_dict().items()})
    assert all(torch.equal(other.state_dict()[name], value) for name, value in teacher.state_dict().items())


def test_names_that_do_not_match_are_refused(encoder):
    teacher, parameters = Teacher(encoder, None), shifted(encoder, 0.1)
    with pytest.raises(ValueError, match=r"unknown: .*'encoder.norm.bias'"):
        teacher.update([("encoder.norm.bias", parameters[-1][1]), *parameters[:-1]], 0.9)
    with pytest.raises(ValueError, match=r"missing: .*'patch_embed.proj.weight'"):
        teacher.update(parameters[1:], 0.9)
    with pytest.raises(ValueError, match="once, got"):
        teacher.update([*parameters, parameters[0]], 0.9)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got 1.5"):
        teacher.update(parameters, 1.5)
