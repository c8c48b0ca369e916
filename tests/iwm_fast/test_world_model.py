"""The Python API: load a run, load an image, predict a change, compare."""

import math
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

import iwm_fast
from fixtures.paths import TESTS
from fixtures.tar_files import encode, photograph, samples_of, write_tar
from fixtures.tiny_pretraining import tiny_run
from iwm_fast import world_model
from iwm_fast.config.loading import save_config
from iwm_fast.evals.datasets import evaluation_batches
from iwm_fast.pipelines.sampling.masks import all_patches
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.transforms.action import action_vector, change_from_action
from iwm_fast.pipelines.transforms.composition import ViewConfig, draw_view, identity_parameters
from iwm_fast.pipelines.transforms.operations.blur import Blur
from iwm_fast.train import run


@pytest.fixture
def model(tiny_config):
    config = tiny_config()
    return world_model.build_untrained(replace(config, runtime=replace(config.runtime, loader="torch")))


def test_a_run_is_loaded_with_the_teachers_weights(tiny_shards, tmp_path):
    run(tiny_run(tiny_shards, tmp_path / "run", loader="torch"))
    assert iwm_fast.load is world_model.load and iwm_fast.WorldModel is world_model.WorldModel
    loaded = iwm_fast.load(str(tmp_path / "run"))
    assert loaded.step == 12 and loaded.device == torch.device("cpu")
    untrained = world_model.build_untrained(loaded.config)
    for trained, new in ((loaded.encoder, untrained.encoder), (loaded.predictor, untrained.predictor)):
        assert not torch.equal(next(trained.parameters()), next(new.parameters()))
        assert not any(parameter.requires_grad for parameter in trained.parameters()) and not trained.training


def test_a_checkpoint_is_loaded_with_the_settings_of_its_own_phase(tmp_path):
    folder = shutil.copytree(TESTS / "fixtures" / "run_e678dd7" / "run", tmp_path / "run")
    first = world_model.load(folder, checkpoint=2).config
    # The settings of a later phase, for which data.restart_epoch allows other views and another normalisation.
    later = replace(
        first,
        views=replace(first.views, jitter=replace(first.views.jitter, brightness=0.1)),
        data=replace(first.data, pixel_mean=(0.5, 0.5, 0.5), val="later.tar"),
        runtime=replace(first.runtime, reader_threads=3),
        output=replace(first.output, folder=str(folder)),
    )
    save_config(later, folder / "config.yaml")
    loaded = world_model.load(folder, checkpoint=2).config
    assert loaded.views == first.views and loaded.data.normalization == first.data.normalization
    assert loaded.data.val.endswith("later.tar")
    assert loaded.runtime.reader_threads == 3 and loaded.output.folder == str(folder)


def test_an_unknown_encoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="encoder must be teacher or student, got 'Teacher'"):
        world_model.load(tmp_path, encoder="Teacher")


def test_the_package_imports_without_torch_and_names_missing_attributes():
    code = "import iwm_fast, sys; assert 'torch' not in sys.modules; iwm_fast.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"load", "WorldModel", "__version__"} <= set(dir(iwm_fast))
    with pytest.raises(AttributeError, match="module 'iwm_fast' has no attribute 'absent'"):
        iwm_fast.absent  # noqa: B018


def test_a_folder_without_run_or_checkpoint_is_refused(tmp_path, tiny_shards):
    with pytest.raises(FileNotFoundError, match=r"is not a run folder: it has no config\.yaml"):
        world_model.load(tmp_path)
    run(tiny_run(tiny_shards, tmp_path / "run", loader="torch"))
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint yet; wait for output\.checkpoint_every"):
        world_model.load(tmp_path / "run")


def test_a_loaded_image_equals_the_one_in_evaluations(model, tmp_path):
    encoded = encode(photograph("coffee.png")[:50, :90])
    (tmp_path / "0.jpg").write_bytes(encoded)
    write_tar(tmp_path / "a.tar", [("0.jpg", encoded)])
    (batch,) = evaluation_batches(model, open_shards(str(tmp_path / "a.tar")), np.arange(1))
    opened = model.load_image(tmp_path / "0.jpg")
    assert opened.shape == (1, 3, 16, 16) and torch.equal(opened, batch.source_view)
    assert samples_of(str(tmp_path / "a.tar"))[0]["jpg"] == encoded


