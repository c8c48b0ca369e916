"""`iwm check` reports what the run then does, and every reason why it cannot start."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fixtures.tar_files import encode, photograph, write_tar
from fixtures.tiny_pretraining import tiny_run
from iwm_fast.cli import main
from iwm_fast.commands import measured_speed
from iwm_fast.commands.check_run import inspect_run
from iwm_fast.commands.measured_speed import DecodeRate, Speed, predict_limit
from iwm_fast.config.commands import CheckConfig
from iwm_fast.config.loading import build, save_config
from iwm_fast.config.run import ModelConfig, OptimConfig, PredictorConfig, RunConfig, RuntimeConfig
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.train import run

ONE_RANK = CheckConfig(ranks=1)


@pytest.fixture
def config(tiny_shards, tmp_path) -> RunConfig:
    return tiny_run(tiny_shards, tmp_path / "run", loader="torch")


@pytest.fixture(autouse=True)
def _short_measurement(monkeypatch):
    monkeypatch.setattr(measured_speed, "SECONDS", 0.1)
    monkeypatch.setattr(measured_speed, "BATCH_SIZE", 4)


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


def test_a_metric_that_is_not_measured_and_a_logger_without_its_package_are_reported(config, tmp_path, monkeypatch):
    write_tar(tmp_path / "val.tar", [("0.jpg", encode(photograph("coffee.png")[:60, :60]))])
    output = replace(config.output, log_every=4, evaluate_every=8, keep_best="knn", loggers=("wandb",))
    monkeypatch.setitem(sys.modules, "wandb", None)
    messages = problems(replace(config, data=replace(config.data, val=str(tmp_path / "val.tar")), output=output))
    assert "output.keep_best must be one of mrr, rank_me, lidar in this run" in messages
    assert "wandb is not installed: pip install 'iwm-fast[wandb]'" in messages


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
    assert "gpu must be A100, H100, " in problems(config, CheckConfig(gpu="T4"))
    assert "got 'T4'; or set gpu_memory_gb and images_per_s" in problems(config, CheckConfig(gpu="T4"))
    by_memory = CheckConfig(gpu="T4", gpu_memory_gb=16.0)
    assert problems(config, by_memory) == "" and "the peak of T4 is not" in rows(config, by_memory)["time"]


def test_the_cores_that_decode_fast_enough_are_measured_on_the_shards(config, tmp_path):
    assert "decoding" not in rows(config, CheckConfig(images_per_s=100.0)), "the torch loader renders in one thread"
    by_dali = replace(config, runtime=replace(config.runtime, loader="dali", decode="cpu"))
    slow, fast = (CheckConfig(ranks=2, images_per_s=speed) for speed in (1.0, 1e6))
    report, _ = inspect_run(by_dali, slow)
    text = dict(report.rows)["decoding"]
    assert re.match(r"[\d,]+ images/s per core, measured on \d+ of these images; with runtime.decode=cpu, ", text)
    assert "1 images/s need 2 cores (runtime.loader_threads=1 per rank); this machine has" in text
    assert "loader_threads" not in str(report.warnings) and report.problems == []
    (warning,) = [text for text in inspect_run(by_dali, fast)[0].warnings if "loader_threads" in text]
    assert re.match(r"runtime.loader_threads = 2 decode about [\d,]+ images/s per rank, but 500,000 are asked", warning)
    on_gpu = replace(by_dali, runtime=replace(by_dali.runtime, decode="gpu"))
    assert "loader_threads" not in str(inspect_run(on_gpu, fast)[0].warnings)


def test_bad_images_do_not_stop_the_measurement(config, tmp_path):
    good = encode(photograph("coffee.png")[:60, :60])
    flipped = bytearray(encode(photograph("coffee.png")[:60, :60], "PNG"))
    flipped[len(flipped) // 2] ^= 0xFF
    runtime = replace(config.runtime, loader="dali")
    request = CheckConfig(ranks=1, images_per_s=1.0)
    for name, images in {"some": [good] * 200 + [b"", bytes(flipped)], "all": [b"GIF89a", bytes(flipped)]}.items():
        write_tar(tmp_path / f"{name}.tar", [(f"{n:03}.jpg", image) for n, image in enumerate(images)])
        mixed = replace(config, runtime=runtime, data=replace(config.data, train=str(tmp_path / f"{name}.tar")))
        assert ("none of" in problems(mixed, request)) == (name == "all")


@pytest.mark.parametrize(
    ("images_per_s", "ranks", "cores"), [(1000.0, 1, 1), (1001.0, 1, 2), (8000.0, 8, 8), (8001.0, 8, 16)]
)
def test_every_rank_has_whole_cores(images_per_s, ranks, cores):
    rate = DecodeRate(images_per_s=1000.0, num_images=64)
    assert f"need {cores} cores (runtime.loader_threads={cores // ranks} per rank)" in rate.describe(
        images_per_s, ranks
    )


def measured_rows(config: RunConfig, request: CheckConfig) -> dict[str, str]:
    report, _ = inspect_run(config, request, measures_speed=True)
    assert report.problems == []
    return dict(report.rows)


def speed_lines(config: RunConfig, request: CheckConfig) -> tuple[list[str], str]:
    rows = measured_rows(config, request)
    return rows["speed per rank"].splitlines(), rows["limit"]


def test_the_time_of_a_run_follows_from_its_slowest_part(config):
    optim = replace(config.optim, epochs=36.0)
    rows = measured_rows(replace(config, optim=optim), CheckConfig(ranks=2, gpu="H100", images_per_s=0.5))
    num_images = 36 * open_shards(config.data.train).num_samples
    assert rows["time at this speed"] == f"about {num_images / 0.5 / 60:.2g} min for all epochs"
    assert "time at this speed" not in measured_rows(config, CheckConfig(ranks=2, gpu="H100"))


@pytest.mark.parametrize("loader", ["torch", "dali"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's speed is not measured")
def test_what_will_limit_a_run_on_a_cpu_is_measured(config, loader):
    lines, limit = speed_lines(replace(config, runtime=replace(config.runtime, loader=loader)), ONE_RANK)
    shard = config.data.train.replace("{000000..000002}", "000000")
    for line, text in zip(
        lines,
        (
            rf"reading: about [\d,]+ images/s, 20 images of {re.escape(shard)} at [\d,]+ MB/s",
            rf"decoding: about [\d,]+ images/s, with rendering, by {loader} on [12] threads?",
            r"computation: about [\d,]+ images/s, steps of 16 images with runtime.engine=plain on 1 thread",
        ),
        strict=True,
    ):
        assert re.fullmatch(text, line)
    # The slowest part of the three is named with its speed.
    speeds = {int(line.split()[2].replace(",", "")): line.partition(":")[0] for line in lines}
    assert limit.startswith(f"this run will be limited by {speeds[min(speeds)]}") and f"{min(speeds):,} images" in limit


def test_what_is_not_measured_is_not_guessed(config):
    runtime = replace(config.runtime, loader="dali")
    lines, limit = speed_lines(replace(config, runtime=runtime), CheckConfig(ranks=2, gpu="H100"))
    assert lines[1:] == [
        "decoding: not measured, because a GPU does it",
        "computation: not measured, because a GPU does it; images_per_s=... takes a measured speed",
    ]
    assert limit.startswith("where computation is faster than about ") and limit.endswith("; not measured: decoding")
    on_cores = replace(config, runtime=replace(runtime, decode="cpu"))
    lines, limit = speed_lines(on_cores, CheckConfig(ranks=2, gpu="H100", images_per_s=2e6))
    assert re.fullmatch(r"decoding: about [\d,]+ images/s, runtime.loader_threads=2", lines[1])
    assert lines[2] == "computation: about 1,000,000 images/s, as images_per_s says" and limit.startswith(
        "this run will be"
    )


@pytest.mark.parametrize(
    ("speeds", "runtime", "text"),
    [
        (
            {"reading": 900.0, "decoding": 50.0, "computation": 100.0}, {},
            "this run will be limited by decoding: raise runtime.loader_threads (now 2) if cores are idle "
            "(about 50 images/s per rank; computation 100; reading 900)",
        ),
        (
            {"reading": 9.0, "decoding": 50.0, "computation": 100.0}, {},
            "this run will be limited by reading: raise runtime.reader_threads (now 4) if storage is slow "
            "(about 9 images/s per rank; decoding 50; computation 100)",
        ),
        (
            {"reading": 900.0, "decoding": None, "computation": 100.0}, {"compile": True, "ops": "fused"},
            "this run will be limited by computation on the GPU, as it should be (about 100 images/s per rank; "
            "reading 900; not measured: decoding)",
        ),
        (
            {"reading": 900.0, "decoding": 50.0}, {"loader": "torch"},
            "where computation is faster than about 50 images/s per rank, this run will be limited by decoding: "
            "set runtime.loader=dali",
        ),
    ],
    ids=["decoding", "reading", "decoding is not known", "computation is not known"],
)  # fmt: skip
def test_the_slowest_part_is_named_with_its_setting(config, speeds, runtime, text):
    config = replace(config, runtime=RuntimeConfig(reader_threads=4, loader_threads=2, **runtime))
    parts = [Speed(part, speed, "") for part, speed in speeds.items()]
    assert predict_limit(config, parts, is_on_gpu=True) == text


def test_ranks_that_need_more_cores_than_there_are_share_them(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    speed = Speed("decoding", 100.0, "by dali", num_threads=2)
    assert speed.on_shared_cores(2) == speed
    assert str(speed.on_shared_cores(4)) == ("decoding: about 50 images/s, by dali; 4 x 2 threads share 4 cores")


def test_a_run_for_another_gpu_needs_no_gpu_on_this_machine(config):
    on_gpus = replace(config, runtime=replace(config.runtime, device="cuda"))
    assert problems(on_gpus, CheckConfig(gpu="H100")) == ""


def verdict(config: RunConfig, request: CheckConfig):
    report, verdict = inspect_run(config, request)
    assert report.problems == []
    return verdict


@pytest.fixture
def vit_b(config) -> RunConfig:
    """ViT-B with the paper's predictor and a global batch of 2,048, on the tiny shards."""
    return RunConfig(data=config.data, model=ModelConfig(predictor=PredictorConfig(depth=18)), output=config.output)


