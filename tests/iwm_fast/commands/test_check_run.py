"""`iwm check` reports what the run then does, and every reason why it cannot start."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.tar_files import encode, photograph, write_tar
from fixtures.tiny_pretraining import tiny_run
from iwm_fast.cli import main
from iwm_fast.commands.check_run import inspect_run
from iwm_fast.config.commands import CheckConfig
from iwm_fast.config.loading import save_config
from iwm_fast.config.run import RunConfig
from iwm_fast.train import run

ONE_RANK = CheckConfig(ranks=1)


@pytest.fixture
def config(tiny_shards, tmp_path) -> RunConfig:
    return tiny_run(tiny_shards, tmp_path / "run", loader="torch")


def rows(config: RunConfig, request: CheckConfig = ONE_RANK) -> dict[str, str]:
    report, _ = inspect_run(config, request)
    return dict(report.rows)


def problems(config: RunConfig, request: CheckConfig = ONE_RANK) -> str:
    report, _ = inspect_run(config, request)
    return "\n".join(report.problems)


def test_the_report_of_a_valid_run_agrees_with_its_training(config):
    report, _ = inspect_run(config, ONE_RANK)
    assert report.problems == []
    results = dict(report.rows)
    assert results["training samples"] == "48 in 3 shards, 100.0 % with a label"
    assert results["global batch"] == "16 = 1 rank x 16 images x 1 micro-batch"
    assert results["steps"] == "3.0 per epoch, 12 in 4 epochs"
    assert results["run folder"] == "holds no checkpoint; training starts at step 0"
    assert not Path(config.output.folder).exists()
    assert run(config).step == 12


def test_the_batch_is_divided_among_the_requested_ranks(config):
    config = replace(config, runtime=replace(config.runtime, micro_batch_size=2))
    assert rows(config, CheckConfig(ranks=4))["global batch"] == "16 = 4 ranks x 2 images x 2 micro-batches"
    assert "must be a multiple of the 3 ranks, got 16" in problems(config, CheckConfig(ranks=3))


def test_without_a_setting_the_launcher_gives_the_number_of_ranks(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert rows(config, CheckConfig())["global batch"].startswith("16 = 8 ranks x 2 images")


def test_the_share_of_labelled_samples_is_reported(config, tmp_path):
    crop = photograph("coffee.png")[:60, :60]
    members = [(f"{n:02}.jpg", encode(crop)) for n in range(16)] + [("16.jpg", encode(crop)), ("16.cls", b"3")]
    write_tar(tmp_path / "few.tar", members)
    few = replace(config, data=replace(config.data, train=str(tmp_path / "few.tar")))
    assert rows(few)["training samples"] == "17 in 1 shards, 5.9 % with a label"


def test_for_an_existing_run_changes_and_remaining_steps_are_reported(config):
    run(config)
    longer = replace(config, resume="extend", optim=replace(config.optim, epochs=6.0))
    results = rows(longer)
    assert results["run folder"] == "holds a run at step 12"
    assert results["changed settings"] == "optim.epochs: 4.0 -> 6.0"
    assert results["remaining"] == "6 steps, to step 18" and problems(longer) == ""
    assert rows(replace(config, resume="auto"))["remaining"] == "none, the run is finished"
    assert "already holds a run" in problems(config)
    other = replace(config, resume="auto", optim=replace(config.optim, lr=0.5))
    assert "optim.lr: 0.002 -> 0.5" in problems(other) and "remaining" not in rows(other)


def test_a_damaged_checkpoint_is_reported_and_not_moved(config):
    run(config)
    newest = Path(config.output.folder) / "checkpoints" / "step-00000012"
    (newest / "state.json").write_text("{}")
    results = rows(replace(config, resume="auto"))
    assert results["damaged checkpoint"] == "step-00000012; an older checkpoint is used instead"
    assert results["remaining"] == "2 steps, to step 12" and newest.is_dir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"train": "absent-{000..002}.tar"}}, "absent-000.tar"),
        ({"data": {"train": ""}}, "data.train must name the training shards"),
        ({"data": {"max_samples": 49}}, "data.max_samples must be at most the 48 samples"),
        ({"data": {"val": "absent.tar"}}, "absent.tar"),
        ({"output": {"evaluate_every": 8}}, "data.val must name validation shards when output.evaluate_every is set"),
        ({"mask": {"num_target_blocks": 40}}, "leave no context patch"),
        ({"runtime": {"device": "cuda"}}, "runtime.device=cuda needs a GPU"),
        ({"runtime": {"engine": "deepspeed", "deepspeed": {"train_batch_size": 3}}}, "must be unset or 16, got 3"),
        ({"init_from": "absent"}, "init_from = 'absent' does not exist"),
    ],
)
def test_an_error_is_reported_together_with_all_other_results(config, change, message):
    for name, value in change.items():
        changed = value if isinstance(value, str) else replace(getattr(config, name), **value)
        config = replace(config, **{name: changed})
    assert message in problems(config)
    assert "encoder parameters" in rows(config)


def test_initial_weights_are_checked_without_building_networks(config, tmp_path):
    run(config)
    next_run = replace(
        config, init_from=config.output.folder, output=replace(config.output, folder=str(tmp_path / "next"))
    )
    assert rows(next_run)["init_from"].startswith("the encoder starts with the teacher of")
    deeper = replace(next_run, model=replace(config.model, encoder=replace(config.model.encoder, depth=3)))
    assert "another encoder (source -> this run: depth 2 -> 3)" in problems(deeper)


def test_hours_follow_from_the_speed_or_from_the_requested_gpu(config):
    # 4 epochs of 48 images
    by_speed = rows(config, CheckConfig(ranks=2, images_per_s=0.01))["time"]
    assert by_speed == "5.3 h at 0.01 images/s; 10.7 GPU-hours"
    by_gpu = rows(RunConfig(data=config.data), CheckConfig(ranks=2, gpu="L40S"))["time"]
    assert "at 40 % of the 362 TFLOP/s of L40S" in by_gpu
    assert "gpu must be A100, H100, H200, B200, L40S or RTX 4090, got 'T4'" in problems(config, CheckConfig(gpu="T4"))


def test_a_run_for_another_gpu_needs_no_gpu_on_this_machine(config):
    on_gpus = replace(config, runtime=replace(config.runtime, device="cuda"))
    assert problems(on_gpus, CheckConfig(gpu="H100")) == ""


def test_the_command_exits_with_2_if_the_run_cannot_start(config, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    save_config(config, path)
    main(["check", str(path), "ranks=4", "optim.epochs=8", "images_per_s=100"])
    printed = capsys.readouterr().out
    assert "16 = 4 ranks x 4 images" in printed and "24 in 8 epochs" in printed and "ZeRO 3" in printed
    with pytest.raises(SystemExit) as exit_info:
        main(["check", str(path), "ranks=3"])
    printed = capsys.readouterr()
    assert exit_info.value.code == 2 and "training samples" in printed.out
    assert printed.err.startswith("error: this run cannot start:\n- optim.global_batch_size must be a multiple")
    for argument, message in (("rank=3", "unknown setting 'rank'"), ("ranks=0", "ranks must be at least 1")):
        with pytest.raises(SystemExit):
            main(["check", str(path), argument])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_nothing_is_written_to_the_run_folder(config):
    run(config)
    folder = Path(config.output.folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    inspect_run(replace(config, resume="auto"), ONE_RANK)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 12
