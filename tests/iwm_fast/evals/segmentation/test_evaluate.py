"""Segmentation: logits of patches become classes of pixels, and variants learn the segmentation maps."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures.painted_shards import COLOURS, finetune_settings, pretrain_on_painted_shards, write_painted_shard
from fixtures.tar_files import encode, write_tar
from iwm_fast.config.evaluation import EvalDataConfig
from iwm_fast.config.finetuning import DenseAugmentConfig, SegmentConfig
from iwm_fast.evals.finetuning.networks import build_networks
from iwm_fast.evals.finetuning.run import train_job
from iwm_fast.evals.finetuning.variants import build_variant
from iwm_fast.evals.results import read_result
from iwm_fast.evals.segmentation.evaluate import (
    build_segmentation_job,
    choose_figure_samples,
    evaluate_segment,
    open_segmentation,
)
from iwm_fast.evals.segmentation.figure import colourise, make_legend
from iwm_fast.evals.segmentation.network import classify_pixels, pixel_loss, upsample_logits
from iwm_fast.models.heads import PatchHead
from iwm_fast.pipelines.config import RandAugmentConfig
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.runtime import distributed

ARMS = "head,untrained_head,predictor,random_predictor,encoder"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return pretrain_on_painted_shards(tmp_path_factory.mktemp("segment"))


@pytest.fixture
def rank_info():
    yield distributed.start("cpu")
    distributed.stop()


def test_logits_are_interpolated_linearly_between_patch_centres():
    logits = torch.tensor([[[0.0], [4.0], [8.0], [12.0]]])
    upsampled = upsample_logits(logits, 4)[0, 0]
    # A patch has two pixels, so the centres lie between pixels 0 and 1, and between 2 and 3.
    assert upsampled[0].tolist() == [0, 1, 3, 4] and upsampled[:, 0].tolist() == [0, 2, 6, 8]
    assert upsampled[1, 1] == 0.75 * (0.75 * 0 + 0.25 * 4) + 0.25 * (0.75 * 8 + 0.25 * 12)


def test_logits_do_not_change_if_there_are_as_many_pixels_as_patches():
    logits = torch.randn(3, 16, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(upsample_logits(logits, 4), logits.transpose(1, 2).unflatten(2, (4, 4)))


def test_the_loss_is_the_mean_over_the_counted_pixels_of_each_image():
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.8, 0.2], [0.1, 0.9], [0.6, 0.4]]]))
    mask = torch.tensor([[[0, 1], [255, 0]]], dtype=torch.uint8)
    expected = -(np.log(0.5) + np.log(0.2) + np.log(0.6)) / 3
    assert float(pixel_loss(logits, mask, 255)) == pytest.approx(expected)
    # The loss is summed over images, and an image whose pixels are all ignored contributes 0.
    repeated, ignored = logits.repeat(2, 1, 1).requires_grad_(), torch.full_like(mask, 255)
    loss = pixel_loss(repeated, torch.cat([mask, ignored]), 255)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected)
    assert repeated.grad is not None and repeated.grad[0].any() and not repeated.grad[1].any()


def test_classes_of_a_batch_are_those_of_single_images():
    logits = torch.randn(9, 16, 5, generator=torch.Generator().manual_seed(0))
    single = [upsample_logits(image[None], 16).argmax(1) for image in logits]
    assert torch.equal(classify_pixels(logits, 16), torch.cat(single))


def test_colours_distinguish_classes_and_ignored_pixels_are_black():
    colours = colourise(np.arange(256, dtype=np.uint8)[None, None], ignore_index=255)[0, 0]
    assert len(np.unique(colours, axis=0)) > 250 and not colours[255].any() and colours[:255].any(axis=1).all()
    distance = np.abs(colours[:20, None].astype(int) - colours[None, :20]).sum(-1) + 1000 * np.eye(20, dtype=int)
    assert distance.min() > 20


def test_the_legend_names_the_classes_that_the_figure_shows():
    mask = np.array([[[0, 2], [255, 2]]], np.uint8)
    predicted = [np.array([[[0, 0], [4, 2]]])]
    legend = make_legend(mask, predicted, 255)
    assert list(legend) == ["class 0", "class 2", "class 4", "ignored"]
    assert [list(legend[f"class {number}"]) for number in (0, 2)] == colourise(mask)[0, 0].tolist()
    assert legend["ignored"] == (0, 0, 0) and "ignored" not in make_legend(mask, predicted, 7)


@pytest.mark.parametrize("arms", ["head,untrained_head", pytest.param(ARMS, marks=pytest.mark.slow)])
def test_variants_learn_the_maps_and_are_reported_with_their_controls(rank_info, run_folder, arms):
    names = arms.split(",")
    name = f"{len(names)}_arms"
    config = SegmentConfig(run=run_folder, name=name, arms=arms, **finetune_settings(epochs=8.0), num_shown=3)
    result = evaluate_segment(config)
    assert [(row.subject, row.metric) for row in result.rows] == [
        (name, metric) for metric in ("mean_iou", "pixel_accuracy") for name in names
    ]
    rows = {name: result.row(name, "mean_iou") for name in names}
    assert all(row.low <= row.value <= row.high and row.num_samples == 18 for row in rows.values())
    # The majority baseline predicts one class of four, which has a quarter of the pixels or a little more.
    assert all(0.05 < row.chance < 0.12 and row.value > 0.7 for row in rows.values())
    assert rows["head"].control_name == "untrained_head" and rows["head"].control == rows["untrained_head"].value
    assert rows["head"].num_tuned == 33 * 4 and result.details["num_classes"] == 4
    class_iou = result.details["iou_of_each_class"]
    assert all(np.mean(class_iou[name]) == pytest.approx(row.value) for name, row in rows.items())
    if arms == ARMS:
        control, gain = rows["random_predictor"], result.details["gain_of_pretraining"]
        assert rows["predictor"].control_name == "random_predictor" and rows["predictor"].control == control.value
        assert 33 * 4 < rows["predictor"].num_tuned < rows["encoder"].num_tuned
        assert gain["mean_iou"] == rows["predictor"].value - control.value
        assert gain["low"] <= gain["mean_iou"] <= gain["high"]
    folder = Path(run_folder) / "evaluations"
    assert read_result(folder / f"segment_{name}.json").rows == result.rows
    with Image.open(folder / f"segment_{name}.png") as sheet:
        # The figure has 3 columns, and rows for image, map and each variant.
        assert sheet.height / sheet.width > 0.25 * (2 + len(names))
    # Equal durations show that no variant was trained again.
    assert evaluate_segment(config).rows == result.rows


def test_the_figure_shows_images_with_several_classes(rank_info, run_folder, tmp_path):
    content = []
    for number in range(10):
        # Images have two classes; images 3 and 8 have four, and image 5 has one pixel of a third class.
        mask = np.repeat(np.arange(4 if number in (3, 8) else 2, dtype=np.uint8), 10 if number in (3, 8) else 20)
        mask = np.tile(mask, (40, 1))
        mask[0, 0] = 2 if number == 5 else 0
        content += [(f"{number}.jpg", encode(COLOURS[mask])), (f"{number}.seg.png", encode(mask, "PNG"))]
    write_tar(tmp_path / "val.tar", content)
    data = EvalDataConfig(val=str(tmp_path / "val.tar"))
    config = SegmentConfig(run=run_folder, data=data, num_shown=3, **finetune_settings())
    segmentation = open_segmentation(config, rank_info)
    assert choose_figure_samples(segmentation).tolist() == [0, 3, 8]


def test_the_figure_shows_images_with_different_classes(rank_info, run_folder, tmp_path):
    content = []
    # Three images have classes 0 and 1, later ones have 2 and 3.
    for number, first in enumerate((0, 0, 0, 2, 2)):
        mask = np.tile(np.repeat(np.arange(first, first + 2, dtype=np.uint8), 20), (40, 1))
        content += [(f"{number}.jpg", encode(COLOURS[mask])), (f"{number}.seg.png", encode(mask, "PNG"))]
    write_tar(tmp_path / "val.tar", content)
    data = EvalDataConfig(val=str(tmp_path / "val.tar"))
    config = SegmentConfig(run=run_folder, data=data, num_shown=2, **finetune_settings())
    assert choose_figure_samples(open_segmentation(config, rank_info)).tolist() == [0, 3]


def test_micro_batches_do_not_change_the_result(rank_info, run_folder):
    values = []
    for name, settings in (("full", {}), ("split", {"micro_batch_size": 2})):
        config = SegmentConfig(run=run_folder, name=name, arms="head", **finetune_settings(epochs=1.0, **settings))
        values.append(evaluate_segment(config).value("head", "mean_iou"))
    assert values[0] == pytest.approx(values[1], abs=2e-3)


def test_training_changes_all_networks_of_a_variant_and_no_frozen_ones(rank_info, run_folder):
    segmentation = open_segmentation(
        SegmentConfig(run=run_folder, name="moves", **finetune_settings(epochs=0.5)), rank_info
    )
    arms = {"predictor": {"predictor"}, "encoder": {"encoder"}, "head": set(), "end_to_end": {"predictor", "encoder"}}
    for name, networks in arms.items():
        student = build_networks(segmentation.model, segmentation.config, rank_info, name)
        make_head = partial(PatchHead, num_classes=segmentation.num_classes)
        variant = build_variant(name, student, segmentation.context, make_head)
        before = {key: value.clone() for key, value in variant.module.named_parameters()}
        with segmentation.read_masks(segmentation.context.train) as masks:
            train_job(build_segmentation_job(variant, student, segmentation, masks), segmentation.context)
        changed = {key for key, value in variant.module.named_parameters() if not torch.equal(value, before[key])}
        assert {key.split(".")[0] for key in before} == networks | {"head"}
        # The mixer's columns for the null action have no gradient, but the weight that holds them changes.
        assert before.keys() == changed, before.keys() - changed


REFUSED = {
    "mixup": "augment.mixup must be off where each pixel has a label",
    "cutmix": "augment.cutmix must be off",
    "erasing": "augment.erasing must be off",
    "label_smoothing": "augment.label_smoothing must be off",
    "rand_augment": "augment.rand_augment must be off",
    "operations": "augment.operations must be left unset: RandAugment is off here",
}


@pytest.mark.parametrize("name", REFUSED)
def test_augmentation_that_does_not_apply_to_maps_is_refused(name):
    values = {"rand_augment": True, "operations": RandAugmentConfig(magnitude=3)}
    with pytest.raises(ValueError, match=REFUSED[name]):
        DenseAugmentConfig(**{name: values.get(name, 0.5)})


def test_invalid_settings_are_refused_with_the_accepted_values():
    for settings, message in (
        (
            {"arms": "head,linear"},
            "arms must name some of head, untrained_head, predictor, random_predictor, encoder, end_to_end once each",
        ),
        ({"arms": "head,head"}, "once each"),
        ({"ignore_index": 256}, "ignore_index must be between 0 and 255"),
        ({"num_classes": 0}, "num_classes must be between 1 and 256, or unset"),
        ({"num_shown": 0}, "num_shown must be at least 1"),
        (
            {"data": EvalDataConfig(label="json.right")},
            "data.label must be left unset: the labels are segmentation maps",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            SegmentConfig(run="x", **settings)


def test_shards_without_maps_are_refused_before_training(rank_info, run_folder, tmp_path):
    bare = write_painted_shard(tmp_path / "bare.tar", 6, seed=3, has_masks=False)
    for data in ({"train": bare}, {"val": bare}):
        config = SegmentConfig(run=run_folder, data=EvalDataConfig(**data), name="bare", **finetune_settings())
        with pytest.raises(ShardError, match=r"no segmentation map \(6 of 6 samples .*\); add it as \.seg\.png"):
            evaluate_segment(config)
        # Also if the number of classes is set, so that the maps need not be read to count them.
        with pytest.raises(ShardError, match="no segmentation map"):
            evaluate_segment(replace(config, num_classes=4))
    assert not (Path(run_folder) / "evaluations" / "segment_bare").exists()


def test_a_class_beyond_num_classes_is_reported_in_training(rank_info, run_folder):
    config = SegmentConfig(run=run_folder, name="few", arms="head", num_classes=3, **finetune_settings())
    with pytest.raises(ShardError, match="contains class 3, but num_classes is 3"):
        evaluate_segment(config)


def test_a_run_without_predictor_supports_the_other_variants(rank_info, tmp_path):
    distributed.stop()
    folder = pretrain_on_painted_shards(tmp_path, num_train=16, num_val=4, depth=0)
    distributed.start("cpu")
    with pytest.raises(ValueError, match=r"run must have a predictor, not the identity \(model\.predictor\.depth=0\)"):
        evaluate_segment(SegmentConfig(run=folder, **finetune_settings()))
    result = evaluate_segment(SegmentConfig(run=folder, arms="encoder", **finetune_settings(epochs=0.5)))
    assert [row.subject for row in result.rows] == ["encoder", "encoder"]
    assert json.loads((Path(folder) / "evaluations" / "segment.json").read_text())["task"] == "segment"
