"""`iwm doctor` names what is wrong with a machine and what to do, and survives whatever a check does."""

import json
import operator
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from fixtures.launchers import deepspeed, torchrun
from fixtures.paths import PROJECT, WORKERS
from iwm_fast.cli import main
from iwm_fast.commands import doctor as module
from iwm_fast.commands.doctor import CHECKS, FAILED, OK, SKIPPED, Result, Subject, find_difference, gather, run_check
from iwm_fast.config.run import OutputConfig, RunConfig, RuntimeConfig
from iwm_fast.engines import deepspeed_engine
from iwm_fast.models import kernel_check, student
from iwm_fast.pipelines.config import DataConfig
from iwm_fast.pipelines.transforms import normalization
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.runtime import extras
from iwm_fast.runtime.distributed import RankInfo

KERNELS = ("attention", "residual_norm", "predictor_input")


def subject(
    *, rank: int = 0, ranks: int = 1, place: str = "cpu", train: str = "", folder="runs", store=None, **runtime
):
    config = RunConfig(
        data=DataConfig(train=str(train)),
        views=ViewConfig(size=32),
        runtime=RuntimeConfig(**runtime),
        output=OutputConfig(folder=str(folder)),
    )
    info = RankInfo(rank=rank, local_rank=rank, world_size=ranks, device=torch.device(place))
    return Subject(config, info, store)


def raising(error: Exception):
    def function(*arguments, **named):
        raise error

    return function


def assert_failed(result: Result, text: str, remedy: str) -> None:
    assert result.status == FAILED and text in result.text and remedy in result.remedy, result
    assert "\n" not in result.text


@pytest.fixture
def driver(monkeypatch, tmp_path) -> Path:
    """A machine with the driver's file, and with what torch says about the GPU to be patched."""
    path = tmp_path / "version"
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19\nGCC version:\n")
    monkeypatch.setattr(module, "_DRIVER_FILE", path)
    return path


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")
def test_without_a_gpu_it_is_not_looked_at_unless_it_is_asked_for():
    for name in KERNELS:
        assert run_check(name, subject())[:2] == (SKIPPED, "no GPU")
    assert run_check("GPU", subject())[:2] == (SKIPPED, "no NVIDIA driver, so no GPU")
    assert run_check("GPU", subject(device="cpu"))[:2] == (SKIPPED, "runtime.device=cpu")
    assert_failed(run_check("GPU", subject(device="cuda")), "NVIDIA driver", "update the driver")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The NVIDIA driver on your system is too old (found version 12020)."),
        RuntimeError("No CUDA GPUs are available"),
        AssertionError("Torch not compiled with CUDA enabled"),
        RuntimeError(f"CUDA error\n{9 * 'a long explanation '}"),
    ],
)
def test_a_driver_without_a_usable_gpu_is_a_failure(driver, monkeypatch, error):
    monkeypatch.setattr(torch.cuda, "init", raising(error))
    assert_failed(
        run_check("GPU", subject()), str(error).split("\n")[0], "update the driver, or install the build of torch"
    )


