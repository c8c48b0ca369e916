"""What is told before a run starts is what the run then does."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.tar_files import encode, photograph, write_tar
from fixtures.tiny_pretraining import tiny_run
from iwm_fast.cli import main
from iwm_fast.commands.check_run import examine
from iwm_fast.config.commands import CheckConfig
from iwm_fast.config.loading import save_config
from iwm_fast.config.run import RunConfig
from iwm_fast.train import run

HERE = CheckConfig(ranks=1)


@pytest.fixture
def config(tiny_shards, tmp_path) -> RunConfig:
    return tiny_run(tiny_shards, tmp_path / "run", loader="torch")


def rows(config: RunConfig, asked: CheckConfig = HERE) -> dict[str, str]:
    report, _ = examine(config, asked)
    return dict(report.rows)


def problems(config: RunConfig, asked: CheckConfig = HERE) -> str:
    report, _ = examine(config, asked)
    return "\n".join(report.problems)


def test_a_run_that_can_start_is_told_as_it_then_is(config):
    told, _ = examine(config, HERE)
    assert told.problems == []
    found = dict(told.rows)
    assert found["training samples"] == "48 in 3 shards, 100.0 % with a label"
    assert found["global batch"] == "16 = 1 rank x 16 images x 1 micro-batch"
    assert found["steps"] == "3.0 per epoch, 12 in 4 epochs"
    assert found["run folder"] == "holds no checkpoint: the run starts anew"
    assert not Path(config.output.folder).exists()
    assert run(config).step == 12


def test_the_batch_is_divided_among_the_ranks_asked_for(config):
    config = replace(config, runtime=replace(config.runtime, micro_batch_size=2))
    assert rows(config, CheckConfig(ranks=4))["global batch"] == "16 = 4 ranks x 2 images x 2 micro-batches"
    assert "must be a multiple of the 3 ranks, got 16" in problems(config, CheckConfig(ranks=3))


def test_a_launcher_tells_the_ranks_where_nobody_else_does(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert rows(config, CheckConfig())["global batch"].startswith("16 = 8 ranks x 2 images")


def test_the_share_with_a_label_is_told(config, tmp_path):
    crop = photograph("coffee.png")[:60, :60]
    members = [(f"{n:02}.jpg", encode(crop)) for n in range(16)] + [("16.jpg", encode(crop)), ("16.cls", b"3")]
    write_tar(tmp_path / "few.tar", members)
    few = replace(config, data=replace(config.data, train=str(tmp_path / "few.tar")))
    assert rows(few)["training samples"] == "17 in 1 shards, 5.9 % with a label"


def test_a_folder_that_holds_a_run_tells_what_differs_and_whether_it_would_go_on(config):
    run(config)
    longer = replace(config, resume="extend", optim=replace(config.optim, epochs=6.0))
    told = rows(longer)
    assert told["run folder"] == "holds a run at step 12"
    assert told["differs from it"] == "optim.epochs: 4.0 -> 6.0"
    assert told["goes on"] == "6 steps to step 18" and problems(longer) == ""
    assert rows(replace(config, resume="auto"))["goes on"] == "it is finished"
    assert "already holds a run" in problems(config)
    other = replace(config, resume="auto", optim=replace(config.optim, lr=0.5))
    assert "optim.lr: 0.002 -> 0.5" in problems(other) and "goes on" not in rows(other)


def test_a_damaged_checkpoint_is_told_and_left_where_it_is(config):
    run(config)
    newest = Path(config.output.folder) / "checkpoints" / "step-00000012"
    (newest / "state.json").write_text("{}")
    told = rows(replace(config, resume="auto"))
    assert told["damaged"] == "step-00000012: an older checkpoint is taken"
    assert told["goes on"] == "2 steps to step 12" and newest.is_dir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"train": "absent-{000..002}.tar"}}, "absent-000.tar"),
        ({"data": {"train": ""}}, "data.train must name the training shards"),
        ({"data": {"max_samples": 49}}, "data.max_samples must be at most the 48 samples"),
        ({"data": {"val": "absent.tar"}}, "absent.tar"),
        ({"output": {"evaluate_every": 8}}, "data.val must name validation shards where output.evaluate_every is set"),
        ({"mask": {"num_target_blocks": 40}}, "leave no context patch"),
        ({"runtime": {"device": "cuda"}}, "runtime.device=cuda needs a GPU"),
        ({"runtime": {"engine": "deepspeed", "deepspeed": {"train_batch_size": 3}}}, "must be unset or 16, got 3"),
        ({"init_from": "absent"}, "init_from = 'absent' does not exist"),
    ],
)
def test_what_would_stop_the_run_is_told_and_the_rest_all_the_same(config, change, message):
    for name, value in change.items():
        changed = value if isinstance(value, str) else replace(getattr(config, name), **value)
        config = replace(config, **{name: changed})
    assert message in problems(config)
    assert "encoder parameters" in rows(config)


def test_weights_to_start_with_are_looked_at_without_building_anything(config, tmp_path):
    run(config)
    following = replace(
        config, init_from=config.output.folder, output=replace(config.output, folder=str(tmp_path / "next"))
    )
    assert rows(following)["init_from"].startswith("the encoder starts with the teacher of")
    deeper = replace(following, model=replace(config.model, encoder=replace(config.model.encoder, depth=3)))
    assert "another encoder (source -> this run: depth 2 -> 3)" in problems(deeper)


def test_hours_follow_from_the_speed_or_from_the_gpu_asked_for(config):
    # 4 epochs of 48 images
    by_speed = rows(config, CheckConfig(ranks=2, images_per_s=0.01))["time"]
    assert by_speed == "5.3 h at 0.01 images/s; 10.7 GPU-hours"
    by_gpu = rows(RunConfig(data=config.data), CheckConfig(ranks=2, gpu="L40S"))["time"]
    assert "at 40 % of the 362 TFLOP/s of L40S" in by_gpu
    assert "gpu must be A100, H100, H200, B200, L40S or RTX 4090, got 'T4'" in problems(config, CheckConfig(gpu="T4"))


def test_a_run_meant_for_another_machine_need_not_find_a_gpu_here(config):
    on_gpus = replace(config, runtime=replace(config.runtime, device="cuda"))
    assert problems(on_gpus, CheckConfig(gpu="H100")) == ""


def test_the_command_prints_tables_and_ends_with_2_if_the_run_would_be_stopped(config, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    save_config(config, path)
    main(["check", str(path), "ranks=4", "optim.epochs=8", "images_per_s=100"])
    printed = capsys.readouterr().out
    assert "16 = 4 ranks x 4 images" in printed and "24 in 8 epochs" in printed and "ZeRO 3" in printed
    with pytest.raises(SystemExit) as ended:
        main(["check", str(path), "ranks=3"])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and "training samples" in printed.out
    assert printed.err.startswith("error: this run would be stopped:\n- optim.global_batch_size must be a multiple")
    for given, message in (("rank=3", "unknown setting 'rank'"), ("ranks=0", "ranks must be at least 1")):
        with pytest.raises(SystemExit):
            main(["check", str(path), given])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_nothing_is_written_where_a_run_is(config):
    run(config)
    folder = Path(config.output.folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    examine(replace(config, resume="auto"), HERE)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 12
