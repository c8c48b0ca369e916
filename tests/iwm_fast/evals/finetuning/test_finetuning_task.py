"""The finetuning task: how many blocks are trained, from which encoder, and what the predictor is given in training."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from fixtures.painted_shards import finetune_settings, pretrain_on_painted_shards
from fixtures.tiny_finetuning import plain_augment, weights_of
from fixtures.tiny_pretraining import tiny_run
from iwm_fast import world_model
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.checkpoints.export import export
from iwm_fast.config.commands import ExportConfig
from iwm_fast.config.finetuning import FinetuneConfig, MultitaskConfig, SegmentConfig, TuneConfig
from iwm_fast.config.loading import build
from iwm_fast.evals.finetuning.classification import (
    build_classification_job,
    build_classification_variant,
    evaluate_finetune,
)
from iwm_fast.evals.finetuning.conditions import training_conditions
from iwm_fast.evals.finetuning.networks import build_networks, load_model
from iwm_fast.evals.finetuning.run import open_context
from iwm_fast.evals.finetuning.task import job_fingerprint
from iwm_fast.evals.multitask.evaluate import evaluate_multitask
from iwm_fast.evals.segmentation.evaluate import build_segmentation_job, evaluate_segment, open_segmentation
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.pipelines.annotations.labels import read_labels
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.pipelines.transforms.operations.blur import Blur
from iwm_fast.pipelines.transforms.operations.crop import Crop
from iwm_fast.pipelines.transforms.operations.flip import Flip
from iwm_fast.runtime import distributed
from iwm_fast.training.loaders import finetune_loader, training_loader


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """Pretrain an encoder of two blocks with a predictor of two blocks and return the run's folder."""
    return pretrain_on_painted_shards(tmp_path_factory.mktemp("task"), depth=2)


@pytest.fixture
def rank_info():
    yield distributed.start("cpu")
    distributed.stop()


def settings(run, *, name="", arms="all", **changes) -> FinetuneConfig:
    return FinetuneConfig(run=run, name=name, arms=arms, augment=plain_augment(), **finetune_settings(**changes))


def make_variant(arm, run, rank_info, **changes):
    """Return a variant, its job and the context."""
    config = settings(run, **changes)
    model = load_model(config, rank_info)
    context = open_context("task", config, model, rank_info, None)
    labels = read_labels(context.train, "cls")
    variant = build_classification_variant(arm, model, context, len(labels.classes))
    return variant, build_classification_job(variant, context, labels, {}), context


def first_batch(context):
    loader = finetune_loader(context.run_config, None, context.train, context.rank_info)
    batch = next(loader)
    loader.close()
    return batch


HEAD = {"head"}
ENCODER_TOP = {"encoder.blocks.1", "encoder.norm"}
PREDICTOR_TOP = {"predictor.blocks.1", "predictor.norm", "predictor.project"}
PREDICTOR_BLOCKS = {"predictor.blocks.0", *PREDICTOR_TOP}
PREDICTOR_INPUTS = {"predictor.embed", "predictor.mask_token", "predictor.mixer.layers"}
TRAINED = [
    ("encoder", 0, HEAD),
    ("encoder", 1, HEAD | ENCODER_TOP),
    ("encoder", 2, HEAD | ENCODER_TOP | {"encoder.blocks.0"}),
    ("predictor", 0, HEAD),
    ("predictor", 1, HEAD | PREDICTOR_TOP),
    ("random_predictor", 2, HEAD | PREDICTOR_BLOCKS),
    ("attentive", 1, HEAD),
    ("end_to_end", 1, HEAD | PREDICTOR_TOP),
    ("end_to_end", 2, HEAD | PREDICTOR_BLOCKS),
    ("end_to_end", 3, HEAD | PREDICTOR_BLOCKS | PREDICTOR_INPUTS | ENCODER_TOP),
    ("end_to_end", 4, HEAD | PREDICTOR_BLOCKS | PREDICTOR_INPUTS | ENCODER_TOP | {"encoder.blocks.0"}),
]


def layer_of(parameter):
    parts = parameter.split(".")
    return parts[0] if parts[0] == "head" else ".".join(parts[: 3 if parts[1] in ("blocks", "mixer") else 2])


@pytest.mark.parametrize(("arm", "blocks", "layers"), TRAINED)
def test_only_the_last_blocks_are_trained(rank_info, run, arm, blocks, layers):
    variant, _, _ = make_variant(arm, run, rank_info, blocks=blocks)
    trained = {name: weight for name, weight in variant.module.named_parameters() if weight.requires_grad}
    assert {layer_of(name) for name in trained} == layers
    optimized = {id(weight) for group in variant.optimizer.param_groups for weight in group["params"]}
    assert optimized == {id(weight) for weight in trained.values()}


