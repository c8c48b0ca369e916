"""Mistakes in settings, on the command line and in folders: one message, exit code 2, and nothing is written."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.launchers import tiny_yaml
from fixtures.tiny_pretraining import tiny_run
from iwm_fast.cli import main
from iwm_fast.config.loading import build
from iwm_fast.config.run import RunConfig
from iwm_fast.config.writable import require_writable
from iwm_fast.evaluate import evaluate
from iwm_fast.runtime.process import without_local_rank
from iwm_fast.train import run, train

DEEPSPEED = "runtime.deepspeed."


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, tiny_shards) -> Path:
    """Return the working directory of the test, which holds a run's file."""
    tiny_yaml(tmp_path / "run.yaml", tiny_shards, runtime={"engine": "plain", "loader": "torch"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    """Run a command that must be refused without writing anything, and return its message."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.startswith("error: ") and "Traceback" not in message
    assert sorted(Path().rglob("*")) == before
    return message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # numbers that are not finite, too large, or of another type
        ("optim.lr=.inf", "optim.lr must be a finite number, got '.inf'"),
        ("optim.epochs=.inf", "optim.epochs must be a finite number, got '.inf'"),
        ("optim.epochs=1e30", "optim.epochs must be above 0 and at most 1000000, got 1e+30"),
        ("optim.epochs=nan", "optim.epochs must be a finite number, got 'nan'"),
        ("optim.lr=1e300", "optim.lr must be a finite number, got 1e+300"),
        ("optim.weight_decay=[0.1]", "optim.weight_decay must be a list of 2 finite numbers, as in [A, B], got [0.1]"),
        ("optim.weight_decay=0.1", "optim.weight_decay must be a list of 2 finite numbers, as in [A, B], got 0.1"),
        ("runtime.rank_timeout_s=.inf", "runtime.rank_timeout_s must be a finite number, got '.inf'"),
        ("runtime.rank_timeout_s=1e12", "runtime.rank_timeout_s must be above 0 and at most 31536000 (a year)"),
        ("optim.lr=null", "optim.lr must be a finite number, got None"),
        ("views.jitter.encoding=ratio", "views.jitter.encoding must be one of difference, log_ratio, got 'ratio'"),
        ("views.gamma.strength=0", "views.gamma.strength must be above 0 and at most 3, got 0.0"),
        ("views.rotation.strength=60", "views.rotation.strength must be above 0 and at most 45 degrees, got 60.0"),
        ("views.posterize.bits=8", "views.posterize.bits must be between 1 and 7, got 8"),
        ("views.brightness=0.5", "'views.brightness' is now named 'views.jitter.brightness'"),
        ("optim.clip_norm=", "optim.clip_norm must have a value after the equals sign; null means unset, got ''"),
        ("seed=1.0", "seed must be a whole number, got 1.0"),
        ("seed=true", "seed must be a whole number, got True"),
        ("runtime.compile=1", "runtime.compile must be true or false, got 1"),
        (f"seed=1{'0' * 400}", "seed must be a whole number, got '1000"),
        ("model.encoder.depth=1000000000000", "model.encoder.depth must be between 1 and 1000"),
        ("model.encoder.mlp_ratio=-1", "model.encoder.mlp_ratio must be between 1 / model.encoder.dim and 100, got -1"),
        ("runtime.loader_threads=100000", "runtime.loader_threads must be at most 1024, got 100000"),
        ("runtime.profile=²:³", "runtime.profile must be FIRST:LAST with 0 <= FIRST < LAST"),
        ("output.folder=a\0b", "output.folder must be text in UTF-8 without NUL characters, got 'a\\x00b'"),
        ("output.folder=\udcff", "output.folder must be text in UTF-8 without NUL characters, got '\\udcff'"),
        # the form of the command line
        ("lr=3", "unknown setting 'lr'; did you mean 'optim.lr'?"),
        ("=", "override must have the form group.key=value, got '='"),
        ("optim.lr", "override must have the form group.key=value, got 'optim.lr'"),
        ("--lr=3", "unknown option '--lr=3'; settings are given as group.key=value, without dashes"),
        ("-v", "unknown option '-v'"),
        ("other.yaml", "one YAML file can be given, got 'other.yaml' as well; name it as the base of the first one"),
        ("optim={lr: 1}", "'optim' is a group of settings; set them one by one"),
        ("optim.lr=!!float 1", "the value of optim.lr is not accepted: tags such as !!float are not accepted"),
        ("optim.lr=[", "the value of optim.lr is not valid YAML"),
        # DeepSpeed
        (f"{DEEPSPEED}communication_data_type=fp16", f"{DEEPSPEED}communication_data_type must be unset; only"),
        (f"{DEEPSPEED}data_types.grad_accum_dtype=bf16", f"{DEEPSPEED}data_types must be unset; only"),
        (f"{DEEPSPEED}bf16.master_weights=true", f"{DEEPSPEED}bf16.master_weights must be unset"),
        (f"{DEEPSPEED}wall_clock_brakedown=true", f"(did you mean {DEEPSPEED}wall_clock_breakdown?)"),
        (f"{DEEPSPEED}reduce_bucket_size=9", f"(did you mean {DEEPSPEED}zero_optimization.reduce_bucket_size?)"),
        (f"{DEEPSPEED}zero_optimization.overlap_com=true", f"did you mean {DEEPSPEED}zero_optimization.overlap_comm?"),
        (f"{DEEPSPEED}zero_optimization.zero_quantized_gradients=true", "zero_quantized_gradients must be unset"),
        (f"{DEEPSPEED}zero_optimization.reduce_bucket_size=big", "bucket_size must be a whole number, got 'big'"),
        (f"{DEEPSPEED}zero_optimization=3", f"{DEEPSPEED}zero_optimization must be unset or a mapping of settings"),
        ("runtime.deepspeed=3", "runtime.deepspeed must be a mapping, as in {key: value}, got 3"),
        ("runtime.engine=deepspeed runtime.deepspeed.steps_per_print=1", f"{DEEPSPEED}steps_per_print must be unset"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_setting_is_named_with_its_value(capsys, override, message):
    overrides = override.split(" ") if override.startswith("runtime.engine") else [override]
    assert message in refused(capsys, "train", "run.yaml", *overrides)


@pytest.mark.parametrize("arguments", [["--lr=3", "run.yaml"], ["optim.lr=3", "run.yaml"], ["-x"]])
def test_the_first_argument_must_name_a_run(capsys, arguments):
    assert "the first argument must be a YAML file or the name of a configuration" in refused(
        capsys, "train", *arguments
    )


@pytest.mark.parametrize(
    "spelling", [["--local_rank=0"], ["--local-rank=0"], ["--local_rank", "0"], ["--local-rank", "0"]], ids=" ".join
)
def test_launchers_may_add_the_local_rank_in_all_spellings(spelling):
    assert without_local_rank([*spelling, "run.yaml", "seed=0"]) == ["run.yaml", "seed=0"]
    assert without_local_rank(["run.yaml", *spelling, "0"]) == ["run.yaml", "0"]
    with pytest.raises(ValueError, match=r"unknown setting 'optm\.lr'"):
        train([*spelling, "run.yaml", "optm.lr=1"])
    with pytest.raises(ValueError, match=r"unknown setting 'optm\.lr'"):
        evaluate([*spelling, "knn", "optm.lr=1"])


def test_an_argument_that_only_resembles_the_local_rank_is_kept():
    arguments = ["--local_ranks=1", "--local-rank", "run.yaml", "3"]
    assert without_local_rank(arguments) == ["--local_ranks=1", "run.yaml", "3"]


def make_obstacles(folder: Path) -> None:
    (folder / "file").touch()
    (folder / "broken").symlink_to(folder / "nothing")
    (folder / "locked").mkdir()


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("file", "file is a file"),
        ("file/run", "file is a file"),
        ("file/deep/er/run", "file is a file"),
        ("broken", "broken is a broken link"),
        ("broken/run", "broken is a broken link"),
        ("..", "name a folder of its own"),
        ("runs/..", "name a folder of its own"),
        ("/", "name a folder of its own"),
        ("x" * 300, "File name too long"),
        ("locked/run", "there is no permission to write to locked"),
        ("locked", "there is no permission to write to locked"),
    ],
)
def test_an_output_folder_that_cannot_be_written_is_refused_first(capsys, folder, monkeypatch, path, problem):
    make_obstacles(folder)
    # The tests may run as root, who may write everywhere.
    monkeypatch.setattr(os, "access", lambda place, _: "locked" not in str(place))
    message = refused(capsys, "train", "run.yaml", f"output.folder={path}")
    assert message.startswith("error: output.folder must ") and problem in message and f"got '{path[:100]}" in message
    assert "output.folder must" in refused(capsys, "check", "run.yaml", f"output.folder={path}")


def test_folders_of_other_commands_are_checked_alike(capsys, folder):
    make_obstacles(folder)
    for command in (["export", "run=run"], ["embed", "run=run", "images=."], ["evaluate", "finetune", "timm=vit"]):
        assert "to must be a path that can be written: file is a file" in refused(capsys, *command, "to=file/x.npz")


def test_demo_and_show_write_nothing_if_the_folder_is_refused(capsys, folder):
    make_obstacles(folder)
    for command in (["demo"], ["show", "run.yaml"]):
        assert "output.folder must be a path that can be written" in refused(capsys, *command, "output.folder=file/x")


def test_errors_of_the_system_have_no_number(capsys, folder):
    make_obstacles(folder)
    assert refused(capsys, "init", "vit_s16", "file/mine.yaml") == "error: Not a directory: 'file/mine.yaml'\n"


@pytest.mark.parametrize("path", [".", "new", "new/deep/er", "../new", "/tmp", "here"])
def test_folders_that_exist_or_can_be_made_are_accepted(folder, path):
    (folder / "here").mkdir()
    require_writable("output.folder", path)
    assert {item.name for item in folder.iterdir()} == {"run.yaml", "here"}


def test_torchvisions_jitter_is_refused_with_the_dali_loader(capsys, folder):
    settings = ["views.jitter.model=torchvision", "runtime.loader=dali"]
    message = refused(capsys, "train", "run.yaml", *settings)
    assert "runtime.loader must be torch with these settings of views.jitter, got 'dali'" in message


def test_a_batch_above_the_data_set_is_a_warning(tiny_shards, folder, caplog):
    config = tiny_run(tiny_shards, folder / "run")
    run(replace(config, optim=replace(config.optim, global_batch_size=96, epochs=2.0)))
    assert "optim.global_batch_size = 96 exceeds the 48 training samples" in caplog.text


def test_deepspeed_settings_of_memory_speed_and_logs_are_accepted():
    deepspeed = {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": "7"}, "dump_state": "yes"}
    expected = {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 7}, "dump_state": True}
    assert build(RunConfig, {"runtime": {"deepspeed": deepspeed}}).runtime.deepspeed == expected
