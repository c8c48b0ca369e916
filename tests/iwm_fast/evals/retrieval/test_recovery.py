"""Recovered parameters and ranks over many images, and their plots."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures.exact_predictor import JITTER, Pair, exact, ignore_action
from fixtures.tar_files import photograph
from iwm_fast.evals.retrieval.bank import draw_bank, encode_bank
from iwm_fast.evals.retrieval.mrr import chance_mrr
from iwm_fast.evals.retrieval.recovery import Recovery, measure_recovery, rank_histogram, recovery_plots
from iwm_fast.evals.retrieval.sweeps import BankedImage
from iwm_fast.rendering.charts import RankHistogram, RecoveryPlot, draw_plot, save_plots


def banked_images(model) -> list[BankedImage]:
    """Return a photograph with colours and one without, with their banks."""
    coffee = torch.from_numpy(photograph("coffee.png")[100:116, 100:116].copy())
    grey = coffee.float().mean(dim=-1, keepdim=True).to(torch.uint8).expand(-1, -1, 3).contiguous()
    images = []
    for sample, pixels in enumerate((coffee, grey)):
        bank = draw_bank(pixels, sample, 12, model=model, strengths="default", seed=0)
        images.append(BankedImage(pixels=pixels, bank=bank, target=encode_bank(model, bank)))
    return images


def test_an_exact_predictor_recovers_every_parameter_and_ranks_first(model):
    images = banked_images(model)
    known = exact(model, *(Pair(source=image.pixels, clean=image.pixels) for image in images))
    recovery = measure_recovery(images[:1], known, "default")
    assert recovery.entries == JITTER and recovery.ranks.shape == (2, 1, 12) and (recovery.ranks == 1).all()
    asked = [images[0].bank.parameters[name][0] for name in JITTER]
    np.testing.assert_array_equal(recovery.asked, [asked])
    np.testing.assert_array_equal(recovery.recovered, [[asked], [asked]])
    brightness = images[0].bank.parameters["brightness"]
    assert recovery.mean_candidate_error[0, 0] == pytest.approx(np.abs(brightness - brightness[0]).mean())


def test_a_predictor_that_ignores_the_action_recovers_one_candidate_and_ranks_at_chance(model):
    recovery = measure_recovery(banked_images(model), ignore_action(model), "default")
    assert recovery.has_colour.tolist() == [True, False]
    assert (1 / recovery.ranks).mean(axis=2) == pytest.approx(np.full((2, 2), chance_mrr(12)), abs=1e-6)
    assert "by chance 0.259" in rank_histogram(recovery).note


def known_recovery() -> Recovery:
    """Return two images, the second without colours; the first readout is off by 0.1, the second by 0.2."""
    asked = np.array([[1.2, 0.8, 1.1, 0.05], [0.7, 1.3, 0.9, -0.05]], np.float32)
    ranks = np.array([[[1, 1, 2, 4], [1, 1, 1, 1]], [[4, 4, 4, 4], [2, 2, 2, 2]]], np.float32)
    return Recovery(
        entries=JITTER, asked=asked, recovered=np.stack([asked + 0.1, asked - 0.2]), ranks=ranks,
        mean_candidate_error=np.full((2, 4), 0.3, np.float32), has_colour=np.array([True, False]),
    )  # fmt: skip


def test_plots_state_errors_beside_no_change_and_leave_out_photographs_without_colour(model):
    brightness, contrast, saturation, hue = recovery_plots(known_recovery(), model.config.views, "default")
    errors = "2 images; mean error: 0.100 by absolute readout; 0.200 by difference readout; "
    assert brightness.note == errors + "no change 0.250; any version 0.300"
    assert brightness.no_change == 1 and brightness.limits == pytest.approx((0.6, 1.4))
    assert len(contrast.asked) == 2 and [len(plot.asked) for plot in (saturation, hue)] == [1, 1]
    assert hue.note.startswith("1 images with colours; ") and hue.no_change == 0
    grey = replace(known_recovery(), has_colour=np.array([False, False]))
    assert [plot.title for plot in recovery_plots(grey, model.config.views, "default")] == ["Brightness", "Contrast"]


def test_the_histogram_has_all_queries_of_each_readout():
    plot = rank_histogram(known_recovery())
    assert plot.num_candidates == 4 and plot.ranks["difference"].tolist() == [4, 4, 4, 4, 2, 2, 2, 2]
    assert "2 images, each of 4 versions asked for" in plot.note
    assert "0.844 by absolute readout; 0.375 by difference readout; by chance 0.521" in plot.note


@pytest.mark.parametrize("num_candidates", [4, 256, 100_000])
def test_plots_are_drawn_with_axes_names_and_series(num_candidates, tmp_path):
    values = np.linspace(0, 1, 5, dtype=np.float32)
    recovery = RecoveryPlot(title="Hue", note="5 images", limits=(0.0, 1.0), no_change=0.0, x_label="asked for",
                            asked=values, recovered={"absolute": values, "difference": values})  # fmt: skip
    ranks = np.array([1, 1.5, num_candidates], np.float32)
    histogram = RankHistogram(title="Rank", note="x", num_candidates=num_candidates, ranks={"absolute": ranks})
    for plot, texts in ((recovery, ("asked for", "recovered", "no change", "difference")),
                        (histogram, (f"rank among {num_candidates}", "share of queries", "by chance"))):  # fmt: skip
        svg = draw_plot(plot)
        assert svg.startswith("<svg") and all(text in svg for text in texts) and "#0102" not in svg
    save_plots(tmp_path / "plots.png", [recovery, histogram], "title")
    with Image.open(tmp_path / "plots.png") as opened:
        assert opened.format == "PNG"
