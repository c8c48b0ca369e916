"""Configurations by name, files that are based on others, and files that `iwm init` starts."""

from pathlib import Path

import pytest

from iwm_fast.commands.init_config import list_configs, write_starter
from iwm_fast.config.loading import config_to_dict, load_config
from iwm_fast.config.named_configs import CONFIGS, find_config, named_configs, read_settings


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Return an empty folder, which is the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["vit_s16", "vit_s16.yaml"])
def test_a_name_finds_the_packaged_file_unless_there_is_such_a_file(folder, name):
    assert find_config(name) == CONFIGS / "vit_s16.yaml"
    assert load_config(name, ["seed=3"]).model.encoder.dim == 384
    (folder / name).write_text("seed: 7\n")
    assert load_config(name).seed == 7


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vit_s61", "vit_s16"),
        ("old/configs/vit_s16.yaml", "vit_s16"),
        ("mine", "mine.yaml"),
        ("runs", "runs/config.yaml"),
    ],
)
def test_an_unknown_name_lists_the_known_ones_and_the_nearest(folder, name, hint):
    (folder / "mine.yaml").touch()
    (folder / "runs").mkdir()
    (folder / "runs" / "config.yaml").touch()
    with pytest.raises(FileNotFoundError, match=f"names demo, ijepa_b16, vit_b16_equi, .*; did you mean '{hint}'"):
        load_config(name)


def test_a_file_overrides_the_settings_of_its_base_and_keeps_the_rest(folder):
    (folder / "parent.yaml").write_text(
        "base: vit_s16\noptim: {lr: 2.0e-3, epochs: 4}\nruntime: {deepspeed: {comms_logger: {debug: true}}}\n"
    )
    (folder / "sub").mkdir()
    child = "base: ../parent.yaml\noptim: {lr: 3.0e-3}\nruntime: {deepspeed: {comms_logger: {enabled: true}}}\nviews:\n"
    (folder / "sub" / "child.yaml").write_text(child)
    config, grandparent = load_config("sub/child.yaml", ["seed=5"]), load_config("vit_s16")
    assert (config.optim.lr, config.optim.epochs, config.seed) == (3e-3, 4.0, 5)
    assert config.runtime.deepspeed == {"comms_logger": {"debug": True, "enabled": True}}
    assert (config.model, config.views, config.output) == (grandparent.model, grandparent.views, grandparent.output)
    assert "base" not in config_to_dict(config)


def test_a_file_may_have_the_name_of_its_packaged_base(folder):
    (folder / "vit_s16.yaml").write_text("base: vit_s16\nseed: 3\n")
    assert load_config("vit_s16.yaml").seed == 3 and load_config("vit_s16.yaml").model.encoder.dim == 384


def test_a_base_that_is_absent_circular_or_no_name_is_refused(folder):
    (folder / "a.yaml").write_text("base: b.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"no configuration file 'b.yaml'") as raised:
        load_config("a.yaml")
    assert "a.yaml names it as its base" in raised.value.__notes__[0]
    (folder / "b.yaml").write_text("base: ./a.yaml\n")
    with pytest.raises(ValueError, match=r"base must not lead back .*a.yaml -> .*b.yaml -> .*a.yaml; remove one"):
        load_config("a.yaml")
    (folder / "b.yaml").write_text("base: [vit_s16]\n")
    with pytest.raises(ValueError, match=r"base of b.yaml must be the name or path of a configuration"):
        load_config("a.yaml")


def test_the_list_has_every_run_with_its_first_comment():
    rows = list_configs().splitlines()[: len(named_configs())]
    assert [row.split()[0] for row in rows] == [
        "demo",
        "ijepa_b16",
        "vit_b16_equi",
        "vit_b16_inv",
        "vit_l16_equi",
        "vit_s16",
    ]
    assert rows[-1].endswith("vit_s16       ViT-S/16 with a 12 x 192 predictor on ImageNet-1k, for small budgets.")


def test_a_started_file_equals_its_base_with_and_without_comment_signs(folder):
    path = write_starter("vit_s16", Path("mine.yaml"))
    assert load_config(path) == load_config("vit_s16")
    # Settings are the commented lines that are not part of an explanation.
    lines = path.read_text().splitlines()
    settings = {f"  # {key}:" for key in ("train", "val", "epochs", "folder", "evaluate_every", "micro_batch_size")}
    assert all(sum(line.startswith(start) for line in lines) == 1 for start in settings)
    assert "  # Passes over the training samples; may be a fraction." in lines
    enabled = [line.replace("# ", "", 1) if line.startswith(tuple(settings)) else line for line in lines]
    path.write_text("\n".join(enabled))
    changed = config_to_dict(load_config(path))
    assert changed.pop("data")["train"] == "shards/train-{000000..000099}.tar"
    assert changed["output"].pop("folder") == "runs/mine"
    expected = config_to_dict(load_config("vit_s16"))
    del expected["data"], expected["output"]["folder"]
    assert changed == expected


def test_a_started_file_overwrites_nothing_and_needs_a_known_base(folder):
    (folder / "mine.yaml").write_text("seed: 1\n")
    with pytest.raises(FileExistsError, match=r"'mine.yaml' exists already and is not overwritten; name another file"):
        write_starter("vit_s16", Path("mine.yaml"))
    assert (folder / "mine.yaml").read_text() == "seed: 1\n"
    with pytest.raises(FileNotFoundError, match=r"did you mean 'vit_s16'"):
        write_starter("vit_s17", Path("other.yaml"))
    with pytest.raises(ValueError, match=r"the base must be a name that `iwm configs` lists; .*, got 'mine.yaml'"):
        write_starter("mine.yaml", Path("other.yaml"))
    with pytest.raises(ValueError, match=r"the file to write must end with .yaml, got 'other'"):
        write_starter("vit_s16", Path("other"))
    assert [path.name for path in folder.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize("name", named_configs())
def test_a_packaged_base_gives_all_settings_of_the_recipe(name):
    optim = read_settings(find_config(name))["optim"]
    assert {
        "global_batch_size",
        "epochs",
        "lr",
        "lr_start",
        "lr_end",
        "weight_decay",
        "teacher_momentum",
    } <= optim.keys()


def test_a_starter_contains_the_settings_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_starter("vit_s16", Path("mine.yaml"), ["data.train=shards/train", "output.folder=runs/first"])
    config = load_config(path)
    assert config.data.train.endswith("shards/train") and config.output.folder == "runs/first"
    assert config.optim.global_batch_size == 2048
    with pytest.raises(ValueError, match=r"settings of iwm init must be among data\.train, .*got \['seed'\]"):
        write_starter("vit_s16", Path("other.yaml"), ["seed=1"])
    assert not Path("other.yaml").exists()