def test_without_a_number_of_blocks_everything_is_trained(rank_info, run):
    for arm in ("encoder", "predictor", "end_to_end"):
        variant, _, _ = make_variant(arm, run, rank_info)
        assert all(weight.requires_grad for weight in variant.module.parameters()), arm


def test_frozen_layers_keep_their_weights_and_are_not_counted(rank_info, run):
    config = settings(run, name="last1", arms="encoder,predictor", blocks=1, epochs=0.5, drop_path=0.3)
    result = evaluate_finetune(config)
    for row in result.rows:
        variant, _, context = make_variant(row.subject, run, rank_info, blocks=1)
        before = {name: weight.requires_grad for name, weight in variant.module.named_parameters()}
        sizes = {name: weight.numel() for name, weight in variant.module.named_parameters()}
        assert row.num_tuned == sum(sizes[name] for name, is_trained in before.items() if is_trained)
        folder = context.folder.with_name("finetune_last1") / row.subject
        saved = checkpoints.read(checkpoints.find_newest_folder(folder))
        after, initial = saved.weights("trained."), weights_of(variant.module)
        changed = {name for name in after if not torch.equal(after[name], initial[name])}
        assert changed == {name for name, is_trained in before.items() if is_trained}, row.subject
        moments = {name.partition("/")[2] for name in saved.engine_state if name.startswith("exp_avg/")}
        assert moments == {f"trained.{name}" for name in changed}
    # A finished arm is read again, frozen layers included.
    assert evaluate_finetune(config).rows == result.rows


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_engines_give_the_same_losses_with_frozen_layers(rank_info, run, stage):
    losses = []
    for name, engine in ((f"plain{stage}", {}), (f"zero{stage}", {"engine": "deepspeed", "zero_stage": stage})):
        config = settings(run, name=name, arms="end_to_end", blocks=3, epochs=1.0, drop_path=0.3, **engine)
        evaluate_finetune(replace(config, log_every=1))
        losses.append(
            [row["loss/train"] for row in read_metrics(Path(run) / f"evaluations/finetune_{name}/end_to_end")]
        )
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-4)


REFUSED = [
    (FinetuneConfig, {"arms": "encoder"}, {"blocks": 3},
     r"tune\.blocks must be at most 2, the number of blocks in the arm encoder, or unset to train all, got 3"),
    (FinetuneConfig, {"arms": "end_to_end"}, {"blocks": 5}, "at most 4, the number of blocks in the arm end_to_end"),
    (FinetuneConfig, {"arms": "attentive"}, {"blocks": 1},
     r"tune\.blocks must be unset for the arms attentive, which train a head alone"),
    (FinetuneConfig, {"arms": "encoder,attentive"}, {"action": "drawn"},
     r"tune\.action must be null for the arms encoder, attentive, without a predictor, got 'drawn'"),
    (SegmentConfig, {"arms": "head,predictor"}, {"blocks": 3}, "at most 2, the number of blocks in the arm predictor"),
    (SegmentConfig, {"arms": "head"}, {"context": "masked"}, r"tune\.context must be full for the arms head"),
    (MultitaskConfig, {}, {"blocks": 3}, "at most 2, the number of blocks in the arm predictor"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "tune", "message"), REFUSED)
def test_settings_that_do_not_fit_are_refused_before_anything_is_trained(
    rank_info, run, tmp_path, *, kind, options, tune, message
):
    (tmp_path / "tasks.yaml").write_text("left: {label: cls}\n")
    options = options | ({"tasks": str(tmp_path / "tasks.yaml")} if kind is MultitaskConfig else {})
    if kind is not SegmentConfig:
        options |= {"augment": plain_augment()}
    config = kind(run=run, name="refused", **options, **finetune_settings(**tune))
    evaluate = {FinetuneConfig: evaluate_finetune, SegmentConfig: evaluate_segment, MultitaskConfig: evaluate_multitask}
    with pytest.raises(ValueError, match=message):
        evaluate[kind](config)
    assert not list(Path(run).glob("evaluations/*refused*"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tune.blocks=-1", r"tune\.blocks must be at least 0 or unset, got -1"),
        ("tune.encoder=both", r"tune\.encoder must be one of teacher, student, got 'both'"),
        ("tune.action=zero", r"tune\.action must be one of null, drawn, got 'zero'"),
    ],
)
def test_invalid_values_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        build(FinetuneConfig, {}, [override])
    # In YAML, null is the absence of a value.
    assert build(FinetuneConfig, {}, ["tune.action=null"]).tune.action == "null"


