"""Weights that a run starts with, from runs, exports and files of other projects."""

import argparse
import logging
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from fixtures.tiny_pretraining import tiny_run
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.checkpoints.export import export
from iwm_fast.checkpoints.pretrained import initialize_from
from iwm_fast.cli import main
from iwm_fast.config.commands import ExportConfig
from iwm_fast.config.run import EncoderConfig, ModelConfig, PredictorConfig, RunConfig
from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models.encoder import Encoder
from iwm_fast.models.student import Student, build_student
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.pipelines.transforms.operations.blur import Blur
from iwm_fast.runtime import distributed
from iwm_fast.train import run
from iwm_fast.training.components import build_components

# The smallest model of timm that has our architecture.
TIMM_NAME = "vit_tiny_patch16_224"


@pytest.fixture
def rank_info():
    yield distributed.start("cpu")
    distributed.stop()


@pytest.fixture(scope="module")
def trained(tiny_shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "run"
    run(tiny_run(tiny_shards, folder, loader="torch"))
    return folder


def initialized_student(config: RunConfig) -> Student:
    """Return a run's student at its start."""
    student = build_student(config, REFERENCE)
    initialize_from(config, student)
    return student


def weights_of(student: Student) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in student.named_parameters()}


@pytest.fixture
def next_run(tiny_shards, tmp_path, trained) -> RunConfig:
    """Return a run with the settings of the trained one but another seed, which starts from its weights."""
    return replace(tiny_run(tiny_shards, tmp_path / "next", loader="torch"), seed=5, init_from=str(trained))


def test_a_run_starts_with_teacher_and_predictor_of_another_run(next_run, trained, caplog):
    caplog.set_level(logging.INFO, "iwm_fast")
    saved, student = checkpoints.read(checkpoints.find_newest_folder(trained)), initialized_student(next_run)
    for name, value in student.encoder.state_dict().items():
        assert torch.equal(value, saved.teacher_state[name]), name
    for name, value in student.predictor.named_parameters():
        assert torch.equal(value, saved.engine_state[f"weight/predictor.{name}"]), name
    assert f"the encoder starts with the teacher of {trained}, step 12" in caplog.text
    assert "the predictor starts with the source's predictor" in caplog.text


def test_an_export_gives_the_same_weights_as_its_run(next_run, trained, tmp_path):
    folder = export(ExportConfig(run=str(trained), to=str(tmp_path / "export")))
    from_run, from_export = initialized_student(next_run), initialized_student(replace(next_run, init_from=str(folder)))
    assert all(torch.equal(value, weights_of(from_export)[name]) for name, value in weights_of(from_run).items())


def test_the_new_teacher_is_a_copy_of_the_initial_encoder(next_run, rank_info):
    trainer = build_components(next_run, rank_info)
    for name, value in trainer.engine.named_parameters():
        if name.startswith("encoder."):
            assert torch.equal(value, trainer.teacher.state_dict()[name.removeprefix("encoder.")])
    assert not torch.equal(trainer.teacher.state_dict()["norm.weight"], torch.ones(32))


def test_a_predictor_of_another_size_keeps_its_random_weights(next_run, caplog):
    caplog.set_level(logging.INFO, "iwm_fast")
    model = replace(next_run.model, predictor=PredictorConfig(dim=16, depth=2, num_heads=1))
    config = replace(next_run, model=model)
    random, student = build_student(config, REFERENCE), initialized_student(config)
    assert all(
        torch.equal(value, random.predictor.state_dict()[name]) for name, value in student.predictor.named_parameters()
    )
    assert not torch.equal(student.encoder.norm.weight, random.encoder.norm.weight)
    assert "its random initialisation, because its settings differ (source -> this run: depth 1 -> 2)" in caplog.text


def test_another_number_of_heads_is_refused_although_shapes_fit(next_run):
    model = replace(next_run.model, encoder=replace(next_run.model.encoder, num_heads=4))
    with pytest.raises(ValueError, match=r"another encoder \(source -> this run: num_heads 2 -> 4\)"):
        initialized_student(replace(next_run, model=model))


def test_other_action_entries_are_refused_although_shapes_fit(next_run):
    entries = ("contrast", "brightness", "saturation", "hue", "blur", "grayscale", "solarize")
    with pytest.raises(
        ValueError,
        match=r"trained with the action entries .* set views to the source's values, or use the encoder only",
    ):
        initialized_student(replace(next_run, views=replace(next_run.views, action_entries=entries)))


def test_views_of_another_size_keep_their_own_positions(next_run):
    student = initialized_student(replace(next_run, views=replace(next_run.views, size=32)))
    assert student.encoder.pos_embed.shape == (1, 64, 32)
    assert not torch.equal(student.encoder.norm.weight, torch.ones(32))


