"""All sections with tiny shapes. Without a GPU kernels are interpreted, and baselines that need one are failures."""

import inspect
from functools import partial

import pytest
import torch
from iwm_fast.kernels.attention.flash import TileConfig
from iwm_fast.kernels.attention.short import ShortConfig
from torch.nn.attention import SDPBackend
from torch.nn.attention.varlen import varlen_attn

from benchmarks import gpu_check
from benchmarks.harness.records import BACKWARD, FORWARD, PASSES
from benchmarks.harness.session import Case, Session, relative_error
from benchmarks.harness.timing import TimingBudget
from benchmarks.kernels import (
    __main__ as benchmark,
)
from benchmarks.kernels import (
    attention,
    attention_baselines,
    compiler_report,
    conditioning,
    predictor,
    recompilation,
    residual_norm,
    tile_sweep,
)
from fixtures.kernel_cases import DEVICE, draw, offsets_of
from iwm_fast.config.run import PredictorConfig
from iwm_fast.kernels.launch import IS_INTERPRETING
from iwm_fast.kernels.ops import REFERENCE

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests the behaviour without a GPU")


@pytest.fixture
def session():
    budget = TimingBudget(seconds=0.0, min_repeats=2, max_repeats=2, warm_ups=1)
    return Session({"copy_bytes_per_s": 1e9}, budget=budget, device=DEVICE, excluded=["compiled"])


def passes_of(session, provider):
    timed = [record for record in session.records if record.median_ms is not None]
    return [record.pass_ for record in timed if record.provider == provider]


@pytest.mark.fused
def test_dense_and_packed_attention_are_timed(session):
    attention.compare(session, [5, 5], 32, num_heads=1)
    attention.compare(session, [5, 7], 32, num_heads=1)
    assert passes_of(session, "fused") == passes_of(session, "eager") == 2 * list(PASSES)
    names = {record.provider for record in session.records}
    assert {"cuDNN", "FA2", "mem-efficient", "varlen_attn", "cuDNN padded", "cuDNN padded, mask"} <= names


@pytest.mark.fused
@pytest.mark.parametrize("kind", ["feature", "sequence"])
def test_conditioning_is_timed(session, kind):
    conditioning.measure_conditioning(session, kind, 1, width=16, num_patches=4)
    assert passes_of(session, "fused") == passes_of(session, "eager") == list(PASSES)


@pytest.mark.fused
def test_the_residual_norm_is_timed(session):
    residual_norm.measure_norm(session, 4, 16)
    assert passes_of(session, "fused") == passes_of(session, "eager") == list(PASSES)


@pytest.mark.fused
def test_calls_with_new_lengths_compile_nothing(session, monkeypatch):
    monkeypatch.setattr(recompilation, "NEW_LENGTHS", range(3, 9))
    monkeypatch.setattr(recompilation, "_WARM_UP_LENGTHS", (4,))
    recompilation.measure_new_lengths(session, 1, 2, num_heads=1)
    (fused,) = [record for record in session.records if record.provider == "fused"]
    assert fused.repeats == fused.figures["calls"] == 2 and fused.figures["compilations"] == 0


def test_a_predictor_step_agrees_with_dense_attention_and_float64():
    inputs, config = predictor.make_batch(2, 4, DEVICE), PredictorConfig(dim=16, depth=1, num_heads=1)
    exact = []
    for attend in (REFERENCE.ragged_attention, attention_baselines.attend_dense):
        model = predictor.build(config, REFERENCE._replace(ragged_attention=attend), 4).to(DEVICE)
        plain = predictor.step_provider("plain", model, inputs).outputs_and_gradients()
        exact.append(predictor.step_provider("float64", model, inputs, exact=True).outputs_and_gradients())
        assert relative_error(plain[0], exact[-1][0]) < 3e-2
    torch.testing.assert_close(*exact)