@pytest.mark.parametrize(("name", "value"), [("action", "drawn"), ("context", "masked")])
def test_multitask_has_no_other_actions_and_masks(name, value):
    with pytest.raises(ValueError, match=rf"tune\.{name} must be .*; only finetune and segment have others"):
        MultitaskConfig(tune=TuneConfig(**{name: value}))


def test_the_student_can_be_finetuned_from_a_run_and_from_an_export(rank_info, run, tmp_path):
    student = checkpoints.read(checkpoints.find_newest_folder(Path(run))).weights("encoder.")
    teacher = world_model.load(run).encoder.state_dict()
    exported = export(ExportConfig(run=run, to=str(tmp_path / "export")))
    variant, job, context = make_variant("encoder", run, rank_info, encoder="student")
    for encoder in (variant.module.encoder, world_model.load(exported, encoder="student").encoder):
        assert all(torch.equal(weight, student[name]) for name, weight in encoder.named_parameters())
        assert torch.equal(encoder.pos_embed, teacher["pos_embed"])
    assert not torch.equal(student["norm.bias"], teacher["norm.bias"])
    assert "tune.encoder" in dict(job_fingerprint(job, context.settings, context.run_config, context.train))
    (exported / "trained_encoder.safetensors").unlink()
    assert world_model.load(exported).step == world_model.load(run).step
    with pytest.raises(CheckpointError, match="trained_encoder") as error:
        world_model.load(exported, encoder="student")
    assert "use the teacher, or export the run again" in error.value.__notes__[0]


@pytest.mark.parametrize("views", [{}, {"crop": Crop(source_scale=(0.3, 0.8)), "flip": Flip(source_probability=0.5)}])
def test_actions_and_masks_are_those_of_pretraining(rank_info, tiny_shards, tmp_path, views):
    config = replace(tiny_run(tiny_shards, tmp_path), views=ViewConfig(size=16, blur=Blur(sigma=(0.1, 1.0)), **views))
    config = replace(config, runtime=replace(config.runtime, loader="torch"))
    shards, tune = open_shards(tiny_shards.pattern), TuneConfig(action="drawn", context="masked")
    loaders = training_loader(config, shards, rank_info, 3), finetune_loader(config, None, shards, rank_info, 3)
    pretraining, finetuning = map(next, loaders)
    conditions = training_conditions(finetuning, tune, config)
    assert torch.equal(conditions.action, pretraining.action) and conditions.action.any()
    for name in ("patch", "row", "offsets"):
        assert torch.equal(getattr(conditions.context, name), getattr(pretraining.context, name))
    default = training_conditions(finetuning, TuneConfig(), config)
    assert not default.action.any() and default.context is None
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("arm", ["predictor", "end_to_end"])
def test_hidden_patches_do_not_reach_the_prediction(rank_info, run, arm):
    variant, job, context = make_variant(arm, run, rank_info, context="masked", drop_path=0.0)
    batch = first_batch(context)
    inputs = job.prepare(batch)
    patch, grid = context.model_config.model.encoder.patch_size, context.model_config.grid
    hidden = torch.ones(len(batch.sample) * grid**2, dtype=torch.bool)
    hidden[inputs.context.row] = False
    pixels = hidden.view(-1, 1, grid, grid).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    assert 0.1 < hidden.float().mean() < 0.9
    other = replace(batch, source_view=torch.where(pixels, torch.randn_like(batch.source_view), batch.source_view))
    variant.module.eval()
    with torch.no_grad():
        assert torch.equal(variant.module(job.prepare(other)), variant.module(inputs))
        # In validation, all patches are visible.
        assert not torch.allclose(variant(other), variant(batch))


@pytest.mark.parametrize("changes", [{"action": "drawn"}, {"context": "masked"}])
@pytest.mark.parametrize("arm", ["predictor", "end_to_end"])
def test_training_is_conditioned_and_validation_is_not(rank_info, run, arm, changes):
    default, default_job, context = make_variant(arm, run, rank_info)
    changed, changed_job, _ = make_variant(arm, run, rank_info, **changes)
    batch = first_batch(context)
    forward = [partial(variant.module.eval(), job.prepare(batch)) for variant, job in
               ((default, default_job), (changed, changed_job))]  # fmt: skip
    with torch.no_grad():
        assert torch.equal(changed(batch), default(batch))
        first, second = (run_once() for run_once in forward)
        assert first.shape == second.shape and not torch.allclose(first, second)