def test_vit_b_at_2048_on_one_24_gb_gpu_exits_with_1(vit_b, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "run.yaml"
    save_config(vit_b, path)
    with pytest.raises(SystemExit) as exit_info:
        main(["check", str(path), "ranks=1", "gpu=RTX 4090"])
    lines = capsys.readouterr().out.splitlines()
    assert exit_info.value.code == 1
    assert re.fullmatch(r"does not fit: \d+ of 24 GB per GPU; runtime.micro_batch_size=128 fits", lines[-1])
    assert all(len(line) <= 80 for line in lines)
    # The command succeeds with the setting that it suggests.
    main(["check", str(path), "ranks=1", "gpu=RTX 4090", "runtime.micro_batch_size=128"])
    printed = capsys.readouterr().out
    assert re.match(r"fits: [\d.]+ of 24 GB per GPU \(ZeRO 1, 128 images", printed.splitlines()[-1])
    larger = replace(vit_b, runtime=replace(vit_b.runtime, micro_batch_size=256))
    assert not verdict(larger, CheckConfig(ranks=1, gpu_memory_gb=24.0)).fits


def test_vit_b_at_2048_fits_on_8_h100(vit_b):
    result = verdict(vit_b, CheckConfig(ranks=8, gpu="H100"))
    assert result.fits and result.micro_batch_size == 256
    assert result.sentence().endswith("of 80 GB per GPU (ZeRO 1, 256 images per micro-batch)")


def test_settings_that_fit_change_as_little_as_possible(vit_b):
    plain = replace(vit_b, runtime=replace(vit_b.runtime, engine="plain"))
    settings = {
        memory: verdict(plain, CheckConfig(ranks=8, gpu_memory_gb=memory)).fitting_settings()
        for memory in (24.0, 6.6, 6.0, 2.0)
    }
    assert settings == {
        24.0: "runtime.micro_batch_size=128",
        6.6: "runtime.micro_batch_size=2 runtime.activation_checkpointing=true",
        6.0: "runtime.micro_batch_size=2 runtime.engine=deepspeed runtime.zero_stage=1",
        2.0: None,
    }
    hopeless = verdict(plain, CheckConfig(ranks=8, gpu_memory_gb=2.0))
    assert hopeless.sentence().endswith("and no ZeRO stage or micro-batch fits")


def test_without_a_gpu_the_memory_is_not_judged(config):
    result = verdict(config, ONE_RANK)
    assert result.fits is None and result.sentence().startswith("memory is not judged: no known GPU; set gpu=")


def test_a_batch_beyond_the_samples_and_a_short_run_are_warned_of(config):
    report, _ = inspect_run(replace(config, optim=replace(config.optim, global_batch_size=64)), ONE_RANK)
    assert "optim.global_batch_size = 64 exceeds the 48 training samples" in report.warnings[0]
    assert "the run has only 3 steps" in report.warnings[1]
    longer = replace(config, optim=replace(config.optim, epochs=34.0))
    assert inspect_run(longer, ONE_RANK)[0].warnings == []


def test_rates_are_suggested_for_batches_other_than_the_recipes(config):
    def suggestion(**optim) -> str | None:
        return rows(replace(config, optim=OptimConfig(**optim)), ONE_RANK).get("suggested values")

    text = suggestion(global_batch_size=256)
    assert "1706.02677" in text and "2307.13813" in text and "not verified for IWM" in text
    overrides = [word for word in text.split() if word.startswith("optim.")]
    optim = build(RunConfig, {}, overrides).optim
    assert (optim.lr, optim.lr_start, optim.lr_end) == (1.25e-4, 2.5e-5, 1.25e-7)
    assert optim.teacher_momentum == pytest.approx((0.996 ** (1 / 8), 1.0), abs=1e-6)
    assert suggestion() is None
    assert suggestion(global_batch_size=256, lr=5e-4) is None
    assert suggestion(global_batch_size=256, teacher_momentum=(0.99, 1.0)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")
def test_networks_that_are_too_large_for_a_cpu_are_not_measured_on_it(vit_b):
    (*_, line), limit = speed_lines(vit_b, ONE_RANK)
    assert re.match(r"computation: not measured, because \d+ GFLOP per image take a core seconds; images_per_s=", line)
    assert limit.startswith("where computation is faster than about ")


def test_the_ratio_of_predictor_to_encoder_is_reported(vit_b):
    assert rows(vit_b)["predictor / encoder"].startswith("0.39 of the parameters")


def test_the_command_exits_with_2_if_the_run_cannot_start(config, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    save_config(config, path)
    main(["check", str(path), "ranks=4", "optim.epochs=8", "images_per_s=100"])
    printed = capsys.readouterr().out
    assert "16 = 4 ranks x 4 images" in printed and "24 in 8 epochs" in printed and "ZeRO 3" in printed
    assert "speed per rank" in printed and "computation: about 25 images/s" in printed
    with pytest.raises(SystemExit) as exit_info:
        main(["check", str(path), "ranks=3"])
    printed = capsys.readouterr()
    assert exit_info.value.code == 2 and "training samples" in printed.out
    assert printed.err.startswith("error: this run cannot start:\n- optim.global_batch_size must be a multiple")
    for argument, message in (
        ("rank=3", "unknown setting 'rank'"),
        ("ranks=0", "ranks must be at least 1"),
        ("gpu_memory_gb=0", "gpu_memory_gb must be above 0"),
    ):
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


def test_images_per_forward_are_announced_with_vicreg_terms_only(tiny_shards, tmp_path):
    for depth in (0, 1):
        config = tiny_run(tiny_shards, tmp_path / "run", depth=depth, micro_batch_size=4)
        report, _ = inspect_run(config, CheckConfig(ranks=2))
        text = "ranks * runtime.micro_batch_size = 8 is part of what is learned"
        assert any(text in warning for warning in report.warnings) == (depth == 0)
