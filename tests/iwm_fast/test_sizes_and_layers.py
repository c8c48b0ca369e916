"""`size=` and `layers=`: models at another image size, and features of several layers of the encoder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import iwm_fast
from fixtures.tar_files import encode, photograph
from fixtures.tinted_shards import pretrain_on_tinted_shards
from iwm_fast.checkpoints.export import export
from iwm_fast.checkpoints.pixel_decoder import save_pixel_decoder
from iwm_fast.commands.embed import embed
from iwm_fast.config.commands import EmbedConfig, ExportConfig
from iwm_fast.config.evaluation import AttentiveConfig, EvalDataConfig, KnnConfig, LinearConfig, MrrConfig, PcaConfig
from iwm_fast.config.finetuning import FinetuneConfig, PixelDecoderConfig, SegmentConfig
from iwm_fast.evals.finetuning.classification import evaluate_finetune
from iwm_fast.evals.finetuning.run import open_context
from iwm_fast.evals.probing.attentive import evaluate_attentive
from iwm_fast.evals.probing.knn import evaluate_knn
from iwm_fast.evals.probing.linear import evaluate_linear
from iwm_fast.evals.probing.pca import draw_pca
from iwm_fast.evals.retrieval.mrr import evaluate_mrr
from iwm_fast.evals.segmentation.evaluate import open_segmentation
from iwm_fast.models.layers import sincos_positions
from iwm_fast.models.pixel_decoder import PixelDecoderSpec, build_pixel_decoder
from iwm_fast.runtime.distributed import single_process

LABEL = EvalDataConfig(label="json.look.tint")
IMAGE = photograph("coffee.png")[:64, :80]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Train a run on images of 16 pixels in patches of 4, with an encoder of 2 layers of width 32."""
    return pretrain_on_tinted_shards(tmp_path_factory.mktemp("tinted"))


def test_a_model_at_its_own_size_is_unchanged(trained):
    first, second = iwm_fast.load(trained), iwm_fast.load(trained, size=16)
    action = first.action(brightness=0.5)
    assert first.config == second.config
    assert torch.equal(first.predict(IMAGE, action), second.predict(IMAGE, action))
    assert first.encoder.state_dict().keys() == second.encoder.state_dict().keys()


@pytest.mark.parametrize("size", [8, 24])
def test_at_another_size_only_positions_differ(trained, size):
    own, resized = iwm_fast.load(trained), iwm_fast.load(trained, size=size)
    for name in ("encoder", "predictor"):
        weights, expected = (getattr(model, name).state_dict() for model in (resized, own))
        assert all(torch.equal(weights[key], expected[key]) for key in expected if key != "pos_embed")
    grid = size // 4
    assert torch.equal(resized.encoder.pos_embed[0], sincos_positions(32, grid))
    assert torch.equal(resized.predictor.positions, sincos_positions(16, grid))
    assert resized.load_image(IMAGE).shape == (1, 3, size, size)
    assert resized.predict(IMAGE, resized.action(brightness=0.5)).shape == (1, grid**2, 32)


def test_an_export_at_another_size_is_the_resized_model_here_and_in_timm(trained, tmp_path):
    folder = export(ExportConfig(run=str(trained), to=str(tmp_path / "24"), size=24))
    plain = export(ExportConfig(run=str(trained), to=str(tmp_path / "16")))
    model = iwm_fast.load(trained, size=24)
    expected = model.predict(IMAGE, model.action(hue=0.1))
    for loaded in (iwm_fast.load(folder), iwm_fast.load(plain, size=24)):
        assert torch.equal(loaded.predict(IMAGE, loaded.action(hue=0.1)), expected)
    encoder = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    view = model.load_image(IMAGE)
    torch.testing.assert_close(encoder.forward_features(view), model.encode(view), atol=1e-5, rtol=1e-5)
    card = "| image size | 16 x 16; positions are recomputed for 24 x 24 |"
    assert [card in (path / "README.md").read_text() for path in (folder, plain)] == [True, False]


def test_an_export_at_another_size_leaves_out_the_pixel_decoder(trained, tmp_path, caplog):
    sizes = {"step": iwm_fast.load(trained).step, "token_dim": 32, "grid": 4, "patch_size": 4}
    spec = PixelDecoderSpec(decoder=PixelDecoderConfig(depth=0), pixel_mean=(0.0,) * 3, pixel_std=(1.0,) * 3, **sizes)
    file = save_pixel_decoder(trained, build_pixel_decoder(spec, 0))
    for size, has_decoder in ((None, True), (24, False)):
        folder = export(ExportConfig(run=str(trained), to=str(tmp_path / str(size)), size=size))
        assert (folder / "pixel_decoder.safetensors").exists() == has_decoder
    assert caplog.text.count(f"no pixel decoder: {file} decodes images of the run's size only") == 1


