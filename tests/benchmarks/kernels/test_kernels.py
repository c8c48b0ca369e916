"""Every section in small: interpreted without a GPU, where the peers that need one are written down as raising."""

import inspect
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.attention.varlen import varlen_attn

from benchmarks import gpu_check
from benchmarks.harness.records import BACKWARD, FORWARD, PASSES
from benchmarks.harness.session import Case, Session, relative_error
from benchmarks.harness.timing import Effort
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
from iwm_fast.kernels.attention.flash import Tiles
from iwm_fast.kernels.attention.short import Group
from iwm_fast.kernels.launch import IS_INTERPRETING
from iwm_fast.kernels.ops import REFERENCE

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@pytest.fixture
def session():
    effort = Effort(seconds=0.0, fewest=2, most=2, warm_ups=1)
    return Session({"copy_bytes_per_s": 1e9}, effort=effort, device=DEVICE, without=["compiled"])


def passes_of(session, provider):
    return [one.pass_ for one in session.records if one.provider == provider and one.median_ms is not None]


@pytest.mark.fused
def test_attention_dense_and_packed(session):
    attention.compare(session, [5, 5], 32, num_heads=1)
    attention.compare(session, [5, 7], 32, num_heads=1)
    assert passes_of(session, "fused") == passes_of(session, "eager") == 2 * list(PASSES)
    names = {one.provider for one in session.records}
    assert {"cuDNN", "FA2", "mem-efficient", "varlen_attn", "cuDNN padded", "cuDNN padded, mask"} <= names


@pytest.mark.fused
@pytest.mark.parametrize("kind", ["feature", "sequence"])
def test_conditioning(session, kind):
    conditioning.conditioning(session, kind, 1, width=16, num_patches=4)
    assert passes_of(session, "fused") == passes_of(session, "eager") == list(PASSES)


@pytest.mark.fused
def test_norm(session):
    residual_norm.norm(session, 4, 16)
    assert passes_of(session, "fused") == passes_of(session, "eager") == list(PASSES)


@pytest.mark.fused
def test_a_new_length_every_call(session, monkeypatch):
    monkeypatch.setattr(recompilation, "NEW_LENGTHS", range(3, 9))
    monkeypatch.setattr(recompilation, "_SEEN", (4,))
    recompilation.new_lengths(session, 1, 2, num_heads=1)
    (fused,) = [one for one in session.records if one.provider == "fused"]
    assert fused.repeats == fused.figures["calls"] == 2 and fused.figures["compilations"] == 0


def predictor_step(ops, given):
    config = PredictorConfig(dim=16, depth=1, num_heads=1)
    model = predictor.build(config, ops, 4).to(DEVICE)
    return predictor.provider("plain", model, given), model


def test_the_predictors_step_is_the_same_by_dense_attention_and_in_float64():
    given = predictor.batch(2, 4, DEVICE)
    found = []
    for attend in (REFERENCE.ragged_attention, attention_baselines.attend_dense):
        plain, model = predictor_step(REFERENCE._replace(ragged_attention=attend), given)
        rounded = plain.outputs_and_gradients()
        found.append(predictor.provider("float64", model, given, exact=True).outputs_and_gradients())
        assert relative_error(rounded[0], found[-1][0]) < 3e-2
    torch.testing.assert_close(*found)