def test_a_missing_file_or_one_that_is_not_an_image_is_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg"):
        model.load_image(tmp_path / "absent.jpg")
    image = encode(photograph("coffee.png")[:90, :90])
    for name, content in (("note.jpg", b"not an image"), ("empty.jpg", b""), ("half.jpg", image[: len(image) // 2])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} must be a complete image of a supported format"):
            model.load_image(str(tmp_path / name))


def test_an_action_by_name_equals_the_action_in_training(tiny_config):
    views = replace(tiny_config().views, jitter=replace(tiny_config().views.jitter, brightness=0.8, hue=0.2))
    model = world_model.build_untrained(replace(tiny_config(), views=views))
    source, target = (draw_view(views, 0, name, 0, np.arange(1), is_source=True) for name in ("source", "target"))
    expected = action_vector(source, target, views)
    change = {name: float(value[0]) for name, value in change_from_action(expected, views).items()}
    torch.testing.assert_close(model.action(**change), torch.from_numpy(expected))
    # Half the logarithm of the range of ratios, 1.8 / 0.2.
    assert model.action(brightness=math.log(9) / 4)[0].tolist() == pytest.approx([0.5, 0, 0, 0, 0, 0, 0])
    assert model.action(grayscale=1.0)[0].tolist() == [0, 0, 0, 0, 0, 1, 0]
    neutral = action_vector(identity_parameters(views, 1), identity_parameters(views, 1), views)
    assert torch.equal(model.action(), torch.from_numpy(neutral)) and not model.action().any()


def test_an_unknown_action_entry_is_refused_and_the_valid_ones_are_named(tiny_config):
    views = ViewConfig(size=16, blur=Blur(sigma=(0.1, 1.0)), action_entries=("hue", "blur"))
    model = world_model.build_untrained(replace(tiny_config(), views=views))
    assert model.action(hue=0.1).shape == (1, 2)
    with pytest.raises(
        ValueError, match=r"action must name entries of this run's actions, which are hue, blur, got 'brightness'"
    ):
        model.action(brightness=0.5)


def test_predictions_cover_all_positions_from_images_or_from_tokens(model):
    view, action = torch.randn(3, 3, 16, 16), torch.randn(3, 7)
    predicted, patches = model.predict(view, action), all_patches(3, 16)
    tokens = model.encode(view)
    with torch.no_grad():
        plain = model.predictor(tokens.flatten(0, 1), action, patches, patches)
    assert torch.equal(predicted.flatten(0, 1), plain) and torch.equal(model.predict_from(tokens, action), predicted)
    assert not torch.allclose(predicted, model.predict(view, -action))
    assert not any(value.requires_grad for value in (predicted, tokens, model.encode_targets(view)))


def test_the_difference_readout_is_the_effect_of_the_action_on_the_sources_own_target_tokens(model):
    view, action, no_action = torch.randn(3, 3, 16, 16), torch.randn(1, 7), torch.zeros(1, 7)
    model.encoder.norm.weight.mul_(3).add_(torch.arange(16))
    effect = model.predict(view, action) - model.predict(view, no_action)
    torch.testing.assert_close(
        model.predict(view, action, readout="difference"), model.encode_targets(view) + effect, atol=1e-5, rtol=0
    )
    own = model.predict(view, no_action, readout="difference")
    torch.testing.assert_close(own, model.encode_targets(view), atol=1e-5, rtol=0)
    assert torch.equal(model.predict(view, action, readout="absolute"), model.predict(view, action))
    # One source for several actions.
    several = model.predict(view[:1], torch.cat([no_action, action]), readout="difference")
    torch.testing.assert_close(several[1:], model.predict(view[:1], action, readout="difference"))
    with pytest.raises(ValueError, match="readout must be absolute or difference, got 'effect'"):
        model.predict(view, action, readout="effect")


def test_targets_are_tokens_normalised_without_parameters(model):
    view = torch.randn(2, 3, 16, 16)
    # Change the final norm, which does nothing in an untrained encoder.
    model.encoder.norm.weight.mul_(3).add_(torch.arange(16))
    targets = model.encode_targets(view)
    torch.testing.assert_close(targets, functional.layer_norm(model.encode(view), (16,), eps=1e-6))
    torch.testing.assert_close(targets.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)


def test_the_identity_predictor_is_refused_as_a_world_model(tiny_config):
    model = world_model.build_untrained(tiny_config(predictor_depth=0))
    for call in (model.require_predictor, lambda: model.predict(torch.randn(1, 3, 16, 16), torch.zeros(1, 7))):
        with pytest.raises(ValueError, match=r"run must have a predictor, not the identity .* knn, linear, attentive"):
            call()
    assert model.encode(torch.randn(1, 3, 16, 16)).shape == (1, 16, 16)


def test_all_forms_of_an_image_give_the_same_tokens(model, tmp_path):
    pixels = photograph("coffee.png")[:50, :90]
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    forms = [tmp_path / "photo.png", str(tmp_path / "photo.png"), Image.fromarray(pixels), pixels]
    expected = model.encode(model.load_image(tmp_path / "photo.png"))
    for form in forms:
        assert torch.equal(model.encode(form), expected)
    assert torch.allclose(model.encode(forms), expected.expand(4, -1, -1), atol=1e-6)
    assert torch.equal(model.encode_targets(pixels), model.encode_targets(model.load_image(pixels)))
    action = model.action(brightness=0.5)
    assert torch.allclose(model.predict(forms, action)[1:2], model.predict(pixels, action), atol=1e-6)


def test_the_orientation_of_a_pil_image_is_applied(model):
    image = Image.fromarray(photograph("coffee.png")[:50, :90])
    turned = Image.fromarray(np.rot90(image, 2))
    # Turned by half a turn.
    turned.getexif()[0x0112] = 3
    assert torch.equal(model.load_image(turned), model.load_image(image))


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        (torch.rand(2, 3, 16, 16), "which are not normalised"),
        (torch.randint(0, 256, (2, 3, 16, 16)).float(), "which are not normalised"),
        (torch.randn(2, 3, 32, 32), r"float \(B, 3, 16, 16\).*got float32 \(2, 3, 32, 32\)"),
        (torch.randn(3, 16, 16), r"got float32 \(3, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"got uint8 \(1, 3, 16, 16\)"),
        (np.zeros((40, 40, 3), np.float32), r"type uint8 and shape \(H, W, 3\).*got float32 \(40, 40, 3\)"),
        (np.zeros((40, 40), np.uint8), r"got uint8 \(40, 40\)"),
        ([], "must not be an empty list"),
    ],
)
def test_images_that_would_give_wrong_features_are_refused(model, images, problem):
    with pytest.raises(ValueError, match=problem):
        model.encode(images)


def test_values_of_normalised_images_are_accepted(model):
    # Black, white, grey and noise all lie in the range, and so does a light image of little contrast.
    plain = [np.full((20, 20, 3), value, np.uint8) for value in (0, 128, 255)]
    light = np.linspace(126, 168, 1200).astype(np.uint8).reshape(20, 20, 3)
    for pixels in (*plain, light, photograph("coffee.png")):
        model.encode(model.load_image(pixels))
    with pytest.raises(TypeError, match=r"images must be paths, PIL images, uint8 arrays .* got float"):
        model.encode([0.5])


def test_moving_a_model_moves_both_networks_and_its_inputs(model):
    assert model.to("cpu") is model and model.device == torch.device("cpu")
    moved = model.to("meta")
    assert moved.device.type == "meta" and next(moved.predictor.parameters()).device.type == "meta"
    assert moved.load_image(torch.randn(1, 3, 16, 16)).device.type == "meta"
