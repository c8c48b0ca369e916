"""Finetuning for classification: what each variant trains, what stays frozen, and what is reported."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from fixtures.painted_shards import pretrain_on_painted_shards
from fixtures.tinted_shards import pretrain_on_tinted_shards, write_tinted_shard
from fixtures.tiny_finetuning import plain_augment, weights_of
from iwm_fast import world_model
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.checkpoints.export import export
from iwm_fast.config.commands import ExportConfig
from iwm_fast.config.evaluation import EvalDataConfig
from iwm_fast.config.finetuning import ARMS, FinetuneConfig, TuneConfig
from iwm_fast.config.run import RuntimeConfig
from iwm_fast.evals.finetuning.classification import (
    build_classification_job,
    build_classification_variant,
    evaluate_finetune,
)
from iwm_fast.evals.finetuning.run import map_validation_images, open_context, train_job
from iwm_fast.evals.finetuning.timm_baseline import TimmNetwork, build_vit, vit_run_config
from iwm_fast.evals.finetuning.variants import VariantInputs, lr_scale
from iwm_fast.evals.results import read_result
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.pipelines.annotations.labels import read_labels
from iwm_fast.pipelines.sampling.masks import all_patches
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.runtime import distributed
from iwm_fast.runtime.preemption import PreemptedError, Preemption

LABEL = "json.look.tint"
FOLDER = "finetune_json.look.tint"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Pretrain a run on tinted images, with two of three tints in the validation set, and return its folder."""
    return pretrain_on_tinted_shards(tmp_path_factory.mktemp("tinted"))