@without_gpu
def test_peers_compute_what_the_reference_does():
    # the backends need a GPU; what surrounds them is the same for PyTorch's own arithmetic
    qkv, d_out = draw(3 * 7, 3, 2, 32), draw(3 * 7, 2, 32, seed=1)
    wanted, by_math = REFERENCE.ragged_attention(qkv, None, 7), partial(attention_baselines.by, SDPBackend.MATH)
    torch.testing.assert_close(by_math(attention_baselines.attend_dense)(qkv, None, 7), wanted)
    lengths = [7, 3, 5]
    packed, offsets = qkv[: sum(lengths)].clone().requires_grad_(), offsets_of(lengths)
    providers = attention_baselines.packed_providers(packed, offsets, 7, d_out[: sum(lengths)])
    masked = providers[-1]
    is_key = torch.arange(7) < torch.tensor(lengths)[:, None]
    masked = masked._replace(
        function=by_math(lambda padded: attention_baselines.attend_padded(padded, is_key[:, None, None]))
    )
    eager = next(one for one in providers if one.name == "eager")
    (out, d_padded), (wanted, d_packed) = masked.outputs_and_gradients(), eager.outputs_and_gradients()
    torch.testing.assert_close(out.view(3, 7, 2, 32)[is_key], wanted)
    torch.testing.assert_close(d_padded[is_key], d_packed)


def test_varlen_attn_takes_what_is_passed():
    bound = inspect.signature(varlen_attn).bind("q", "k", "v", "offsets", "offsets", 7, 7)
    assert list(bound.arguments)[3:] == ["cu_seq_q", "cu_seq_k", "max_q", "max_k"]


@pytest.mark.fused
@pytest.mark.parametrize("pass_", [FORWARD, BACKWARD])
def test_a_sweep_times_other_settings_and_drops_wrong_ones(session, pass_):
    buffers = tile_sweep.prepared(1, 20, (1, 32), DEVICE)
    launches = {"128": tile_sweep.whole_launch(Group(((128,),), 32, 4, 1), pass_, buffers)}
    # a launch for longer sequences writes nothing here
    elsewhere = launches["128"]._replace(constants=launches["128"].constants | {"LIMITS": (64, 128)})
    usual = tile_sweep.shipped(pass_, buffers)
    case = Case("attention sweep", {"N": 20})
    tile_sweep.time_launches(session, case, pass_, launches | {"elsewhere": elsewhere}, usual, buffers=buffers)
    failures = {one.provider: one.failure for one in session.records}
    assert failures["128"] is None and failures[tile_sweep.SHIPPED] is None
    assert "differs" in failures["elsewhere"]
    assert tile_sweep.table(session.records).count("\n") == 2


def test_sweep_candidates_hold_the_length():
    for length in (*tile_sweep.WHOLE_LENGTHS, 197):
        for group in tile_sweep.groups(length):
            (split,) = group.key_splits
            # all pieces but the last are full
            assert sum(split[:-1]) < length <= sum(split)
    assert len({tile_sweep.name_tiles(tiles) for tiles in tile_sweep.TILES}) == len(tile_sweep.TILES)
    assert tile_sweep.name_tiles(Tiles(64, 32, 4, 2)) == "64x32 w4 s2"


@without_gpu
def test_the_interpreter_is_refused_with_the_remedy(session, capsys):
    assert IS_INTERPRETING
    with pytest.raises(RuntimeError, match="unset"):
        compiler_report.measure(session, [90])
    assert benchmark.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@without_gpu
def test_without_a_gpu_the_check_and_the_sweep_say_so(capsys):
    assert gpu_check.main([]) == 2
    assert benchmark.main(["--sweep"]) == 2
    assert capsys.readouterr().err.count("there is no GPU here") == 2


def test_a_command_that_takes_too_long_is_stopped(capsys):
    assert gpu_check.run(["sleep", "30"], 0.1) == 124
    options = gpu_check.parse(["--limit-s", "500", "--", "--quick", "--only", "norm"])
    assert options.bench == ["--quick", "--only", "norm"] and options.limit_s == 500
    assert gpu_check.bench("pipelines", 1.0, []) == 1
    assert "no time is left for pipelines" in capsys.readouterr().err


def test_both_benchmarks_are_told_what_is_measured():
    assert gpu_check.commit_of(["--quick", "--commit", "abc", "--only", "norm"]) == ["--commit", "abc"]
    assert gpu_check.commit_of(["--quick"]) == []