def test_a_resumed_run_does_not_need_its_source_and_refuses_another(next_run, trained, tmp_path, capsys):
    source = tmp_path / "source"
    export(ExportConfig(run=str(trained), to=str(source)))
    config = replace(next_run, init_from=str(source), resume="auto")
    shorter = replace(config, optim=replace(config.optim, epochs=2.0))
    run(shorter)
    source.rename(tmp_path / "moved away")
    assert run(replace(config, resume="extend")).step == 12
    with pytest.raises(CheckpointError, match=r"init_from: .*source -> None"):
        run(replace(config, init_from=""))


def test_a_run_that_resumes_is_not_initialized_again(next_run, rank_info):
    first = build_components(next_run, rank_info)
    # Weights as if they had been trained.
    changed = first.engine.state() | {"weight/encoder.norm.weight": torch.full((32,), 7.0)}
    write_checkpoint(next_run, changed, first.teacher.state_dict())
    student = initialized_student(replace(next_run, resume="auto"))
    assert torch.equal(student.encoder.norm.weight, torch.ones(32)), "random weights, which resuming overwrites later"


def write_checkpoint(config: RunConfig, engine_state, teacher_state) -> None:
    folder = checkpoints.checkpoint_folder(Path(config.output.folder), 1)
    saved = checkpoints.Checkpoint(
        folder=folder, engine_state=engine_state, teacher_state=teacher_state, step=1, applied_steps=1, run_id="x",
        fingerprint={}, world_size=1, counters={}, versions={},
    )  # fmt: skip
    checkpoints.write(saved, config)


def timm_model(image_size: int = 32, **arguments) -> torch.nn.Module:
    """Return a model of timm with random weights, without downloading anything."""
    torch.manual_seed(3)
    return timm.create_model(TIMM_NAME, pretrained=False, img_size=image_size, **arguments)


def tiny_vit(**changes) -> RunConfig:
    encoder = EncoderConfig(**{"dim": 192, "depth": 12, "num_heads": 3} | changes)
    predictor = PredictorConfig(dim=16, depth=1, num_heads=1)
    views = ViewConfig(size=32, blur=Blur(sigma=(0.1, 1.0)))
    return RunConfig(views=views, model=ModelConfig(encoder=encoder, predictor=predictor))


def assert_same_weights(student: Student, model: torch.nn.Module) -> None:
    expected = model.state_dict()
    for name, value in student.encoder.named_parameters():
        assert torch.equal(value, expected[name]), name


WRAPPINGS = {
    "plain.safetensors": lambda state: state,
    "timm.pth": lambda state: {"state_dict": state, "epoch": 3},
    "ddp.pth": lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
    "backbone.pt": lambda state: {"state_dict": {f"module.backbone.{name}": value for name, value in state.items()}},
    "ijepa.pth.tar": lambda state: {
        "encoder": {f"module.{name}": torch.zeros_like(value) for name, value in state.items()},
        "predictor": {"module.mask_token": torch.zeros(1, 1, 4)},
        "target_encoder": {f"module.{name}": value for name, value in state.items()},
        "opt": {"state": {}, "param_groups": []}, "scaler": None, "epoch": 300, "loss": 0.5, "lr": 1e-6,
    },
    "only-encoder.pth": lambda state: {"encoder": state},
    "flat.safetensors": lambda state: {f"target_encoder.{name}": value for name, value in state.items()}
    | {"predictor.proj.weight": torch.zeros(2, 2)},
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPINGS)
@pytest.mark.parametrize("arguments", [{}, {"class_token": False, "global_pool": "avg", "fc_norm": False}])
def test_a_model_of_timm_is_read_from_any_wrapping(tmp_path, name, arguments):
    model = timm_model(**arguments)
    content = WRAPPINGS[name](model.state_dict())
    save_file(content, tmp_path / name) if name.endswith(".safetensors") else torch.save(content, tmp_path / name)
    assert_same_weights(initialized_student(replace(tiny_vit(), init_from=str(tmp_path / name))), model)


def test_with_our_positions_the_features_are_timms(tmp_path, caplog):
    model = timm_model(class_token=False, global_pool="avg", fc_norm=False, num_classes=0).eval()
    model.pos_embed.data.copy_(Encoder(tiny_vit().model.encoder, 32, REFERENCE).pos_embed)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    caplog.set_level(logging.INFO, "iwm_fast")
    student = initialized_student(replace(tiny_vit(), init_from=str(tmp_path / "vit.safetensors")))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = student.encoder(images, None).unflatten(0, (2, 4))
        torch.testing.assert_close(tokens, model.forward_features(images), atol=1e-5, rtol=1e-4)
    assert "features differ" not in caplog.text


def test_replaced_positions_are_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO, "iwm_fast")
    torch.save(timm_model().state_dict(), tmp_path / "vit.pth")
    initialized_student(replace(tiny_vit(), init_from=str(tmp_path / "vit.pth")))
    assert "its positions are not the fixed ones used here: features differ" in caplog.text


