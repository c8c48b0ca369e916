"""Engines in a single process; test_engine_ranks.py tests them on several ranks."""

import importlib
import math
import types
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from iwm_fast.config.run import OptimConfig, RunConfig, RuntimeConfig
from iwm_fast.engines.deepspeed_engine import deepspeed_config, import_deepspeed
from iwm_fast.engines.factory import build_engine
from iwm_fast.runtime import distributed

ENGINES = (("plain", None), *(("deepspeed", stage) for stage in range(4)))
NUM_MICRO_BATCHES = 2


class Output(NamedTuple):
    """An output that depends on another one, as in `Prediction`."""

    hidden: Tensor
    tokens: Tensor


class ToyModel(nn.Module):
    """A model of odd sizes, so that flat vectors need padding, with one unused and one frozen parameter."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.last = nn.Linear(7, 3)
        self.unused = nn.Parameter(torch.ones(3, 3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        for parameter in self.parameters():
            if parameter.requires_grad and parameter is not self.unused:
                parameter.data.normal_(generator=generator)

    def forward(self, batch):
        hidden = self.norm(self.first(batch))
        return Output(hidden, self.last(hidden))


@pytest.fixture
def rank_info(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    yield distributed.start("cpu")
    distributed.stop()


def make_config(engine, stage, clip_norm=0.1, **deepspeed):
    optim = OptimConfig(global_batch_size=8, clip_norm=clip_norm)
    runtime = RuntimeConfig(engine=engine, zero_stage=stage, micro_batch_size=4, deepspeed=deepspeed)
    return RunConfig(optim=optim, runtime=runtime)


def make_optimizer(module):
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "name": "decay"},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "name": "no_decay"},
    ]
    return torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0)


def make_engine(rank_info, kind, stage, **settings):
    module = ToyModel()
    if kind == "deepspeed":
        # Smaller than the largest weight, so that the reduction takes every path, and quick to fill with NaN.
        settings["zero_optimization"] = {"reduce_bucket_size": 30}
    return build_engine(make_config(kind, stage, **settings), module, make_optimizer(module), rank_info)


def train(engine, steps, corrupt=lambda step, batch: batch, add=0.0):
    outcomes = []
    for step in steps:
        engine.set_hyperparameters(lr=0.01 * (step + 1), weight_decay=0.1 * (step + 1))
        for micro_batch in range(NUM_MICRO_BATCHES):
            batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + micro_batch))
            engine.backward((engine.forward(corrupt(step, batch)).tokens ** 2).sum() / 8 + add)
        outcomes.append(engine.step())
    return outcomes


@pytest.mark.parametrize(("kind", "stage"), ENGINES)
def test_an_engine_makes_the_steps_that_torch_makes_on_the_full_batch(rank_info, kind, stage):
    module = ToyModel()
    optimizer = make_optimizer(module)
    norms = []
    for step in range(3):
        seeds = (10 * step, 10 * step + 1)
        batches = [torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1)
            group["weight_decay"] = 0.1 * (step + 1) if group["name"] == "decay" else 0.0
        optimizer.zero_grad()
        ((module(torch.cat(batches)).tokens ** 2).sum() / 8).backward()
        module.unused.grad = torch.zeros_like(module.unused)
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), 0.1)))
        optimizer.step()

    engine = make_engine(rank_info, kind, stage)
    outcomes = train(engine, range(3))
    assert min(norms) > 0.2, "clipping must be active"
    assert [float(outcome.grad_norm) for outcome in outcomes] == pytest.approx(norms, rel=1e-5)
    assert all(outcome.applied for outcome in outcomes)
    state = engine.state()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(state[f"weight/{name}"], parameter.detach(), atol=1e-6, rtol=1e-6)
        if parameter.requires_grad:
            for moment in ("exp_avg", "exp_avg_sq"):
                expected = optimizer.state[parameter][moment]
                torch.testing.assert_close(state[f"{moment}/{name}"], expected, atol=1e-7, rtol=1e-5)
    assert int(state["adam_step"]) == 3


@pytest.mark.parametrize(("kind", "stage"), ENGINES)
def test_training_continues_bit_equal_from_a_loaded_state(rank_info, kind, stage):
    straight = make_engine(rank_info, kind, stage)
    train(straight, range(2))
    saved = straight.state()
    train(straight, range(2, 5))

    resumed = make_engine(rank_info, kind, stage)
    train(resumed, range(7, 8))
    resumed.load_state(saved)
    assert_same_state(resumed.state(), saved)
    train(resumed, range(2, 5))
    assert_same_state(resumed.state(), straight.state())


@pytest.mark.parametrize(("kind", "stage"), ENGINES)
def test_a_state_exists_before_the_first_step_and_starts_the_same_run(rank_info, kind, stage):
    straight = make_engine(rank_info, kind, stage)
    saved = straight.state()
    assert int(saved["adam_step"]) == 0
    train(straight, range(2))
    resumed = make_engine(rank_info, kind, stage)
    resumed.load_state(saved)
    train(resumed, range(2))
    assert_same_state(resumed.state(), straight.state())


@pytest.mark.parametrize(("kind", "stage"), ENGINES)
def test_a_state_is_a_copy_that_training_does_not_change(rank_info, kind, stage):
    engine = make_engine(rank_info, kind, stage)
    train(engine, range(1))
    saved = engine.state()
    before = {name: tensor.clone() for name, tensor in saved.items()}
    train(engine, range(1, 2))
    assert_same_state(saved, before)


@pytest.mark.parametrize(("kind", "stage"), ENGINES)
@pytest.mark.parametrize("constant", [math.nan, math.inf])
def test_a_nonfinite_loss_changes_nothing_and_training_continues(rank_info, kind, stage, constant):
    engine = make_engine(rank_info, kind, stage)
    train(engine, range(2))
    before = engine.state()
    # Only the added constant is not finite; the gradients alone would be.
    (outcome,) = train(engine, range(2, 3), add=constant)
    assert not outcome.applied
    assert outcome.grad_norm == math.inf
    assert_same_state(engine.state(), before)
    assert train(engine, range(2, 3))[0].applied

    straight = make_engine(rank_info, kind, stage)
    train(straight, range(3))
    assert_same_state(engine.state(), straight.state())


@pytest.mark.parametrize(("kind", "stage"), ENGINES)
def test_bad_pixels_change_nothing(rank_info, kind, stage):
    engine = make_engine(rank_info, kind, stage)
    train(engine, range(1))
    before = engine.state()
    assert not train(engine, range(1, 2), corrupt=lambda step, batch: batch * math.nan)[0].applied
    assert_same_state(engine.state(), before)


@pytest.mark.parametrize(("kind", "stage"), ENGINES)
def test_a_gradient_that_is_not_finite_under_a_finite_loss_changes_nothing(rank_info, kind, stage):
    engine = make_engine(rank_info, kind, stage, clip_norm=None)
    train(engine, range(1))
    before = engine.state()
    for factor in (1.0, math.inf):
        tokens = engine.forward(torch.ones(4, 5)).tokens
        tokens.register_hook(lambda gradient, factor=factor: gradient * factor)
        engine.backward(tokens.sum())
    assert not engine.step().applied
    assert_same_state(engine.state(), before)


@pytest.mark.parametrize(("kind", "stage"), ENGINES)
@pytest.mark.parametrize("clip_norm", [0.1, None])
# The norm is about 80 times the scale, and the largest float32 is 1.8e19 squared.
@pytest.mark.parametrize("scale", [1e16, 1e18])
def test_a_gradient_norm_whose_square_is_beyond_float32_changes_nothing(rank_info, kind, stage, clip_norm, scale):
    engine = make_engine(rank_info, kind, stage, clip_norm=clip_norm)
    train(engine, range(1))
    before = engine.state()
    for seed in range(NUM_MICRO_BATCHES):
        batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        # All gradients are finite.
        engine.backward(engine.forward(batch).tokens.sum() * scale)
    outcome, is_applied = engine.step(), scale < 1e17
    assert outcome.applied == is_applied and math.isfinite(outcome.grad_norm) == is_applied
    assert all(value.isfinite().all() for value in engine.state().values())
    if not is_applied:
        assert_same_state(engine.state(), before)


@pytest.mark.parametrize(("kind", "stage"), ENGINES)
def test_weight_decay_reaches_only_the_group_that_decays(rank_info, kind, stage):
    engine = make_engine(rank_info, kind, stage)
    engine.set_hyperparameters(lr=0.5, weight_decay=0.25)
    before = engine.state()
    for _ in range(NUM_MICRO_BATCHES):
        # All gradients are zero, so that only the decay remains.
        engine.backward((engine.forward(torch.zeros(4, 5)).tokens * 0).sum())
    assert engine.step().applied
    after = engine.state()
    shrunk = 1 - 0.5 * 0.25
    for name, parameter in ToyModel().named_parameters():
        factor = shrunk if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(after[f"weight/{name}"], before[f"weight/{name}"] * factor)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sharded_engines_leave_the_gradient_norm_on_the_device(rank_info, stage):
    (outcome,) = train(make_engine(rank_info, "deepspeed", stage), range(1))
    assert isinstance(outcome.grad_norm, Tensor) and outcome.grad_norm.ndim == 0


@pytest.mark.parametrize(("kind", "stage"), ENGINES)
def test_clipping_can_be_disabled(rank_info, kind, stage):
    clipped, unclipped = make_engine(rank_info, kind, stage), make_engine(rank_info, kind, stage, clip_norm=None)
    train(clipped, range(1))
    train(unclipped, range(1))
    ratio = unclipped.state()["exp_avg/first.weight"].norm() / clipped.state()["exp_avg/first.weight"].norm()
    assert ratio > 2


@pytest.mark.parametrize(("kind", "stage"), ENGINES)
def test_parameters_have_the_modules_own_names(rank_info, kind, stage):
    engine = make_engine(rank_info, kind, stage)
    assert dict(engine.named_parameters()).keys() == dict(ToyModel().named_parameters()).keys()


@pytest.mark.parametrize(("kind", "stage"), ENGINES)
def test_a_step_after_too_few_micro_batches_is_refused(rank_info, kind, stage):
    engine = make_engine(rank_info, kind, stage)
    engine.backward(engine.forward(torch.ones(4, 5)).tokens.sum())
    with pytest.raises(RuntimeError, match="after 1 micro-batches, but must be called after 2"):
        engine.step()


@pytest.mark.parametrize(("kind", "stage"), ENGINES)
def test_a_state_of_another_model_is_refused_with_both_shapes(rank_info, kind, stage):
    engine = make_engine(rank_info, kind, stage)
    state = engine.state()
    with pytest.raises(ValueError, match=r"weight/last\.weight has shape \(4, 7\) in the saved state, \(3, 7\)"):
        engine.load_state(state | {"weight/last.weight": torch.zeros(4, 7)})
    with pytest.raises(ValueError, match=r"no exp_avg/norm\.bias"):
        engine.load_state({name: tensor for name, tensor in state.items() if name != "exp_avg/norm.bias"})
    with pytest.raises(ValueError, match="has weight/more, which"):
        engine.load_state(state | {"weight/more": torch.zeros(1)})


@pytest.mark.parametrize("source", range(len(ENGINES)))
@pytest.mark.parametrize("target", range(len(ENGINES)))
def test_a_state_moves_between_engines(rank_info, source, target):
    straight = make_engine(rank_info, *ENGINES[source])
    train(straight, range(2))
    moved = make_engine(rank_info, *ENGINES[target])
    moved.load_state(straight.state())
    train(straight, range(2, 4))
    train(moved, range(2, 4))
    expected = straight.state()
    for name, tensor in moved.state().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)


def test_a_parameter_missing_from_the_optimizer_is_refused(rank_info):
    module = ToyModel()
    optimizer = torch.optim.AdamW([{"params": [module.first.weight], "name": "decay"}])
    with pytest.raises(ValueError, match="parameter unused must be in the optimizer"):
        build_engine(make_config("plain", None), module, optimizer, rank_info)


def test_deepspeed_on_a_gpu_does_not_read_the_names_of_visible_devices(monkeypatch):
    # DeepSpeed stays that of the CPU in this process, because it has been imported already.
    import_deepspeed(torch.device("cpu"))
    cuda_accelerator = importlib.import_module("deepspeed.accelerator.cuda_accelerator")
    monkeypatch.setattr(cuda_accelerator, "pynvml", types.SimpleNamespace())
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    import_deepspeed(torch.device("cuda"))
    assert cuda_accelerator.pynvml is None


def test_deepspeed_settings_follow_from_the_runs_configuration():
    config = make_config("deepspeed", 2, clip_norm=0.3)
    settings = deepspeed_config(config, world_size=2)
    assert settings["train_batch_size"] == 8
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 1
    assert settings["gradient_clipping"] == 0.3
    assert settings["zero_optimization"]["stage"] == 2
    assert "optimizer" not in settings


def test_deepspeed_settings_that_affect_speed_can_be_overridden():
    config = make_config(
        "deepspeed", 1, zero_optimization={"overlap_comm": True, "reduce_bucket_size": 7}, dump_state=True
    )
    settings = deepspeed_config(config, world_size=1)
    assert settings["dump_state"] is True
    assert settings["zero_optimization"]["overlap_comm"] is True
    assert settings["zero_optimization"]["reduce_bucket_size"] == 7
    assert settings["zero_optimization"]["stage"] == 1


def test_repeating_a_setting_of_the_run_is_no_conflict():
    config = make_config("deepspeed", 1, train_batch_size=8, zero_optimization={"stage": 1})
    assert deepspeed_config(config, world_size=1)["train_batch_size"] == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train_batch_size": 16}, r"train_batch_size must be unset or 8, got 16"),
        ({"gradient_clipping": 2.0}, r"gradient_clipping must be unset or 0\.1, got 2\.0"),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage must be unset or 1, got 3"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, r"offload_optimizer"),
        ({"zero_optimization": False}, r"zero_optimization must be unset or .*, got False"),
        ({"bf16": {"enabled": True}}, r"bf16\.enabled must be unset or False, got True"),
        ({"optimizer": {"type": "AdamW"}}, r"runtime\.deepspeed\.optimizer must be unset"),
    ],
)
def test_a_conflicting_deepspeed_setting_is_refused_with_both_values(overrides, message):
    with pytest.raises(ValueError, match=message):
        deepspeed_config(make_config("deepspeed", 1, **overrides), world_size=1)


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    assert not [name for name in actual if not torch.equal(actual[name], expected[name])]