@without_gpu
def test_baselines_compute_the_same_attention_as_the_reference():
    # The other backends need a GPU. PyTorch's math backend runs the same code around the attention itself.
    qkv, d_out = draw(3 * 7, 3, 2, 32), draw(3 * 7, 2, 32, seed=1)
    by_math = partial(attention_baselines.with_backend, SDPBackend.MATH)
    expected = REFERENCE.ragged_attention(qkv, None, 7)
    torch.testing.assert_close(by_math(attention_baselines.attend_dense)(qkv, None, 7), expected)
    lengths = [7, 3, 5]
    packed, offsets = qkv[: sum(lengths)].clone().requires_grad_(), offsets_of(lengths)
    providers = attention_baselines.packed_providers(packed, offsets, 7, d_out[: sum(lengths)])
    masked = providers[-1]
    is_key = torch.arange(7) < torch.tensor(lengths)[:, None]
    masked = masked._replace(
        function=by_math(lambda padded: attention_baselines.attend_padded(padded, is_key[:, None, None]))
    )
    eager = next(provider for provider in providers if provider.name == "eager")
    (out, d_padded), (expected, d_packed) = masked.outputs_and_gradients(), eager.outputs_and_gradients()
    torch.testing.assert_close(out.view(3, 7, 2, 32)[is_key], expected)
    torch.testing.assert_close(d_padded[is_key], d_packed)


def test_varlen_attn_accepts_the_arguments_that_are_passed():
    bound = inspect.signature(varlen_attn).bind("q", "k", "v", "offsets", "offsets", 7, 7)
    assert list(bound.arguments)[3:] == ["cu_seq_q", "cu_seq_k", "max_q", "max_k"]


@pytest.mark.fused
@pytest.mark.parametrize("pass_", [FORWARD, BACKWARD])
def test_a_sweep_times_candidates_and_drops_wrong_ones(session, pass_):
    buffers = tile_sweep.prepare_buffers(1, 20, (1, 32), DEVICE)
    launches = {"128": tile_sweep.short_launch(ShortConfig(((128,),), 32, 4, 1), pass_, buffers)}
    # A launch for longer sequences does not write any output here.
    wrong = launches["128"]._replace(constants=launches["128"].constants | {"LIMITS": (64, 128)})
    shipped = tile_sweep.shipped_launches(pass_, buffers)
    case = Case("attention sweep", {"N": 20})
    tile_sweep.time_launches(session, case, pass_, launches | {"wrong": wrong}, shipped, buffers=buffers)
    failures = {record.provider: record.failure for record in session.records}
    assert failures["128"] is None and failures[tile_sweep.SHIPPED] is None
    assert "differs" in failures["wrong"]
    assert tile_sweep.table(session.records).count("\n") == 2


def test_candidate_configs_cover_the_length():
    for length in (*tile_sweep.SHORT_LENGTHS, 197):
        for config in tile_sweep.candidate_configs(length):
            (split,) = config.key_splits
            # All tiles except the last one are full.
            assert sum(split[:-1]) < length <= sum(split)
    assert len({tile_sweep.name_tiles(tiles) for tiles in tile_sweep.TILES}) == len(tile_sweep.TILES)
    assert tile_sweep.name_tiles(TileConfig(64, 32, 4, 2)) == "64x32 w4 s2"


@without_gpu
def test_offline_figures_are_refused_under_the_interpreter(session, capsys):
    assert IS_INTERPRETING
    with pytest.raises(RuntimeError, match="unset"):
        compiler_report.measure(session, [90])
    assert benchmark.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@without_gpu
def test_the_gpu_check_and_the_sweep_fail_without_a_gpu(capsys):
    assert gpu_check.main([]) == 2
    assert benchmark.main(["--sweep"]) == 2
    assert capsys.readouterr().err.count("there is none on this machine") == 2


def test_a_command_over_its_time_limit_is_stopped(capsys):
    assert gpu_check.run(["sleep", "30"], 0.1) == 124
    options = gpu_check.parse(["--limit-s", "500", "--", "--quick", "--only", "norm"])
    assert options.bench == ["--quick", "--only", "norm"] and options.limit_s == 500
    assert gpu_check.run_benchmark("pipelines", 1.0, []) == 1
    assert "no time is left for pipelines" in capsys.readouterr().err


def test_the_commit_option_is_passed_on():
    assert gpu_check.commit_option(["--quick", "--commit", "abc", "--only", "norm"]) == ["--commit", "abc"]
    assert gpu_check.commit_option(["--quick"]) == []
