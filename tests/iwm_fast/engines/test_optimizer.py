import pytest
import torch

from iwm_fast.config.run import OptimConfig
from iwm_fast.engines.optimizer import build_optimizer, build_scaled_optimizer, set_hyperparameters
from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models.student import build_student


@pytest.fixture
def student(tiny_config):
    return build_student(tiny_config(conditioning="sequence"), REFERENCE)


def names_by_group(module, optimizer):
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        group["name"]: {name_of[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups
    }


def test_groups_hold_every_trainable_parameter_once(student):
    student.encoder.norm.weight.requires_grad_(False)
    groups = names_by_group(student, build_optimizer(student, OptimConfig()))
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert groups["decay"] | groups["no_decay"] == trained
    assert not groups["decay"] & groups["no_decay"]


def test_only_matrices_decay(student):
    groups = names_by_group(student, build_optimizer(student, OptimConfig()))
    undecayed = {
        "encoder.norm.weight",
        "encoder.blocks.0.attn.qkv.bias",
        "predictor.mask_token",
        "predictor.tokenizer.bias",
    }
    decayed = {"encoder.patch_embed.proj.weight", "encoder.blocks.1.mlp.fc2.weight", "predictor.tokenizer.weight"}
    assert undecayed <= groups["no_decay"] and decayed <= groups["decay"]
    assert all(name.endswith("weight") for name in groups["decay"])


def test_hyperparameters_follow_the_settings_until_they_are_set(student):
    config = OptimConfig(betas=(0.8, 0.95), weight_decay=(0.04, 0.4))
    optimizer = build_optimizer(student, config)
    decay, no_decay = optimizer.param_groups
    assert decay["betas"] == no_decay["betas"] == (0.8, 0.95)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.04, 0.0)
    set_hyperparameters(optimizer, 0.5, 0.25)
    assert (decay["lr"], no_decay["lr"]) == (0.5, 0.5)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.25, 0.0)


def test_weight_decay_shrinks_matrices_and_leaves_offsets(student):
    optimizer = build_optimizer(student, OptimConfig())
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_hyperparameters(optimizer, 0.1, 0.5)
    optimizer.step()
    after = dict(student.named_parameters())
    torch.testing.assert_close(
        after["encoder.patch_embed.proj.weight"], before["encoder.patch_embed.proj.weight"] * 0.95
    )
    assert torch.equal(after["predictor.mask_token"], before["predictor.mask_token"])


def test_groups_scale_the_learning_rate_and_decay_by_name(student):
    optimizer = build_scaled_optimizer(student, OptimConfig(), lambda name: 0.5 if name.startswith("encoder.") else 1.0)
    set_hyperparameters(optimizer, 0.1, 0.25)
    rates = {
        (group["name"], group["lr_scale"]): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups
    }
    assert rates == {
        ("decay", 0.5): (0.05, 0.25), ("decay", 1.0): (0.1, 0.25),
        ("no_decay", 0.5): (0.05, 0.0), ("no_decay", 1.0): (0.1, 0.0),
    }  # fmt: skip
    optimized = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(optimized) == sorted(id(parameter) for parameter in student.parameters())


def test_pretraining_has_two_groups_at_one_rate(student):
    groups = build_optimizer(student, OptimConfig()).param_groups
    assert [(group["name"], group["lr_scale"]) for group in groups] == [("decay", 1.0), ("no_decay", 1.0)]