def test_a_gpu_is_described(driver, monkeypatch):
    for name, value in {
        "init": None, "device_count": 8, "get_device_name": "NVIDIA H100", "get_device_capability": (9, 0),
        "mem_get_info": (79.2e9, 85e9),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(module, "choose_device", lambda *_: torch.device("cpu"))
    status, text, _ = run_check("GPU", subject())
    assert status == OK
    assert text.startswith("8 x NVIDIA H100, compute capability 9.0, 79 of 85 GB free, driver 535.129.03, CUDA")


def test_more_ranks_than_gpus_are_a_failure(driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert_failed(module.run_check("GPU", subject(rank=1, ranks=2)), "needs a GPU for local rank 1", "container")


def test_versions_are_listed_and_missing_packages_named_with_their_extra(monkeypatch):
    status, text, _ = run_check("versions", subject(engine="plain"))
    assert status == OK and f"torch {torch.__version__.partition('+')[0]}" in text and "Python 3." in text
    monkeypatch.setattr(extras, "_is_installed", lambda name: name not in ("nvidia.dali", "deepspeed"))
    result = run_check("versions", subject())
    assert_failed(result, "nvidia.dali, deepspeed are not installed (Python 3.", "pip install 'iwm-fast[train-cuda13]'")
    assert run_check("versions", subject(engine="plain", loader="torch")).status == OK


def test_a_package_that_cannot_be_imported_is_a_failure(monkeypatch):
    monkeypatch.setattr(deepspeed_engine, "import_deepspeed", raising(ImportError("libaio.so is missing")))
    assert_failed(run_check("versions", subject()), "libaio.so is missing", "install the package again")


@pytest.mark.parametrize(
    ("errors", "status"),
    [
        ({"attention of the encoder": 3e-3, "attention of the teacher": 1e-3}, OK),
        ({"attention of the encoder": 3e-3, "attention of the teacher": 0.5}, FAILED),
        ({"attention of the encoder": float("nan")}, FAILED),
    ],
)
def test_kernels_pass_within_the_tolerance_only(monkeypatch, errors, status):
    monkeypatch.setattr(student, "choose_ops", lambda *_: None)
    monkeypatch.setattr(kernel_check, "kernel_errors", lambda *_: iter(errors.items()))
    result = module.check_kernel("attention", subject(place="cuda"))
    assert result.status == status and "attention of the encoder" in result.text and "accepted 0.03" in result.text


def test_kernels_that_this_gpu_lacks_are_not_looked_at(monkeypatch):
    reason = "runtime.ops=fused cannot be used: compute capability 8.0"
    monkeypatch.setattr(student, "choose_ops", raising(ValueError(reason)))
    assert module.check_kernel("attention", subject(place="cuda"))[:2] == (SKIPPED, reason)


def test_dali_agrees_with_the_torch_loader_or_fails(monkeypatch):
    status, text, _ = run_check("DALI", subject())
    assert status == OK and "JPEGs rendered on cpu" in text
    views, denormalize = iter([0, 3]), normalization.denormalize_view
    monkeypatch.setattr(normalization, "denormalize_view", lambda *view: denormalize(*view) // 2 + next(views))
    assert_failed(run_check("DALI", subject()), "by 3.", "install DALI for the driver's CUDA version")
    monkeypatch.setattr(extras, "_is_installed", lambda name: name != "nvidia.dali")
    assert_failed(run_check("DALI", subject()), "nvidia.dali is not installed: pip install", "")
    assert run_check("DALI", subject(loader="torch")).status == SKIPPED


def test_the_generated_images_show_whether_views_are_mirrored_or_recoloured(monkeypatch):
    for change in (
        lambda view: view.flip(2),
        lambda view: view.flip(3),
        lambda view: (view.int() + 2).clamp(0, 255),
        # One of the images: the differences of all of them are small.
        lambda view: torch.cat([(view[:1].int() + 8).clamp(0, 255), view[1:].int()]),
    ):
        order, denormalize = iter([lambda view: view, change]), normalization.denormalize_view
        with monkeypatch.context() as patched:
            patched.setattr(
                normalization,
                "denormalize_view",
                lambda *view, o=order, d=denormalize: next(o)(d(*view)).to(torch.uint8),
            )
            assert run_check("DALI", subject()).status == FAILED


class _Crash:
    """A check that ends the process which receives it."""

    def __reduce__(self):
        return signal.raise_signal, (signal.SIGSEGV,)

    def __call__(self, subject: Subject) -> Result:
        raise AssertionError("must not be called")


def test_a_crash_of_the_gpu_decoder_is_a_failure_and_not_the_end():
    result = module.check_after_trial(_Crash(), subject(place="cuda"))
    assert_failed(result, "ends the process by SIGSEGV", "set runtime.decode=cpu")


def test_what_a_check_finds_or_raises_is_the_same_after_a_trial():
    result = module.check_after_trial(module.check_ranks, subject(place="cuda"))
    assert result == module.check_ranks(subject(place="cuda")) and result.status == SKIPPED
    with pytest.raises(IndexError):
        module.check_after_trial(operator.itemgetter(9), subject(place="cuda"))


@pytest.mark.parametrize(
    ("place", "settings"), [("cpu", {}), ("cuda", {"decode": "cpu"}), ("cuda", {"loader": "torch"})]
)
def test_no_other_process_tries_what_does_not_decode_on_a_gpu(monkeypatch, place, settings):
    monkeypatch.setattr(module.subprocess, "run", raising(AssertionError("must not be called")))
    checked = module.check_after_trial(lambda _: Result(OK, "fine"), subject(place=place, **settings))
    assert checked == (OK, "fine", "")


def test_one_rank_is_told_how_to_start_several():
    assert run_check("ranks", subject())[:2] == (
        SKIPPED, "one rank; `torchrun --nproc-per-node 2 -m iwm_fast doctor` starts more"
    )  # fmt: skip


SAME = {"GPU": "GPU-a", "device": "cuda", "torch": "2.11.0", "iwm-fast": "0.2.0 (commit abc)"}


@pytest.mark.parametrize(
    ("changes", "text", "remedy"),
    [
        ({"GPU": "GPU-a"}, "ranks share a GPU; in order of rank: GPU-b, GPU-a, GPU-a", "one rank per GPU"),
        ({"torch": "2.12.0"}, "torch is 2.11.0 on rank 0 and 2.12.0 on rank 2", "same packages"),
        ({"iwm-fast": "0.2.0 (commit def)"}, "iwm-fast is 0.2.0 (commit abc) on rank 0", "same packages, code"),
        ({"device": "cpu"}, "device is cuda on rank 0 and cpu on rank 2", "kind of device"),
        ({"deepspeed": "0.19"}, "deepspeed is None on rank 0 and 0.19 on rank 2", "same packages"),
    ],
)
def test_ranks_that_differ_or_share_a_gpu_are_a_failure(changes, text, remedy):
    facts = [SAME | {"GPU": "GPU-b"}, SAME, SAME | {"GPU": "GPU-c"}]
    assert find_difference(facts) is None
    result = find_difference([*facts[:2], facts[2] | changes])
    assert result is not None
    assert_failed(result, text, remedy)


def test_ranks_with_different_packages_end_before_the_collective(monkeypatch):
    store = HashStore()
    monkeypatch.setattr(module, "_all_reduce_bandwidth", raising(AssertionError("must not be called")))
    monkeypatch.setattr(module, "_versions", lambda: {"torch": "2.11"})
    store.set("facts of 1", json.dumps({"device": "cpu", "GPU": "none on rank 1", "torch": "2.12"}))
    assert_failed(
        run_check("ranks", subject(ranks=2, store=store)), "torch is 2.11 on rank 0 and 2.12 on rank 1", "same"
    )


def test_rank_0_gets_the_results_of_all_ranks_and_names_the_missing_one():
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    with ThreadPoolExecutor() as pool:
        other = pool.submit(gather, subject(rank=1, ranks=2, store=store), "disk", Result(FAILED, "full", "free it"))
        assert gather(subject(ranks=2, store=store), "disk", Result(OK, "fine")) == [
            (OK, "fine", ""),
            (FAILED, "full", "free it"),
        ]
        assert other.result() == []
    assert gather(subject(ranks=2, store=store), "data", Result(OK, "fine"))[1][:2] == (FAILED, "no result")


def test_the_disk_is_written_and_left_as_it_was(tmp_path):
    status, text, _ = run_check("disk", subject(folder=tmp_path / "runs" / "first"))
    assert status == OK and f"written to {tmp_path} at " in text and "GB free" in text
    assert list(tmp_path.iterdir()) == []
    assert run_check("disk", subject(rank=1, ranks=2)).status == SKIPPED


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_disk_that_cannot_be_written_is_a_failure(monkeypatch, tmp_path, error):
    monkeypatch.setattr(module.os, "fsync", raising(error))
    assert_failed(run_check("disk", subject(folder=tmp_path)), error.strerror, "choose another output.folder")
    assert list(tmp_path.iterdir()) == []


def test_a_shard_is_read_and_rendered(tiny_shards):
    status, text, _ = run_check("data", subject(train=tiny_shards.pattern, loader="torch"))
    assert status == OK and "20 images of " in text and " by torch on 1 thread per rank" in text
    assert re.search(r"faster than about [\d,]+ images/s per rank, this run will be limited by \w+: ", text)
    assert run_check("data", subject())[:2] == (
        SKIPPED,
        "no data.train; `iwm doctor data.train=SHARDS` reads the first shard",
    )


def test_a_shard_that_is_missing_or_cut_off_is_a_failure(tiny_shards, tmp_path):
    assert_failed(run_check("data", subject(train="absent.tar")), "absent.tar", "correct data.train")
    shard = next(tiny_shards.folder.glob("*.tar")).read_bytes()
    (tmp_path / "cut.tar").write_bytes(shard[: len(shard) // 2])
    assert_failed(run_check("data", subject(train=tmp_path / "cut.tar")), "cut.tar", "iwm shards check")


def lines_of(capsys, monkeypatch, checks: dict) -> tuple[int, list[str]]:
    monkeypatch.setattr(module, "CHECKS", checks)
    try:
        main(["doctor"])
        code = 0
    except SystemExit as ended:
        code = ended.code
    printed = capsys.readouterr()
    assert printed.err == ""
    return code, printed.out.splitlines()


def test_what_was_not_looked_at_is_no_failure(capsys, monkeypatch):
    checks = {"a": (lambda _: Result(OK, "fine"), ""), "b": (lambda _: Result(SKIPPED, "no GPU"), "")}
    assert lines_of(capsys, monkeypatch, checks) == (0, [
        "ok      a                fine", "-       b                not looked at: no GPU",
        "all right: 1 ok, 1 not looked at, 0 failed",
    ])  # fmt: skip


def test_a_check_that_raises_or_hangs_fails_and_the_others_still_run(capsys, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT_S", 0.2)
    checks = {
        "raises": (raising(KeyError()), "do this"),
        "hangs": (lambda _: time.sleep(1), "do that"),
        "explains": (lambda _: Result(FAILED, "is bad", "do more"), "do this"),
        "works": (lambda _: Result(OK, "fine"), ""),
    }
    assert lines_of(capsys, monkeypatch, checks) == (1, [
        "FAILED  raises           KeyError", " " * 25 + "remedy: do this",
        "FAILED  hangs            no answer within 0.2 s", " " * 25 + "remedy: do that",
        "FAILED  explains         is bad", " " * 25 + "remedy: do more",
        "ok      works            fine", "something is wrong: 1 ok, 0 not looked at, 3 failed",
    ])  # fmt: skip


def test_every_check_has_general_advice():
    assert all(remedy for _, remedy in CHECKS.values())


@pytest.mark.parametrize("arguments", [["absent.yaml"], ["data.trian=x"]])
def test_a_mistake_in_the_settings_ends_with_one_message(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_an_incomplete_launch_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert "the environment has RANK but not LOCAL_RANK" in capsys.readouterr().err


def test_it_starts_without_the_packages_that_it_looks_at(tmp_path):
    blocked = ("nvidia", "deepspeed", "omegaconf", "webdataset", "braceexpand", "beartype", "pyarrow", "tensorboard")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked}))\nfrom iwm_fast.cli import main; main()"
    command = [sys.executable, "-c", code, "--local_rank=0", "doctor"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout, done.stderr
    assert [line.split()[1] for line in lines if not line.startswith(" ")][:-1] == list(CHECKS)
    assert (
        "FAILED  versions         nvidia.dali, deepspeed, tensorboard, pyarrow are not installed (Python" in done.stdout
    )
    assert lines[-1].endswith(" 2 failed") and "pip install 'iwm-fast[train-cuda13]'" in done.stdout


def launch(command: list[str], *arguments: str) -> tuple[int, list[str]]:
    done = subprocess.run([*command, *arguments], cwd=PROJECT, capture_output=True, text=True, check=False, timeout=150)
    names = (*CHECKS, "all right:", "is wrong:")
    return done.returncode, [
        line for line in done.stdout.splitlines() if any(f" {name} " in f" {line}" for name in names)
    ]


@pytest.mark.slow
@pytest.mark.launcher
@pytest.mark.parametrize("launcher", [torchrun, deepspeed])
def test_two_ranks_print_one_report(launcher, tiny_shards, tmp_path):
    code, lines = launch(
        launcher(target="iwm_fast"), "doctor", f"data.train={tiny_shards.pattern}", f"output.folder={tmp_path}",
        "runtime.device=cpu",
    )  # fmt: skip
    assert code == 0
    assert [line.split()[1] for line in lines[:-1]] == list(CHECKS)
    assert "2 ranks, all_reduce of 64 MiB by gloo: " in lines[6] and lines[6].startswith("ok")
    assert lines[-1] == "all right: 5 ok, 4 not looked at, 0 failed"


@pytest.mark.slow
@pytest.mark.launcher
def test_a_hung_collective_ends_with_a_message_and_the_other_checks_run(tmp_path):
    code, lines = launch(torchrun(target=str(WORKERS / "hung_doctor.py")), str(tmp_path))
    assert code == 1
    assert lines[6].startswith("FAILED  ranks            rank 0, 1: no answer within 10 s")
    assert lines[7].startswith("ok      disk ") and lines[-1].startswith("something is wrong: ")
