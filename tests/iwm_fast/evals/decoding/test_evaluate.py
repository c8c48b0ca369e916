"""`iwm decode`: the decoder learns to show tokens, is measured beside its controls, resumes, and goes into exports."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fixtures.painted_shards import pretrain_on_painted_shards
from iwm_fast import world_model
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.checkpoints.export import export
from iwm_fast.checkpoints.pixel_decoder import load_pixel_decoder
from iwm_fast.cli import main
from iwm_fast.config.commands import ExportConfig
from iwm_fast.config.finetuning import DecodeConfig, DecoderTuneConfig, PixelDecoderConfig
from iwm_fast.config.run import RuntimeConfig
from iwm_fast.evals.decoding.evaluate import VIEWS, evaluate_decode, render_views
from iwm_fast.evals.decoding.training import DECODER, build_arm, target_tokens
from iwm_fast.evals.finetuning.run import map_validation_images, open_context, train_job
from iwm_fast.evals.results import read_result
from iwm_fast.evaluate import evaluate
from iwm_fast.pipelines.transforms.normalization import to_unit_range
from iwm_fast.runtime import distributed
from iwm_fast.runtime.preemption import PreemptedError, Preemption
from iwm_fast.runtime.run_status import read_status
from iwm_fast.training.loaders import open_training_shards, training_loader

ARMS = ("decoder", "linear", "untrained_encoder")


def settings(run, *, steps=50, **changes):
    return DecodeConfig(**{
        "run": str(run), "decoder": PixelDecoderConfig(dim=32, depth=1, num_heads=2),
        "tune": DecoderTuneConfig(steps=steps, global_batch_size=8, lr=5e-3, precision="fp32"),
        "runtime": RuntimeConfig(device="cpu", engine="plain", loader="torch"), **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """Pretrain briefly and train the decoders."""
    folder = Path(pretrain_on_painted_shards(tmp_path_factory.mktemp("decode")))
    evaluate_decode(settings(folder))
    return folder


@pytest.fixture
def rank_info():
    yield distributed.start("cpu")
    distributed.stop()


def test_the_decoder_is_measured_beside_its_controls(run_folder):
    result = read_result(run_folder / "evaluations" / "decode.json")
    assert [(row.subject, row.metric) for row in result.rows] == [
        (f"{arm}, {view}", metric) for metric in ("psnr_db", "ssim") for view in VIEWS for arm in ARMS
    ]
    assert all(row.low <= row.value <= row.high and row.num_samples == 18 for row in result.rows)
    for view in VIEWS:
        decoder, linear, untrained = (result.row(f"{arm}, {view}", "psnr_db") for arm in ARMS)
        assert decoder.value > linear.value + 1 and decoder.num_tuned > linear.num_tuned
        assert decoder.control == untrained.value and decoder.control_name == "untrained encoder"
    # Two areas of one colour each are easy.
    assert result.value("decoder, clean", "psnr_db") > 18 and result.value("decoder, clean", "ssim") > 0.4
    with Image.open(run_folder / "evaluations" / "decode.png") as sheet:
        # Two views of 8 images, and what three decoders make of them.
        assert abs(sheet.height - sheet.width) < 0.15 * sheet.width


def test_the_saved_decoder_decodes_as_it_was_measured(run_folder, rank_info):
    model, decoder = world_model.load(run_folder), load_pixel_decoder(run_folder)
    assert decoder.spec.step == model.step and not decoder.training
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    context = open_context("decode", settings(run_folder), model, rank_info, None)
    views = map_validation_images(lambda batch: render_views(batch, context), context)
    normalization = model.config.data.normalization
    for number, view in enumerate(VIEWS):
        images = to_unit_range(views[:, number], normalization)
        decoded = decoder.decode(model.encode_targets(views[:, number]))
        mean_square = (decoded - images).square().mean((1, 2, 3))
        expected = read_result(run_folder / "evaluations" / "decode.json").value(f"decoder, {view}", "psnr_db")
        assert float((-10 * mean_square.log10()).mean()) == pytest.approx(expected, abs=1e-3)
    # Every image is changed, and in the same way each time.
    assert (views[:, 0] - views[:, 1]).abs().amax((1, 2, 3)).min() > 0.05
    assert torch.equal(views, map_validation_images(lambda batch: render_views(batch, context), context))


def test_a_decoder_sees_the_tokens_that_a_predictor_predicts(run_folder):
    model, view = world_model.load(run_folder), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        model.encoder.norm.weight.mul_(3)
    assert torch.equal(target_tokens(model.encode, view), model.encode_targets(view))


@pytest.mark.slow
def test_a_finished_decoder_is_not_trained_again(run_folder):
    before = read_result(run_folder / "evaluations" / "decode.json").rows
    # Equal durations show that it was not.
    assert evaluate_decode(settings(run_folder)).rows == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"steps": 61}, "tune.steps: 50 -> 61"),
     ({"decoder": PixelDecoderConfig(dim=16, depth=1, num_heads=2)}, "decoder.dim: 32 -> 16"),
     ({"seed": 1}, "seed: 0 -> 1")],
)  # fmt: skip
def test_a_decoder_with_other_settings_is_kept(run_folder, changes, named):
    with pytest.raises(CheckpointError) as refused:
        evaluate_decode(settings(run_folder, **changes))
    assert named in str(refused.value) and "set name=OTHER to keep both results" in str(refused.value)


def train(run, rank_info, name, stop_at=None, watch=lambda batch: None):
    """Train a decoder for six steps, and return its weights.

    `stop_at` is a step in which it is asked to stop; `watch` is called with each batch.
    """
    model, preemption = world_model.load(run), Preemption()
    context = open_context("decode", settings(run, steps=6, name=name), model, rank_info, preemption)
    arm = build_arm(DECODER, model, context)

    def prepare(batch):
        if batch.step == stop_at:
            preemption.reason = "SIGTERM"
        watch(batch)
        return arm.job.prepare(batch)

    train_job(replace(arm.job, prepare=prepare), context)
    return arm.decoder.state_dict()


def test_a_stopped_decoder_resumes_bit_equal(run_folder, rank_info):
    straight = train(run_folder, rank_info, "straight")
    with pytest.raises(PreemptedError):
        train(run_folder, rank_info, "stopped", stop_at=3)
    assert read_status(run_folder / "evaluations" / "decode_stopped" / DECODER)["step"] == 4
    resumed = train(run_folder, rank_info, "stopped")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_it_learns_from_the_views_that_pretraining_would_see(run_folder, rank_info):
    seen = []
    train(run_folder, rank_info, "watched", watch=seen.append)
    config = world_model.load(run_folder).config
    config = replace(config, optim=replace(config.optim, global_batch_size=8))
    loader = training_loader(config, open_training_shards(config.data), rank_info)
    assert [batch.step for batch in seen] == list(range(6))
    for batch, expected in zip(seen, loader, strict=False):
        assert torch.equal(batch.source_view, expected.source_view)
        assert torch.equal(batch.target_view, expected.target_view) and batch.action.any()
    loader.close()


def test_the_command_stops_with_code_75(run_folder, capsys):
    asked = Preemption()
    asked.reason = "SIGTERM"
    arguments = ["tune.global_batch_size=8", "tune.precision=fp32", "name=asked", "runtime.loader=torch"]
    with pytest.raises(SystemExit) as ended:
        evaluate(["decode", f"run={run_folder}", "runtime.engine=plain", *arguments], asked)
    assert ended.value.code == 75 and "run the same command again to resume" in capsys.readouterr().err
    status = read_status(run_folder / "evaluations" / "decode_asked" / "decoder")
    assert status["state"] == "preempted" and status["reason"] == "SIGTERM"


def test_an_export_carries_the_decoder_of_its_checkpoint(run_folder, tmp_path, caplog):
    folder = export(ExportConfig(run=str(run_folder), to=str(tmp_path / "export")))
    exported, own = load_pixel_decoder(folder), load_pixel_decoder(run_folder)
    tokens = world_model.load(folder).encode_targets(torch.randn(2, 3, 16, 16))
    assert torch.equal(exported.decode(tokens), own.decode(tokens))
    assert "pixel_decoder.safetensors" in (folder / "README.md").read_text() and not caplog.text
    # Without the decoder of this checkpoint, there is none.
    decoders = tmp_path / "run" / "decoder"
    shutil.copytree(run_folder, decoders.parent)
    (decoders / "step-00000003.safetensors").rename(decoders / "step-00000002.safetensors")
    folder = export(ExportConfig(run=str(decoders.parent), to=str(tmp_path / "without")))
    assert "has no pixel decoder of step 3; it has one of step 2" in caplog.text
    with pytest.raises(FileNotFoundError, match="has no pixel decoder; train one with `iwm decode run="):
        load_pixel_decoder(folder)


@pytest.mark.parametrize("place", ["run", "export"])
@pytest.mark.parametrize("damage", [lambda content: content[:200], lambda content: b"x" * 100, lambda content: b""])
def test_a_damaged_decoder_is_named_with_the_remedy(run_folder, tmp_path, place, damage):
    if place == "run":
        folder, path = tmp_path, tmp_path / "decoder" / "step-00000003.safetensors"
        shutil.copytree(run_folder / "decoder", path.parent)
    else:
        folder = export(ExportConfig(run=str(run_folder), to=str(tmp_path / "export")))
        path = folder / "pixel_decoder.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=path.name):
        load_pixel_decoder(folder)


@pytest.mark.parametrize(
    ("setting", "message"),
    [("tune.steps=0", "tune.steps must be between 1 and 10^9, got 0"),
     ("decoder.num_heads=3", "decoder.num_heads must divide decoder.dim = 256, got 3"),
     ("decoder.depth=-1", "decoder.depth must be between 0 and 1000"),
     ("tune.epochs=3", "'tune.epochs'"),
     ("data.label=json.red", "data.label must be left unset: this evaluation uses no labels"),
     ("num_images=0", "num_images must be at least 1, got 0"),
     ("tune.global_batch_size=6 runtime.micro_batch_size=4", "runtime.micro_batch_size must satisfy")],
)  # fmt: skip
def test_impossible_settings_give_one_message(run_folder, setting, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["decode", f"run={run_folder}", "runtime.engine=plain", "runtime.loader=torch", *setting.split()])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