def test_positions_of_another_grid_are_refused(tmp_path):
    torch.save(timm_model(48).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(
        ValueError, match=r"has positions of 10 tokens, but this run has 2 x 2 patches; set views\.size"
    ):
        initialized_student(replace(tiny_vit(), init_from=str(tmp_path / "vit.pth")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 13}, r"has no blocks\.12\.norm1\.weight, which this encoder needs"),
        ({"depth": 11}, r"has blocks\.11\.norm1\.weight, which this encoder does not have"),
        ({"mlp_ratio": 2.0}, r"blocks\.0\.mlp\.fc1\.weight of .* has shape \(768, 192\), but .* \(384, 192\)"),
        ({"dim": 96}, r"patch_embed\.proj\.weight of .* has shape \(192, 3, 16, 16\), but .* \(96, 3, 16, 16\)"),
    ],
)  # fmt: skip
def test_missing_unexpected_and_misshapen_weights_are_named(tmp_path, changes, message):
    torch.save(timm_model().state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=message):
        initialized_student(replace(tiny_vit(**changes), init_from=str(tmp_path / "vit.pth")))


def test_layers_that_our_encoder_lacks_are_refused(tmp_path):
    torch.save(timm_model(init_values=0.1).state_dict(), tmp_path / "scaled.pth")
    with pytest.raises(ValueError, match=r"has blocks\.0\.ls1\.gamma, which this encoder does not have"):
        initialized_student(replace(tiny_vit(), init_from=str(tmp_path / "scaled.pth")))
    torch.save(timm_model(qkv_bias=False).state_dict(), tmp_path / "unbiased.pth")
    with pytest.raises(ValueError, match=r"has no blocks\.0\.attn\.qkv\.bias"):
        initialized_student(replace(tiny_vit(), init_from=str(tmp_path / "unbiased.pth")))


class Pickled:
    """An object that can only be unpickled by running code."""


@pytest.mark.parametrize("name", ["pickle.pth", "text.pth", "text.safetensors", "empty.pth", "list.pth"])
def test_a_file_without_weights_is_refused_without_running_its_code(tmp_path, name):
    content = {"pickle.pth": {"model": Pickled()}, "empty.pth": {}, "list.pth": [torch.zeros(1)]}
    if name in content:
        torch.save(content[name], tmp_path / name)
    else:
        (tmp_path / name).write_text("no weights")
    with pytest.raises(ValueError, match=r"init_from: .*(cannot be read as weights|holds no weights by name)"):
        initialized_student(replace(tiny_vit(), init_from=str(tmp_path / name)))


def cyclic() -> dict:
    content: dict = {}
    content["model"] = content
    return content


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"
UNREADABLE = {
    "settings.pth": (argparse.Namespace(a=1), "it holds pickled objects other than tensors, such as argparse"),
    "network.pth": (torch.nn.Linear(2, 2), r"other than tensors, such as torch\.nn\.modules\.linear\.Linear"),
    "path.tar": ({"model": Path("x")}, "other than tensors, such as pathlib"),
    "code.pth": (b"cbuiltins\neval\n(S'1'\ntR.", "other than tensors, such as eval"),
    "pickle.pt": (pickle.dumps({"a": 1}), "it holds pickled objects other than tensors; only"),
    "cyclic.pth": (cyclic(), "recursion"),
    "nothing.pth": (b"", "EOFError"),
    "words.pth": (b"hello world", "cannot be read as weights"),
    "pointer.safetensors": (LFS, "it is a Git LFS pointer, not the file itself; run `git lfs pull`"),
    "pointer.pth": (LFS, "it is a Git LFS pointer, not the file itself; run `git lfs pull`"),
    "page.safetensors": (b"<!DOCTYPE html><html>404", "it is an HTML page"),
    "store.pth": (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", r"it is XML.*\(NoSuchKey\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_why_a_file_is_refused_is_said_without_advice_to_run_its_code(tmp_path, name):
    content, message = UNREADABLE[name]
    torch.save(content, tmp_path / name) if not isinstance(content, bytes) else (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"init_from: .*{message}") as caught:
        initialized_student(replace(tiny_vit(), init_from=str(tmp_path / name)))
    text = str(caught.value)
    assert not any(word in text for word in ("weights_only", "False", "add_safe_globals", "allowlist", "trust", "\n"))


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_folder_without_weights_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"does not exist; name a run's folder|neither an export nor a run"):
        initialized_student(replace(tiny_vit(), init_from=str(tmp_path / name)))


def test_the_command_line_ends_with_one_message_and_writes_nothing(next_run, tmp_path, capsys):
    from iwm_fast.config.loading import save_config

    save_config(next_run, tmp_path / "run.yaml")
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "run.yaml"), "init_from=nowhere"])
    assert capsys.readouterr().err.startswith("error: init_from = 'nowhere' does not exist")
    assert not (tmp_path / "next").exists()
