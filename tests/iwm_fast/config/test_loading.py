import dataclasses
from pathlib import Path

import pytest

import iwm_fast
from iwm_fast.config.batch_size import accumulation_steps
from iwm_fast.config.finetuning import FinetuneConfig, TuneConfig
from iwm_fast.config.fingerprint import fingerprint, fingerprint_digest
from iwm_fast.config.loading import build, iter_settings, load_config, save_config
from iwm_fast.config.run import OptimConfig, RunConfig

CONFIGS = Path(iwm_fast.__file__).parent / "configs"
NAMED_RUNS = sorted(set(CONFIGS.glob("*.yaml")) - set(CONFIGS.glob("lab_*.yaml")))


@pytest.fixture
def run_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {train: [a.tar, 'b-{000..001}.tar']}\noptim: {lr: 2e-3}\n")
    return path


def test_overrides_take_precedence_over_yaml_and_yaml_over_defaults(run_yaml):
    config = load_config(run_yaml, ["optim.lr=0.1", "views.crop.scale=[0.2, 1]", "optim.clip_norm=null"])
    assert config.data.train == "a.tar::b-{000..001}.tar"
    assert (config.optim.lr, config.views.crop.scale, config.optim.clip_norm) == (0.1, (0.2, 1.0), None)
    assert load_config(run_yaml).optim.lr == 2e-3 and config.optim.epochs == RunConfig().optim.epochs


def test_a_saved_configuration_is_read_back_unchanged(run_yaml, tmp_path):
    config = load_config(run_yaml, ["data.train=/a.tar::s3://b/{0..1}.tar", "data.val=/odd ${name}{a,b}.tar", "seed=7"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_shard_paths_of_a_saved_configuration_are_absolute(run_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(run_yaml, ["data.val=val"])
    save_config(config, tmp_path / "saved.yaml")
    saved = load_config(tmp_path / "saved.yaml").data
    assert (saved.train, saved.val) == (f"{tmp_path}/a.tar::{tmp_path}/b-{{000..001}}.tar", f"{tmp_path}/val")
    assert fingerprint(load_config(tmp_path / "saved.yaml"), "x") == fingerprint(config, "x")


@pytest.mark.parametrize(
    ("overrides", "warmup_epochs"),
    [
        ([], 40.0),
        (["optim.epochs=4"], 4 * 40 / 300),
        (["optim.epochs=4", "optim.warmup_epochs=null"], 4 * 40 / 300),
        (["optim.epochs=4", "optim.warmup_epochs=0"], 0.0),
        (["optim.epochs=600", "optim.warmup_epochs=40"], 40.0),
    ],
)
def test_an_unset_warmup_is_the_recipes_share_of_the_epochs(run_yaml, tmp_path, overrides, warmup_epochs):
    config = load_config(run_yaml, overrides)
    assert config.optim.warmup_epochs == warmup_epochs
    assert config.optim == OptimConfig(epochs=config.optim.epochs, warmup_epochs=warmup_epochs, lr=2e-3)
    assert fingerprint(config, "x")["optim.warmup_epochs"] == warmup_epochs
    save_config(config, tmp_path / "saved.yaml")
    assert f"  warmup_epochs: {warmup_epochs}\n" in (tmp_path / "saved.yaml").read_text()


def test_the_warmup_of_finetuning_scales_with_its_epochs():
    assert build(FinetuneConfig, {}).tune.warmup_epochs == TuneConfig().warmup_epochs == 5.0
    assert (
        build(FinetuneConfig, {}, ["tune.epochs=2"]).tune.warmup_epochs == TuneConfig(epochs=2.0).warmup_epochs == 0.1
    )
    with pytest.raises(ValueError, match=r"tune.warmup_epochs must lie in \[0, epochs = 2\), got 5"):
        build(FinetuneConfig, {}, ["tune.epochs=2", "tune.warmup_epochs=5"])


def test_a_group_whose_settings_are_commented_out_keeps_its_defaults(tmp_path):
    (tmp_path / "run.yaml").write_text("optim:\n  # lr: 1\nmodel:\n  encoder:\n")
    config = load_config(tmp_path / "run.yaml", ["model.predictor.depth=3", "optim.epochs=4"])
    assert (config.optim.lr, config.optim.epochs, config.model.encoder.dim) == (1e-3, 4.0, 768)


@pytest.mark.parametrize("text", ["{a,b}/x.tar", "123", "null", "[x]", "a=b", "${HOME}/x"])
def test_a_path_is_taken_verbatim(run_yaml, text):
    assert load_config(run_yaml, [f"data.train={text}"]).data.train == text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optm.lr=1", "unknown setting 'optm.lr'; did you mean 'optim.lr'?"),
        ("views.sise=1", "did you mean 'views.size'?"),
        ("optim.lr=fast", "optim.lr must be a finite number, got 'fast'"),
        (
            "model.predictor.conditioning=film",
            "model.predictor.conditioning must be one of feature, sequence, none, got 'film'",
        ),
        ("views.size=225", "views.size must be a multiple of model.encoder.patch_size = 16, got 225"),
        ("model.encoder.num_heads=7", "model.encoder.num_heads must divide model.encoder.dim = 768, got 7"),
        ("optim.warmup_epochs=400", r"optim.warmup_epochs must lie in \[0, epochs = 300\), got 400"),
        ("optim", "override must have the form group.key=value, got 'optim'"),
        ("runtime.prefetch=0", "runtime.prefetch must be at least 1, got 0"),
    ],
)
def test_an_invalid_setting_is_refused_with_a_remedy(run_yaml, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(run_yaml, [override])


def test_a_setting_without_effect_is_refused(run_yaml):
    with pytest.raises(ValueError, match=r"be unset with runtime\.engine=plain, where they have no effect"):
        load_config(run_yaml, ["runtime.engine=plain", "runtime.zero_stage=2"])


def test_an_unknown_setting_in_yaml_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("optim: {learning_rate: 1}\n")
    with pytest.raises(ValueError, match=r"unknown setting 'optim.learning_rate'"):
        load_config(tmp_path / "run.yaml")


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*absent.yaml"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"broken.yaml is not valid YAML"):
        load_config(tmp_path / "broken.yaml")


def replaced(config: RunConfig, name: str, value: object) -> RunConfig:
    """Return the configuration with a setting, given by its dotted name, replaced."""
    *groups, leaf = name.split(".")
    parents = [config]
    for group in groups:
        parents.append(getattr(parents[-1], group))
    for group, parent in zip([leaf, *reversed(groups)], reversed(parents), strict=True):
        value = dataclasses.replace(parent, **{group: value})
    return value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("runtime.loader", "torch"),
        ("runtime.engine", "plain"),
        ("runtime.zero_stage", 2),
        ("runtime.micro_batch_size", 8),
        ("runtime.reader_threads", 1),
        ("runtime.device", "cpu"),
        ("output.folder", "elsewhere"),
        ("output.log_every", 1),
        ("data.train", "moved.tar"),
        ("data.val", "other.tar"),
    ],
)
def test_settings_that_do_not_change_the_result_keep_the_fingerprint(name, value):
    assert fingerprint_digest(fingerprint(replaced(RunConfig(), name, value), "x")) == fingerprint_digest(
        fingerprint(RunConfig(), "x")
    )


