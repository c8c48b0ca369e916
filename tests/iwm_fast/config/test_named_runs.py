"""Named runs have published sizes and settings, and the figures in their headers are correct."""

import re
from pathlib import Path

import pytest
import torch

import iwm_fast
from iwm_fast.config.loading import load_config
from iwm_fast.config.run import OptimConfig
from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models.student import build_student
from iwm_fast.monitoring.flops import training_flops
from iwm_fast.pipelines.config import MaskConfig
from iwm_fast.pipelines.transforms.composition import ViewConfig

CONFIGS = Path(iwm_fast.__file__).parent / "configs"

# Millions of parameters of the encoder and of the predictor without its conditioning.
PUBLISHED = {
    "vit_b16_inv": (85.65, 21.9),
    "vit_b16_equi": (85.65, 32.5),
    "vit_l16_equi": (303.1, 114.5),
    "vit_s16": (21.6, 5.5),
    "ijepa_b16": (85.65, 21.9),
}


def test_every_config_except_the_demo_and_labs_has_a_published_size():
    unpublished = {"demo", "lab_cpu", "lab_cpu_worth_keeping", "lab_actions", "lab_objects", "lab_gpu"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*PUBLISHED, *unpublished}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_named_run_has_its_published_size(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    with torch.device("meta"):
        student = build_student(config, REFERENCE)
    encoder = student.encoder.parameters()
    predictor = [value for key, value in student.predictor.named_parameters() if not key.startswith("mixer.")]
    sizes = [sum(value.numel() for value in parameters) / 1e6 for parameters in (encoder, predictor)]
    assert sizes == pytest.approx(PUBLISHED[name], rel=5e-3)
    is_conditioned = config.model.predictor.conditioning == "feature"
    assert is_conditioned == (student.predictor.mixer is not None) == (name != "ijepa_b16")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_named_run_follows_the_papers_schedule(name):
    assert load_config(CONFIGS / f"{name}.yaml").optim == OptimConfig()
    optim = OptimConfig()
    assert (optim.epochs, optim.warmup_epochs, optim.global_batch_size, optim.schedule_stretch) == (300, 40, 2048, 1.25)
    assert (optim.lr_start, optim.lr, optim.lr_end) == (2e-4, 1e-3, 1e-6)
    assert (optim.weight_decay, optim.teacher_momentum, optim.betas) == ((0.04, 0.4), (0.996, 1.0), (0.9, 0.999))


@pytest.mark.parametrize("name", PUBLISHED)
def test_views_and_masks_are_the_papers_except_for_the_baseline(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    if name != "ijepa_b16":
        assert (config.views, config.mask) == (ViewConfig(), MaskConfig())
        return
    views = config.views
    probabilities = [getattr(views, kind).probability for kind in ("flip", "jitter", "grayscale", "blur", "solarize")]
    assert probabilities == [0.0] * 5 and views.crop.scale == (0.3, 1.0) and not views.has_source_geometry
    assert config.mask == MaskConfig(context_scale=(0.85, 1.0))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_flops_and_hours_in_the_header_are_correct(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    flops, hours = map(int, re.search(r"(\d+) GFLOP per image, (\d+) GPU-hours", text).groups())
    computed = training_flops(load_config(CONFIGS / f"{name}.yaml")).total
    assert flops == round(computed / 1e9)
    # 300 epochs of ImageNet-1k at 40 % of the peak of an H100.
    assert hours == round(300 * 1_281_167 * computed / (0.4 * 989e12) / 3600)