@pytest.mark.parametrize(
    "start",
    [
        lambda run, folder: iwm_fast.load(run, size=22),
        lambda run, folder: export(ExportConfig(run=run, to=str(folder / "export"), size=22)),
        lambda run, folder: embed(EmbedConfig(run=run, to=str(folder / "f.npz"), size=22)),
        lambda run, folder: evaluate_mrr(MrrConfig(run=run, size=22)),
        lambda run, folder: evaluate_linear(LinearConfig(run=run, size=22)),
        lambda run, folder: evaluate_finetune(FinetuneConfig(run=run, size=22)),
        lambda run, folder: draw_pca(PcaConfig(run=run, size=22, picture=str(folder / "pca.png"))),
    ],
    ids=["load", "export", "embed", "mrr", "linear", "finetune", "pca"],
)
def test_a_size_that_patches_do_not_divide_is_refused_before_anything_starts(trained, tmp_path, start):
    with pytest.raises(ValueError, match=r"^size must be a multiple of the patch size 4, such as 20 or 24, got 22$"):
        start(str(trained), tmp_path)
    assert not list(tmp_path.iterdir())


def test_results_and_features_of_other_sizes_and_layers_stay_apart(trained):
    config = KnnConfig(run=str(trained), data=LABEL)
    seen = set()
    for change, suffix, width in (
        ({}, "", 32), ({"layers": 2}, "_layers2", 64), ({"size": 24}, "_size24", 32),
        ({"size": 24, "layers": 2}, "_size24_layers2", 64),
    ):  # fmt: skip
        result = evaluate_knn(replace(config, **change))
        assert result.name == f"knn_json.look.tint{suffix}" and result.rows[0].value > 0.5
        new = set(trained.glob("features/*/rows.npy")) - seen
        assert len(new) == 4 and {np.load(path).shape[1] for path in new} == {width}
        seen |= new
    # Those of the size before are removed, like those of another checkpoint.
    assert len(list(trained.glob("features/*/rows.npy"))) == 8


def test_the_world_model_is_evaluated_at_another_size(trained):
    result = evaluate_mrr(MrrConfig(run=str(trained), num_images=2, bank_size=4, size=24))
    assert result.name == "mrr_default_size24" and result.settings["size"] == 24


def test_networks_tuned_at_another_size_have_their_own_folder(trained):
    config = FinetuneConfig(run=str(trained), name="a", size=24)
    context = open_context("finetune", config, iwm_fast.load(trained, size=24), single_process("cpu"), None)
    assert context.folder.name == "finetune_a_size24" and context.run_config.views.size == 24
    with pytest.raises(ValueError, match=r"size must be a multiple"):
        open_segmentation(SegmentConfig(run=str(trained), size=22), single_process("cpu"))


@pytest.mark.slow
def test_all_arms_are_finetuned_at_another_size(trained):
    tune = {"epochs": 1.0, "warmup_epochs": 0.0, "global_batch_size": 16, "precision": "fp32"}
    config = FinetuneConfig(run=str(trained), data=LABEL, size=24)
    runtime = replace(config.runtime, device="cpu", engine="plain", loader="torch")
    augment = replace(config.augment, rand_augment=False)
    result = evaluate_finetune(replace(config, tune=replace(config.tune, **tune), runtime=runtime, augment=augment))
    assert result.name == "finetune_json.look.tint_size24" and len(result.rows) == 5


def test_features_of_several_layers_are_normed_outputs_side_by_side(trained):
    model = iwm_fast.load(trained)
    last, both = model.encode(IMAGE), model.encode(IMAGE, layers=2)
    assert both.shape == (1, 16, 64) and torch.equal(both[..., 32:], last)
    assert torch.equal(model.encoder.last_layers(model.load_image(IMAGE), 1)[None], last)
    # An encoder that ends after its first block, with the same norm.
    del model.encoder.blocks[1]
    assert torch.equal(both[..., :32], model.encode(IMAGE))


PROBES = {
    "knn": (evaluate_knn, KnnConfig),
    "linear": (evaluate_linear, LinearConfig),
    "attentive": (evaluate_attentive, AttentiveConfig),
    "pca": (draw_pca, PcaConfig),
}


@pytest.mark.parametrize("probe", PROBES)
def test_more_layers_than_there_are_are_refused(trained, probe):
    evaluate, config = PROBES[probe]
    message = r"^layers must be between 1 and the 2 layers of the run's encoder \(model\.encoder\.depth\), got 3$"
    with pytest.raises(ValueError, match=message):
        evaluate(config(run=str(trained), layers=3))
    with pytest.raises(ValueError, match=r"layers must be at least 1, got 0"):
        config(run=str(trained), layers=0)


@pytest.mark.parametrize("probe", ["linear", "attentive"])
def test_probes_learn_from_the_features_of_all_chosen_layers(trained, probe):
    evaluate, config = PROBES[probe]
    result = evaluate(config(run=str(trained), data=LABEL, layers=2, epochs=2, lrs=(1e-2,), weight_decays=(0.0,)))
    assert result.name == f"{probe}_json.look.tint_layers2"
    if probe == "linear":
        assert result.rows[0].num_tuned == 64 * 3 + 3


def test_images_are_embedded_at_another_size(trained, tmp_path):
    (tmp_path / "a.jpg").write_bytes(encode(IMAGE))
    embed(EmbedConfig(run=str(trained), images=str(tmp_path / "a.jpg"), to=str(tmp_path / "f.npz"), size=24))
    expected = iwm_fast.load(trained, size=24).encode(tmp_path / "a.jpg").mean(1)
    np.testing.assert_allclose(np.load(tmp_path / "f.npz")["feature"], expected, atol=1e-6)