@pytest.fixture
def run(trained, tmp_path) -> str:
    return str(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def rank_info():
    yield distributed.start("cpu")
    distributed.stop()


def settings(run, *, runtime=None, tune=None, **changes) -> FinetuneConfig:
    defaults = {"epochs": 4.0, "warmup_epochs": 0.5, "global_batch_size": 8, "lr": 5e-3, "encoder_lr": 5e-3,
                "precision": "fp32", "drop_path": 0.1}  # fmt: skip
    runtime_defaults = {"device": "cpu", "engine": "plain", "loader": "torch"}
    others = {"run": run, "data": EvalDataConfig(label=LABEL), "log_every": 6, "augment": plain_augment()}
    return FinetuneConfig(
        tune=TuneConfig(**defaults | (tune or {})),
        runtime=RuntimeConfig(**runtime_defaults | (runtime or {})),
        **others | changes,
    )


def make_variant(name, run, rank_info, **changes):
    """Return a variant, its job, the context and the run's model."""
    model = world_model.load(run)
    context = open_context("variant", settings(run, **changes), model, rank_info, None)
    labels = read_labels(context.train, LABEL)
    variant = build_classification_variant(name, model, context, len(labels.classes))
    return variant, build_classification_job(variant, context, labels, {}), context, model


def first_batch(context):
    batches = []
    on_train = replace(context, val=context.train)
    map_validation_images(lambda batch: batches.append(batch) or batch.sample, on_train, np.arange(8))
    return batches[0]


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_all_variants_learn_a_planted_label_and_report_their_cost(rank_info, run):
    result = evaluate_finetune(settings(run, tune={"epochs": 6.0}))
    assert [row.subject for row in result.rows] == list(ARMS)
    for row in result.rows:
        losses = [line["loss/train"] for line in read_metrics(Path(run) / "evaluations" / FOLDER / row.subject)]
        # With label smoothing of 0.1 over three classes, no loss is below 0.29.
        assert losses[0] > 0.8 and losses[-1] < 0.5, row.subject
        assert row.value > 0.8 and row.low <= row.value <= row.high, row.subject
        assert row.chance == pytest.approx(1 / 3) and row.num_samples == 12
        assert row.images_per_s > 0 and row.time_s > 0
    model = world_model.load(run)
    encoder, predictor = num_parameters(model.encoder), num_parameters(model.predictor)
    tuned = {row.subject: row.num_tuned for row in result.rows}
    attentive = tuned["attentive"]
    assert tuned["encoder"] == encoder + 3 * 32 + 3
    assert tuned["predictor"] == tuned["random_predictor"] == predictor + attentive
    assert tuned["end_to_end"] == encoder + predictor + attentive
    row = result.row("predictor", "accuracy")
    assert row.control == result.value("random_predictor", "accuracy") and row.control_name == "random_predictor"
    assert result.row("encoder", "accuracy").control is None
    assert result.details["gain_of_pretraining"]["accuracy"] == pytest.approx(row.value - row.control)
    assert read_result(Path(run) / "evaluations" / f"{FOLDER}.json").rows == result.rows


@pytest.mark.parametrize("name", ["predictor", "random_predictor", "attentive"])
def test_variants_with_a_frozen_encoder_do_not_change_it(rank_info, run, name):
    _, job, context, model = make_variant(name, run, rank_info, tune={"epochs": 1.0})
    batch = first_batch(context)
    before = job.prepare(batch).tokens
    torch.testing.assert_close(before, model.encode(batch.source_view))
    train_job(job, context)
    assert torch.equal(job.prepare(batch).tokens, before) and not before.requires_grad
    saved = checkpoints.read(checkpoints.find_newest_folder(context.folder / name))
    assert not [entry for entry in saved.engine_state if "encoder" in entry]


def test_variants_start_from_the_teacher_and_the_predictor_or_a_new_one(rank_info, run):
    modules = {name: make_variant(name, run, rank_info)[0].module for name in ARMS}
    saved = checkpoints.read(checkpoints.find_newest_folder(Path(run)))
    trained = saved.weights("predictor.")
    for name in ("encoder", "end_to_end"):
        for key, weight in modules[name].encoder.state_dict().items():
            assert torch.equal(weight, saved.teacher_state[key]), key
    for name in ("predictor", "end_to_end"):
        assert all(torch.equal(weight, trained[key]) for key, weight in weights_of(modules[name].predictor).items())
    new = weights_of(modules["random_predictor"].predictor)
    assert not torch.equal(new["blocks.0.attn.qkv.weight"], trained["blocks.0.attn.qkv.weight"])
    heads = [weights_of(modules[name].head) for name in ("predictor", "random_predictor", "attentive", "end_to_end")]
    assert all(torch.equal(heads[0][key], head[key]) for head in heads for key in head), "heads start alike"
    assert modules["attentive"].predictor is None and modules["encoder"].predictor is None


def test_the_world_model_predicts_the_complete_image_without_change(rank_info, run):
    variant, job, context, model = make_variant("predictor", run, rank_info)
    batch = first_batch(context)
    with_action = replace(batch, action=torch.ones_like(batch.action))
    inputs = job.prepare(with_action)
    assert (inputs.action == 0).all() and inputs.action.shape == batch.action.shape
    num_patches = model.config.grid**2
    assert inputs.patches.row.tolist() == list(range(8 * num_patches))
    variant.module.eval()
    with torch.no_grad():
        assert torch.equal(variant(with_action), variant(batch))
        # The head's input is what the run predicts for the null action; another action gives other logits.
        predicted = model.predict(batch.source_view, torch.zeros_like(batch.action))
        torch.testing.assert_close(variant(batch), variant.module.head(predicted))
        changed = replace(inputs, action=torch.ones_like(batch.action))
        assert not torch.allclose(variant.module(changed), variant(batch))


def test_validation_has_no_augmentation_and_no_drop_path(rank_info, run):
    variant, job, context, _ = make_variant(
        "end_to_end", run, rank_info, augment=plain_augment(mixup=1.0, cutmix=1.0, erasing=1.0), tune={"drop_path": 0.9}
    )
    batch = first_batch(context)
    assert not torch.equal(job.prepare(batch).view, batch.source_view)
    variant.module.eval()
    assert torch.equal(variant(batch), variant(batch))
    variant.module.train()
    # At this rate, all branches of all images are sometimes dropped twice in a row. Seeded here, because augmentation
    # takes any number of random values.
    torch.manual_seed(0)
    assert not torch.equal(variant(batch), variant(batch)), "drop path is random in training"


def test_learning_rates_depend_on_variant_and_layer(run):
    model, config = world_model.load(run), settings(run, tune={"lr": 1e-3, "encoder_lr": 2e-3, "layer_decay": 0.5})

    def scale(variant, name):
        return lr_scale(name, variant=variant, tune=config.tune, model_config=model.config.model)

    # The encoder has two blocks, the predictor one.
    assert [scale("encoder", name) for name in ("head.linear.weight", "encoder.blocks.1.norm1.bias",
                                               "encoder.patch_embed.proj.bias")] == [2.0, 1.0, 0.25]  # fmt: skip
    assert [scale("predictor", name) for name in ("head.query", "predictor.mask_token")] == [1.0, 0.1]
    assert {scale("random_predictor", name) for name in ("head.query", "predictor.mask_token")} == {1.0}
    names = ("head.query", "predictor.blocks.0.norm1.bias", "predictor.embed.bias", "encoder.blocks.0.norm1.bias")
    assert [scale("end_to_end", name) for name in names] == pytest.approx([1.0, 0.09, 0.081, 0.1 * 0.9**4])


def losses(run, folder, variant, **runtime):
    tune = {"epochs": 1.0, "drop_path": 0.3}
    evaluate_finetune(settings(run, arms=variant, log_every=1, tune=tune, runtime=runtime, name=folder))
    return [row["loss/train"] for row in read_metrics(Path(run) / "evaluations" / f"{FOLDER}_{folder}" / variant)]


@pytest.mark.parametrize(
    ("variant", "stage"),
    [("end_to_end", 1), ("end_to_end", 3)]
    + [
        pytest.param(variant, stage, marks=pytest.mark.slow)
        for variant, stages in (("end_to_end", (0, 2)), ("encoder", (0, 1, 2, 3)), ("predictor", (0, 1, 2, 3)))
        for stage in stages
    ],
)
def test_engines_give_the_same_losses_with_layer_decay(rank_info, run, variant, stage):
    plain = losses(run, "plain", variant)
    zero = losses(run, "zero", variant, engine="deepspeed", zero_stage=stage)
    assert len(plain) == 6 and zero == pytest.approx(plain, rel=1e-4)


def test_recomputed_activations_do_not_change_the_losses(rank_info, run):
    recomputed = losses(run, "recomputed", "end_to_end", activation_checkpointing=True)
    assert recomputed == losses(run, "stored", "end_to_end")


def test_a_finished_variant_is_not_trained_again_and_others_are_added(rank_info, run):
    few = settings(run, tune={"epochs": 1.0})
    first = evaluate_finetune(replace(few, arms="attentive"))
    metrics = Path(run) / "evaluations" / FOLDER / "attentive" / "metrics.jsonl"
    written_ns = metrics.stat().st_mtime_ns
    both = evaluate_finetune(replace(few, arms="attentive,random_predictor"))
    assert metrics.stat().st_mtime_ns == written_ns
    assert both.rows[1] == first.rows[0] and both.rows[0].subject == "random_predictor"


def test_other_settings_need_another_name_and_keep_both_results(rank_info, run):
    few = settings(run, tune={"epochs": 1.0}, arms="attentive")
    evaluate_finetune(few)
    other = replace(few, tune=replace(few.tune, lr=1e-4))
    with pytest.raises(CheckpointError, match=r"(?s)tune\.lr: 0\.005 -> 0\.0001.*name=OTHER"):
        evaluate_finetune(other)
    assert evaluate_finetune(replace(other, name="slow")).name == f"{FOLDER}_slow"
    assert {path.stem for path in (Path(run) / "evaluations").glob("*.json")} == {FOLDER, f"{FOLDER}_slow"}


def test_a_variant_is_refused_after_the_run_was_trained_further(rank_info, run):
    few = settings(run, tune={"epochs": 1.0}, arms="attentive")
    evaluate_finetune(few)
    newest = checkpoints.find_newest_folder(Path(run))
    state = json.loads((newest / "state.json").read_text())
    saved = checkpoints.read(newest)
    later = replace(saved, folder=newest.with_name(f"step-{saved.step + 5:08}"), step=saved.step + 5)
    checkpoints.write(later, world_model.load(run).config)
    with pytest.raises(CheckpointError, match=rf"run\.step: {state['step']} -> {state['step'] + 5}"):
        evaluate_finetune(few)


class StopsAt(logging.Handler):
    """Requests a stop through its preemption when a text is logged."""

    def __init__(self, text):
        super().__init__()
        self.text = text
        self.preemption = Preemption()

    def emit(self, record):
        if self.text in record.getMessage():
            self.preemption.reason = "SIGTERM"


def test_interrupted_variants_give_the_same_result_as_uninterrupted_ones(rank_info, run, tmp_path, caplog):
    # Erasing is left out: it draws from Python's generator, from which beartype draws, too, in tests only.
    config = settings(
        run, arms="attentive,end_to_end", log_every=2, tune={"epochs": 2.0, "drop_path": 0.3},
        augment=plain_augment(mixup=0.8, cutmix=1.0),
    )  # fmt: skip
    caplog.set_level(logging.INFO, "iwm_fast")
    uninterrupted = evaluate_finetune(replace(config, name="uninterrupted"))
    for text in ("step 4/12", "training attentive", "step 8/12"):
        handler = StopsAt(text)
        logging.getLogger("iwm_fast").addHandler(handler)
        with pytest.raises(PreemptedError):
            evaluate_finetune(config, rank_info, handler.preemption)
        logging.getLogger("iwm_fast").removeHandler(handler)
    resumed = evaluate_finetune(config)
    assert [row.value for row in resumed.rows] == [row.value for row in uninterrupted.rows]
    for variant in config.chosen_arms:
        folders = (Path(run) / "evaluations" / name / variant for name in (FOLDER, f"{FOLDER}_uninterrupted"))
        first, second = (checkpoints.read(checkpoints.find_newest_folder(folder)).engine_state for folder in folders)
        assert all(torch.equal(first[name], second[name]) for name in second), variant


@pytest.fixture
def without_predictor(tmp_path) -> str:
    return pretrain_on_painted_shards(tmp_path, depth=0)


def test_variants_with_a_predictor_are_refused_for_the_identity_predictor(without_predictor, rank_info):
    run = without_predictor
    for arms in ("all", "predictor,attentive"):
        with pytest.raises(ValueError, match=r"arms must be encoder, attentive or both .*identity predictor, got"):
            evaluate_finetune(settings(run, arms=arms, data=EvalDataConfig()))
    assert not (Path(run) / "evaluations").exists()
    others = settings(run, arms="encoder,attentive", data=EvalDataConfig(), tune={"epochs": 0.5, "warmup_epochs": 0.0})
    assert [row.subject for row in evaluate_finetune(others).rows] == ["encoder", "attentive"]


def test_an_export_is_finetuned_if_its_shards_are_named(rank_info, run, tmp_path):
    folder = export(ExportConfig(run=run, to=str(tmp_path / "export")))
    few = settings(str(folder), arms="attentive", tune={"epochs": 0.5, "warmup_epochs": 0.0})
    with pytest.raises(ValueError, match=r"data\.train must name"):
        evaluate_finetune(few)
    data = world_model.load(run).config.data
    named = EvalDataConfig(train=data.train, val=data.val, label=LABEL)
    with pytest.raises(ValueError, match=r"data\.val must name"):
        evaluate_finetune(replace(few, data=replace(named, val="")))
    result = evaluate_finetune(replace(few, data=named))
    assert (folder / "evaluations" / f"{result.name}.json").is_file()
    assert result.step == world_model.load(run).step


def test_odd_micro_batches_are_refused_if_images_are_mixed(rank_info, run):
    odd = settings(run, arms="attentive", tune={"global_batch_size": 9}, augment=plain_augment(mixup=0.8))
    with pytest.raises(ValueError, match=r"runtime\.micro_batch_size .*must be even"):
        evaluate_finetune(odd)


def test_a_label_with_a_single_class_is_refused(rank_info, run, tmp_path):
    shards = write_tinted_shard(tmp_path / "alike.tar", 2, 0)
    with pytest.raises(ValueError, match=r"data\.label must name a label with at least two classes"):
        evaluate_finetune(settings(run, data=EvalDataConfig(train=shards, val=shards, label="cls")))


@pytest.mark.slow
def test_a_variant_trains_with_randaugment_and_dali(rank_info, run):
    config = settings(
        run, arms="attentive", augment=plain_augment(rand_augment=True), tune={"epochs": 1.0},
        runtime={"loader": "dali", "loader_threads": 1, "micro_batch_size": 4},
    )  # fmt: skip
    assert evaluate_finetune(config).rows[0].images_per_s > 0


def timm_settings(run, tmp_path, **changes):
    data = world_model.load(run).config.data
    timm_only = {"run": "", "timm": "vit_tiny_patch16_224", "to": str(tmp_path / "timm"), "size": 32,
                 "data": EvalDataConfig(train=data.train, val=data.val, label=LABEL)}  # fmt: skip
    return settings(**timm_only | {"tune": {"epochs": 1.0, "encoder_lr": 1e-3}} | changes)


def test_a_timm_vit_is_finetuned_from_a_weights_file(rank_info, run, tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=48)
    torch.nn.init.constant_(vit.norm.bias, 0.5)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    torch.save({"model": vit.state_dict()}, tmp_path / "vit.pth")
    results = [
        evaluate_finetune(timm_settings(run, tmp_path, weights=str(tmp_path / file), name=file[4:]))
        for file in ("vit.safetensors", "vit.pth")
    ]
    # Position embeddings are resized to the grid, and the old head is dropped.
    (row,) = results[0].rows
    trained = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    assert row.subject == "encoder" and row.num_tuned == num_parameters(trained) + 3 * 192 + 3
    assert results[1].rows[0].value == row.value
    saved = checkpoints.read(
        checkpoints.find_newest_folder(tmp_path / "timm/evaluations" / f"{FOLDER}_pth_size32" / "encoder")
    )
    drift = saved.weights("trained.vit.")["norm.bias"] - 0.5
    assert 0 < drift.abs().max() < 0.1
    assert (tmp_path / "timm/evaluations" / f"{results[0].name}.json").is_file()


def test_invalid_timm_settings_are_refused(rank_info, run, tmp_path):
    (tmp_path / "no.pth").write_bytes(b"nothing")
    save_file({"blocks.0.norm1.weight": torch.ones(192)}, tmp_path / "part.safetensors")
    invalid = {
        r"timm must name a model in timm": {"timm": "vit_unknown"},
        r"timm must name a plain ViT": {"timm": "resnet18"},
        r"^size must be a multiple of the patch size 16, such as 32 or 48": {"size": 40},
        r"no\.pth cannot be read as weights of a ViT": {"weights": str(tmp_path / "no.pth")},
        r"(?s)part.* does not fit vit_tiny.*Missing": {"weights": str(tmp_path / "part.safetensors")},
        r"data\.val must name shards if timm is set": {"data": EvalDataConfig(train="x")},
        r"runtime\.compile must be false": {"runtime": {"compile": True}},
    }
    for message, changes in invalid.items():
        with pytest.raises(ValueError, match=message):
            evaluate_finetune(timm_settings(run, tmp_path, **changes))
    with pytest.raises(FileNotFoundError, match=r"weights = .*does not exist"):
        evaluate_finetune(timm_settings(run, tmp_path, weights="nowhere.pth"))


def test_views_are_normalised_as_the_timm_weights_expect(run, tmp_path):
    vit = build_vit(timm_settings(run, tmp_path)).eval()
    assert vit.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    timm_view = (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    network = TimmNetwork(vit, 3)
    normalization = vit_run_config(timm_settings(run, tmp_path), vit).data.normalization
    view, action = normalize_view(pixels, normalization), torch.zeros(2, 7)
    inputs = VariantInputs(view=view, tokens=None, action=action, patches=all_patches(2, 4))
    expected = network.head(vit.forward_features(timm_view)[:, 1:])
    torch.testing.assert_close(network(inputs), expected, rtol=1e-4, atol=1e-5)