def test_every_other_setting_is_in_the_fingerprint():
    flat = fingerprint(RunConfig(), "content")
    groups = ("seed", "init_from", "data.", "views.", "mask.", "model.", "objective.", "optim.")
    expected = {name for name, *_ in iter_settings(RunConfig) if name.startswith(groups)}
    expected -= {"data.val", "data.restart_epoch"}
    assert set(flat) == expected and flat["data.train"] == "content"
    for name, value in (("optim.lr", 0.5), ("init_from", "runs/other"), ("data.max_samples", 8)):
        assert fingerprint_digest(fingerprint(replaced(RunConfig(), name, value), "x")) != fingerprint_digest(
            fingerprint(RunConfig(), "x")
        )


def test_accumulation_is_derived_and_a_remainder_refused():
    config = replaced(RunConfig(), "optim.global_batch_size", 64)
    assert accumulation_steps(config, 2) == (32, 1)
    assert accumulation_steps(replaced(config, "runtime.micro_batch_size", 8), 2) == (8, 4)
    with pytest.raises(ValueError, match=r"optim\.global_batch_size must be a multiple of the 3 ranks, got 64"):
        accumulation_steps(config, 3)
    equation = r"runtime.micro_batch_size must satisfy .* \* 2 ranks \* accumulation = .* = 64, got 24"
    with pytest.raises(ValueError, match=equation):
        accumulation_steps(replaced(config, "runtime.micro_batch_size", 24), 2)


def test_build_refuses_a_group_given_as_a_value():
    with pytest.raises(ValueError, match="optim must hold settings as `key: value`, got 3"):
        build(RunConfig, {"optim": 3})


@pytest.mark.parametrize("path", NAMED_RUNS, ids=lambda path: path.stem)
def test_a_named_run_is_valid_and_its_header_has_the_command(path):
    load_config(path)
    header = path.read_text().splitlines()[:12]
    assert any(f"iwm_fast.train {path.stem}" in line for line in header)
    assert any("machine" in line.lower() for line in header)
