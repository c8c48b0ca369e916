"""Weights a run begins with, from our own folders and from files of others."""

import logging
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
from iwm_fast.pipelines.config import ViewConfig
from iwm_fast.runtime import distributed
from iwm_fast.train import run
from iwm_fast.training.components import build_components

# the smallest model of timm that is a ViT as ours
TIMM = "vit_tiny_patch16_224"


@pytest.fixture
def rank_info():
    yield distributed.start("cpu")
    distributed.stop()


@pytest.fixture(scope="module")
def trained(tiny_shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "run"
    run(tiny_run(tiny_shards, folder, loader="torch"))
    return folder


def started(config: RunConfig) -> Student:
    student = build_student(config, REFERENCE)
    initialize_from(config, student)
    return student


def weights_of(student: Student) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in student.named_parameters()}


@pytest.fixture
def next_run(tiny_shards, tmp_path, trained) -> RunConfig:
    """A run like the one that was trained, of another seed, which starts from it."""
    return replace(tiny_run(tiny_shards, tmp_path / "next", loader="torch"), seed=5, init_from=str(trained))


def test_a_run_begins_with_the_teacher_and_the_predictor_of_another(next_run, trained, caplog):
    caplog.set_level(logging.INFO, "iwm_fast")
    saved, student = checkpoints.read(checkpoints.newest(trained)), started(next_run)
    for name, value in student.encoder.state_dict().items():
        assert torch.equal(value, saved.teacher_state[name]), name
    for name, value in student.predictor.named_parameters():
        assert torch.equal(value, saved.engine_state[f"weight/predictor.{name}"]), name
    assert f"the encoder starts with the teacher of {trained}, step 12" in caplog.text
    assert "the predictor starts with the one there" in caplog.text


def test_an_export_gives_the_same_start_as_its_run(next_run, trained, tmp_path):
    folder = export(ExportConfig(run=str(trained), to=str(tmp_path / "export")))
    from_run, from_export = started(next_run), started(replace(next_run, init_from=str(folder)))
    assert all(torch.equal(value, weights_of(from_export)[name]) for name, value in weights_of(from_run).items())


def test_the_new_teacher_is_a_copy_of_what_the_encoder_begins_with(next_run, rank_info):
    trainer = build_components(next_run, rank_info)
    for name, value in trainer.engine.named_parameters():
        if name.startswith("encoder."):
            assert torch.equal(value, trainer.teacher.state_dict()[name.removeprefix("encoder.")])
    assert not torch.equal(trainer.teacher.state_dict()["norm.weight"], torch.ones(32))


def test_a_predictor_of_another_size_starts_anew_and_the_log_says_so(next_run, caplog):
    caplog.set_level(logging.INFO, "iwm_fast")
    model = replace(next_run.model, predictor=PredictorConfig(dim=16, depth=2, num_heads=1))
    config = replace(next_run, model=model)
    drawn, student = build_student(config, REFERENCE), started(config)
    assert all(
        torch.equal(value, drawn.predictor.state_dict()[name]) for name, value in student.predictor.named_parameters()
    )
    assert not torch.equal(student.encoder.norm.weight, drawn.encoder.norm.weight)
    assert "the predictor starts anew, its settings differ (there -> here: depth 1 -> 2)" in caplog.text


def test_heads_that_leave_no_trace_in_shapes_are_compared(next_run):
    model = replace(next_run.model, encoder=replace(next_run.model.encoder, num_heads=4))
    with pytest.raises(ValueError, match=r"another encoder \(there -> here: num_heads 2 -> 4\)"):
        started(replace(next_run, model=model))


def test_an_action_of_other_entries_is_refused_though_shapes_fit(next_run):
    entries = ("contrast", "brightness", "saturation", "hue", "blur", "grayscale", "solarize")
    with pytest.raises(ValueError, match=r"knows the action entries .* set views as there, or take the encoder alone"):
        started(replace(next_run, views=replace(next_run.views, action_entries=entries)))


def test_views_of_another_size_take_the_weights_and_their_own_positions(next_run):
    student = started(replace(next_run, views=replace(next_run.views, size=32)))
    assert student.encoder.pos_embed.shape == (1, 64, 32)
    assert not torch.equal(student.encoder.norm.weight, torch.ones(32))


def test_a_resumed_run_needs_its_source_no_more_and_refuses_another(next_run, trained, tmp_path, capsys):
    source = tmp_path / "source"
    export(ExportConfig(run=str(trained), to=str(source)))
    config = replace(next_run, init_from=str(source), resume="auto")
    shorter = replace(config, optim=replace(config.optim, epochs=2.0))
    run(shorter)
    source.rename(tmp_path / "moved away")
    assert run(replace(config, resume="extend")).step == 12
    with pytest.raises(CheckpointError, match=r"init_from: .*source -> None"):
        run(replace(config, init_from=""))


def test_a_run_that_goes_on_does_not_begin_again(next_run, rank_info):
    first = build_components(next_run, rank_info)
    changed = first.engine.state() | {"weight/encoder.norm.weight": torch.full((32,), 7.0)}  # as if it had been trained
    checkpoint_of(next_run, changed, first.teacher.state_dict())
    student = started(replace(next_run, resume="auto"))
    assert torch.equal(student.encoder.norm.weight, torch.ones(32)), "drawn, and overwritten by resume"


def checkpoint_of(config: RunConfig, engine_state, teacher_state) -> None:
    folder = checkpoints.folder_of(Path(config.output.folder), 1)
    saved = checkpoints.Checkpoint(
        folder=folder, engine_state=engine_state, teacher_state=teacher_state, step=1, applied_steps=1, run_id="x",
        fingerprint={}, world_size=1, counters={}, versions={},
    )  # fmt: skip
    checkpoints.write(saved, config)


