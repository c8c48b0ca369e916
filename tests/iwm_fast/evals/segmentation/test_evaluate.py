"""Segmentation: scores of patches become classes of pixels, and arms learn what the maps say."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures.painted_shards import COLOURS, painted, painted_run, tuning
from fixtures.tar_files import encode, write_tar
from iwm_fast.config.evaluation import EvalData
from iwm_fast.config.finetuning import DenseAugmentConfig, SegmentConfig
from iwm_fast.evals.results import read_result
from iwm_fast.evals.segmentation.evaluate import evaluate_segment
from iwm_fast.evals.segmentation.figure import paint
from iwm_fast.evals.segmentation.network import pixel_classes, pixel_loss, pixel_scores
from iwm_fast.models.heads import PatchHead
from iwm_fast.pipelines.config import RandAugmentConfig
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.runtime import distributed

ARMS = "head,untrained_head,predictor,random_predictor,encoder"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return painted_run(tmp_path_factory.mktemp("segment"))


@pytest.fixture
def rank_info():
    yield distributed.start("cpu")
    distributed.stop()


def test_scores_stand_at_patches_centres_and_change_linearly_between_them__by_hand():
    scores = torch.tensor([[[0.0], [4.0], [8.0], [12.0]]])
    found = pixel_scores(scores, 4)[0, 0]
    # two pixels a patch: the centres lie between pixels 0 and 1, and 2 and 3
    assert found[0].tolist() == [0, 1, 3, 4] and found[:, 0].tolist() == [0, 2, 6, 8]
    assert found[1, 1] == 0.75 * (0.75 * 0 + 0.25 * 4) + 0.25 * (0.75 * 8 + 0.25 * 12)


def test_as_many_pixels_as_patches_have_the_patches_scores():
    scores = torch.randn(3, 16, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pixel_scores(scores, 4), scores.transpose(1, 2).unflatten(2, (4, 4)))


def test_the_loss_is_the_mean_over_an_images_pixels_that_count__by_hand():
    scores = torch.log(torch.tensor([[[0.5, 0.5], [0.8, 0.2], [0.1, 0.9], [0.6, 0.4]]]))
    mask = torch.tensor([[[0, 1], [255, 0]]], dtype=torch.uint8)
    wanted = -(np.log(0.5) + np.log(0.2) + np.log(0.6)) / 3
    assert float(pixel_loss(scores, mask, 255)) == pytest.approx(wanted)
    # the sum over images, and one in which nothing counts has no share
    twice, nothing = scores.repeat(2, 1, 1).requires_grad_(), torch.full_like(mask, 255)
    loss = pixel_loss(twice, torch.cat([mask, nothing]), 255)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(wanted)
    assert twice.grad is not None and twice.grad[0].any() and not twice.grad[1].any()


def test_classes_of_many_images_are_those_of_each():
    scores = torch.randn(9, 16, 5, generator=torch.Generator().manual_seed(0))
    alone = [pixel_scores(one[None], 16).argmax(1) for one in scores]
    assert torch.equal(pixel_classes(scores, 16), torch.cat(alone))


def test_colours_tell_classes_apart_and_what_is_ignored_is_black():
    colours = paint(np.arange(256, dtype=np.uint8)[None, None], ignore_index=255)[0, 0]
    assert len(np.unique(colours, axis=0)) > 250 and not colours[255].any() and colours[:255].any(axis=1).all()
    near = np.abs(colours[:20, None].astype(int) - colours[None, :20]).sum(-1) + 1000 * np.eye(20, dtype=int)
    assert near.min() > 20


def test_arms_learn_what_the_maps_say_beside_their_controls(rank_info, run_folder):
    config = SegmentConfig(run=run_folder, **tuning(epochs=8.0), num_shown=3)
    result = evaluate_segment(config)
    assert [(row.subject, row.metric) for row in result.rows] == [
        (arm, metric) for metric in ("mean_iou", "pixel_accuracy") for arm in ARMS.split(",")
    ]
    rows = {arm: result.row(arm, "mean_iou") for arm in ARMS.split(",")}
    assert all(row.low <= row.value <= row.high and row.num_samples == 18 for row in rows.values())
    # a guess knows one class of four, a quarter of the pixels or somewhat more
    assert all(0.05 < row.chance < 0.12 and row.value > 0.7 for row in rows.values())
    for arm, control in (("predictor", "random_predictor"), ("head", "untrained_head")):
        assert rows[arm].control_name == control and rows[arm].control == rows[control].value
    assert rows["head"].num_tuned == 33 * 4 < rows["predictor"].num_tuned < rows["encoder"].num_tuned
    of_classes = result.details["iou_of_each_class"]
    assert all(np.mean(of_classes[arm]) == pytest.approx(row.value) for arm, row in rows.items())
    gain = result.details["gain_of_pretraining"]
    assert gain["mean_iou"] == rows["predictor"].value - rows["random_predictor"].value
    assert result.details["num_classes"] == 4 and gain["low"] <= gain["mean_iou"] <= gain["high"]
    folder = Path(run_folder) / "evaluations"
    assert read_result(folder / "segment.json").rows == result.rows
    with Image.open(folder / "segment.png") as sheet:
        # 3 images, and rows for image, map and five arms
        assert sheet.height > 1.8 * sheet.width
    # nothing is trained again: the same times
    assert evaluate_segment(config).rows == result.rows


def test_the_picture_shows_images_of_several_classes(rank_info, run_folder, tmp_path):
    from iwm_fast.evals.segmentation.evaluate import choose_shown, open_bench

    content = []
    for number in range(10):
        # two classes, four in images 3 and 8, and a pixel of a third in image 5
        mask = np.repeat(np.arange(4 if number in (3, 8) else 2, dtype=np.uint8), 10 if number in (3, 8) else 20)
        mask = np.tile(mask, (40, 1))
        mask[0, 0] = 2 if number == 5 else 0
        content += [(f"{number}.jpg", encode(COLOURS[mask])), (f"{number}.seg.png", encode(mask, "PNG"))]
    write_tar(tmp_path / "val.tar", content)
    data = EvalData(val=str(tmp_path / "val.tar"))
    bench = open_bench(SegmentConfig(run=run_folder, data=data, num_shown=3, **tuning()), rank_info)
    assert choose_shown(bench).tolist() == [0, 3, 8]


def test_micro_batches_do_not_change_the_outcome(rank_info, run_folder):
    values = []
    for name, settings in (("whole", {}), ("parts", {"micro_batch_size": 2})):
        config = SegmentConfig(run=run_folder, name=name, arms="head", **tuning(epochs=1.0, **settings))
        values.append(evaluate_segment(config).value("head", "mean_iou"))
    assert values[0] == pytest.approx(values[1], abs=2e-3)


def test_a_frozen_encoder_stays_as_it_is_and_every_trained_part_moves(rank_info, run_folder):
    from iwm_fast.evals.finetuning.networks import networks
    from iwm_fast.evals.finetuning.run import tune
    from iwm_fast.evals.finetuning.variants import build_arm
    from iwm_fast.evals.segmentation.evaluate import open_bench, segmentation_job

    bench = open_bench(SegmentConfig(run=run_folder, name="moves", **tuning(epochs=0.5)), rank_info)
    for name, parts in (("predictor", {"predictor", "head"}), ("encoder", {"encoder", "head"}), ("head", {"head"})):
        student = networks(bench.model, bench.config, rank_info, name)
        arm = build_arm(name, student, bench.context, partial(PatchHead, num_classes=bench.num_classes))
        before = {key: value.clone() for key, value in arm.module.named_parameters()}
        with bench.masks(bench.context.train) as masks:
            tune(segmentation_job(arm, student, bench, masks), bench.context)
        moved = {key for key, value in arm.module.named_parameters() if not torch.equal(value, before[key])}
        assert {key.split(".")[0] for key in before} == parts
        # the null action's columns of the mixer see no gradient, but their layer does
        assert before.keys() == moved, before.keys() - moved


REFUSED = {
    "mixup": "augment.mixup must be off where each pixel has a label",
    "cutmix": "augment.cutmix must be off",
    "erasing": "augment.erasing must be off",
    "label_smoothing": "augment.label_smoothing must be off",
    "rand_augment": "augment.rand_augment must be off",
    "operations": "augment.operations must be left unset: RandAugment is off here",
}


@pytest.mark.parametrize("name", REFUSED)
def test_changes_that_labels_do_not_follow_are_refused(name):
    values = {"rand_augment": True, "operations": RandAugmentConfig(magnitude=3)}
    with pytest.raises(ValueError, match=REFUSED[name]):
        DenseAugmentConfig(**{name: values.get(name, 0.5)})


def test_wrong_settings_are_refused_with_what_is_accepted():
    for settings, message in (
        ({"arms": "head,linear"}, "arms must name some of head, untrained_head, predictor, random_predictor, encoder"),
        ({"arms": "head,head"}, "once each"),
        ({"ignore_index": 256}, "ignore_index must be between 0 and 255"),
        ({"num_classes": 0}, "num_classes must be between 1 and 256, or unset"),
        ({"num_shown": 0}, "num_shown must be at least 1"),
        ({"data": EvalData(label="json.right")}, "data.label must be left unset: the labels are segmentation maps"),
    ):
        with pytest.raises(ValueError, match=message):
            SegmentConfig(run="x", **settings)


def test_shards_without_maps_are_refused_before_anything_is_trained(rank_info, run_folder, tmp_path):
    bare = painted(tmp_path / "bare.tar", 6, seed=3, has_masks=False)
    for given in ({"train": bare}, {"val": bare}):
        config = SegmentConfig(run=run_folder, data=EvalData(**given), name="bare", **tuning())
        with pytest.raises(ShardError, match=r"no segmentation map \(6 of 6 samples .*\); add it as \.seg\.png"):
            evaluate_segment(config)
        # also where maps need not be read to count classes
        with pytest.raises(ShardError, match="no segmentation map"):
            evaluate_segment(replace(config, num_classes=4))
    assert not (Path(run_folder) / "evaluations" / "segment_bare").exists()


def test_too_few_classes_are_noticed_in_training(rank_info, run_folder):
    config = SegmentConfig(run=run_folder, name="few", arms="head", num_classes=3, **tuning())
    with pytest.raises(ShardError, match=r"shows class 3, and there are classes 0 \.\. 2"):
        evaluate_segment(config)


def test_without_a_predictor_the_other_arms_are_still_there(rank_info, tmp_path):
    distributed.stop()
    folder = painted_run(tmp_path, num_train=16, num_val=4, depth=0)
    distributed.start("cpu")
    with pytest.raises(ValueError, match=r"run must have a predictor, .* got 'model\.predictor\.depth=0'"):
        evaluate_segment(SegmentConfig(run=folder, **tuning()))
    result = evaluate_segment(SegmentConfig(run=folder, arms="encoder", **tuning(epochs=0.5)))
    assert [row.subject for row in result.rows] == ["encoder", "encoder"]
    assert json.loads((Path(folder) / "evaluations" / "segment.json").read_text())["task"] == "segment"