def test_arms_without_a_predictor_are_trained_as_ever(rank_info, run):
    _, job, context = make_variant("encoder", run, rank_info, action="drawn", context="masked")
    inputs = job.prepare(first_batch(context))
    assert inputs.context is None and not inputs.action.any()


def test_a_masked_drawn_task_is_trained_and_resumed_from_its_result(rank_info, run):
    config = settings(run, name="drawn", arms="end_to_end", action="drawn", context="masked", epochs=0.5)
    result = evaluate_finetune(config)
    assert evaluate_finetune(config).rows == result.rows
    # Another task is not resumed from these weights.
    with pytest.raises(CheckpointError, match=r"(?s)tune\.action: drawn -> None.*tune\.context: masked -> None"):
        evaluate_finetune(replace(config, tune=replace(config.tune, action="null", context="full")))


def test_jobs_of_earlier_versions_are_resumed_by_default(rank_info, run):
    _, job, context = make_variant("predictor", run, rank_info)
    config, shards = context.run_config, context.train
    names = ("tune.blocks", "tune.encoder", "tune.action", "tune.context")
    # None equals the entry that is missing from their checkpoints.
    fingerprint = job_fingerprint(job, context.settings, config, shards)
    assert [fingerprint[name] for name in names] == [None] * 4
    assert not [name for name in fingerprint if name.startswith("mask.")]
    masked = replace(context.settings, tune=replace(context.settings.tune, context="masked"))
    assert [name for name in job_fingerprint(job, masked, config, shards) if name.startswith("mask.")]


def test_jobs_with_other_labels_or_maps_have_another_fingerprint(rank_info, run):
    variant, _, context = make_variant("predictor", run, rank_info)
    labels = read_labels(context.train, "cls")
    segmentation = open_segmentation(SegmentConfig(run=run, **finetune_settings()), rank_info)
    student = build_networks(segmentation.model, segmentation.config, rank_info, "predictor")
    with segmentation.read_masks(context.train) as masks:
        jobs = {
            "data.train.labels": [
                build_classification_job(variant, context, replace(labels, number=number), {})
                for number in (labels.number, labels.number[::-1].copy())
            ],
            "data.train.maps": [
                build_segmentation_job(variant, student, each, masks)
                for each in (segmentation, replace(segmentation, maps_digest="corrected"))
            ],
        }
    for entry, pair in jobs.items():
        old, new = (job_fingerprint(job, context.settings, context.run_config, context.train) for job in pair)
        assert [name for name in old if old[name] != new[name]] == [entry]


def test_segmentation_is_trained_end_to_end(rank_info, run):
    arms, tune = "predictor,end_to_end", finetune_settings(epochs=2.0, pretrained_lr_factor=0.3)
    result = evaluate_segment(SegmentConfig(run=run, name="e2e", arms=arms, **tune))
    rows = {arm: result.row(arm, "mean_iou") for arm in arms.split(",")}
    row = rows["end_to_end"]
    assert row.value > row.chance and row.low <= row.value <= row.high
    model = world_model.load(run)
    assert row.num_tuned == rows["predictor"].num_tuned + sum(weight.numel() for weight in model.encoder.parameters())


def test_a_timm_vit_trains_its_last_blocks(rank_info, run, tmp_path):
    data = world_model.load(run).config.data
    config = settings("", arms="encoder", epochs=0.5, blocks=2, drop_path=0.3)
    config = replace(
        config, run="", timm="vit_tiny_patch16_224", to=str(tmp_path), size=32,
        data=replace(config.data, train=data.train, val=data.val),
    )  # fmt: skip
    (row,) = evaluate_finetune(config).rows
    saved = checkpoints.read(checkpoints.find_newest_folder(tmp_path / "evaluations/finetune_size32/encoder"))
    moments = {name.partition("/trained.")[2] for name in saved.engine_state if name.startswith("exp_avg/")}
    layers = {".".join(name.split(".")[: 3 if "blocks" in name else 2]) for name in moments}
    assert layers == {"vit.blocks.10", "vit.blocks.11", "vit.norm", "head.linear"}
    assert row.num_tuned == sum(saved.weights("trained.")[name].numel() for name in moments)
    with pytest.raises(ValueError, match="at most 12, the number of blocks in the arm encoder"):
        evaluate_finetune(replace(config, tune=replace(config.tune, blocks=13)))
    with pytest.raises(ValueError, match=r"tune\.encoder must be left unset if timm is set"):
        replace(config, tune=replace(config.tune, encoder="student"))