# files of others


def of_timm(image_size: int = 32, **arguments) -> torch.nn.Module:
    """Return a real model of timm with weights of its own, nothing downloaded."""
    torch.manual_seed(3)
    return timm.create_model(TIMM, pretrained=False, img_size=image_size, **arguments)


def tiny_vit(**changes) -> RunConfig:
    encoder = EncoderConfig(**{"dim": 192, "depth": 12, "num_heads": 3} | changes)
    predictor = PredictorConfig(dim=16, depth=1, num_heads=1)
    views = ViewConfig(size=32, blur_sigma=(0.1, 1.0))
    return RunConfig(views=views, model=ModelConfig(encoder=encoder, predictor=predictor))


def assert_taken(student: Student, model: torch.nn.Module) -> None:
    theirs = model.state_dict()
    for name, value in student.encoder.named_parameters():
        assert torch.equal(value, theirs[name]), name


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
def test_a_model_of_timm_is_taken_over_however_it_was_wrapped(tmp_path, name, arguments):
    model = of_timm(**arguments)
    content = WRAPPINGS[name](model.state_dict())
    save_file(content, tmp_path / name) if name.endswith(".safetensors") else torch.save(content, tmp_path / name)
    assert_taken(started(replace(tiny_vit(), init_from=str(tmp_path / name))), model)


def test_with_positions_as_ours_the_features_are_timms(tmp_path, caplog):
    model = of_timm(class_token=False, global_pool="avg", fc_norm=False, num_classes=0).eval()
    model.pos_embed.data.copy_(Encoder(tiny_vit().model.encoder, 32, REFERENCE).pos_embed)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    caplog.set_level(logging.INFO, "iwm_fast")
    student, images = (
        started(replace(tiny_vit(), init_from=str(tmp_path / "vit.safetensors"))),
        torch.randn(2, 3, 32, 32),
    )
    with torch.no_grad():
        tokens = student.encoder(images, None).unflatten(0, (2, 4))
        torch.testing.assert_close(tokens, model.forward_features(images), atol=1e-5, rtol=1e-4)
    assert "features differ" not in caplog.text


def test_positions_that_give_way_are_told(tmp_path, caplog):
    caplog.set_level(logging.INFO, "iwm_fast")
    torch.save(of_timm().state_dict(), tmp_path / "vit.pth")
    started(replace(tiny_vit(), init_from=str(tmp_path / "vit.pth")))
    assert "its positions are not the fixed ones used here: features differ" in caplog.text


def test_positions_of_another_grid_are_refused(tmp_path):
    torch.save(of_timm(48).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=r"has positions of 10 tokens, this run has 2 x 2 patches; set views\.size"):
        started(replace(tiny_vit(), init_from=str(tmp_path / "vit.pth")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 13}, r"has no blocks\.12\.norm1\.weight, which this encoder needs"),
        ({"depth": 11}, r"has blocks\.11\.norm1\.weight, which this encoder has not"),
        ({"mlp_ratio": 2.0}, r"blocks\.0\.mlp\.fc1\.weight of .* has shape \(768, 192\), here .* \(384, 192\)"),
        ({"dim": 96}, r"patch_embed\.proj\.weight of .* has shape \(192, 3, 16, 16\), here .* \(96, 3, 16, 16\)"),
    ],
)  # fmt: skip
def test_blocks_that_are_missing_superfluous_or_misshapen_are_named(tmp_path, changes, message):
    torch.save(of_timm().state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=message):
        started(replace(tiny_vit(**changes), init_from=str(tmp_path / "vit.pth")))


def test_layers_that_ours_has_not_are_never_dropped_silently(tmp_path):
    torch.save(of_timm(init_values=0.1).state_dict(), tmp_path / "scaled.pth")
    with pytest.raises(ValueError, match=r"has blocks\.0\.ls1\.gamma, which this encoder has not"):
        started(replace(tiny_vit(), init_from=str(tmp_path / "scaled.pth")))
    torch.save(of_timm(qkv_bias=False).state_dict(), tmp_path / "unbiased.pth")
    with pytest.raises(ValueError, match=r"has no blocks\.0\.attn\.qkv\.bias"):
        started(replace(tiny_vit(), init_from=str(tmp_path / "unbiased.pth")))


class Pickled:
    """Something that only running its code could bring back."""


@pytest.mark.parametrize("name", ["pickle.pth", "text.pth", "text.safetensors", "empty.pth", "list.pth"])
def test_what_holds_no_weights_is_refused_without_running_it(tmp_path, name):
    content = {"pickle.pth": {"model": Pickled()}, "empty.pth": {}, "list.pth": [torch.zeros(1)]}
    if name in content:
        torch.save(content[name], tmp_path / name)
    else:
        (tmp_path / name).write_text("no weights")
    with pytest.raises(ValueError, match=r"init_from: .*(cannot be read as weights|holds no weights by name)"):
        started(replace(tiny_vit(), init_from=str(tmp_path / name)))


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_place_without_weights_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"does not exist; name a run's folder|neither an export nor a run"):
        started(replace(tiny_vit(), init_from=str(tmp_path / name)))


def test_the_command_line_ends_with_one_message_and_writes_nothing(next_run, tmp_path, capsys):
    from iwm_fast.config.loading import save_config

    save_config(next_run, tmp_path / "run.yaml")
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "run.yaml"), "init_from=nowhere"])
    assert capsys.readouterr().err.startswith("error: init_from = 'nowhere' does not exist")
    assert not (tmp_path / "next").exists()
