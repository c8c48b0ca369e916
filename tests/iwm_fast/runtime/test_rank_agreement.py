"""Ranks that were started with different settings, packages or data are refused by one message on rank 0."""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from fixtures.launchers import run_starter, tiny_yaml, torchrun
from fixtures.paths import WORKERS
from iwm_fast.config.finetuning import FinetuneConfig
from iwm_fast.config.fingerprint import flat_settings
from iwm_fast.config.loading import build
from iwm_fast.config.run import RunConfig
from iwm_fast.runtime import rank_agreement
from iwm_fast.runtime.error_reporting import PeerFailedError
from iwm_fast.runtime.rank_agreement import require_same_settings


def compare(*settings: dict) -> list[Exception | None]:
    """Return what each of several ranks, which are threads here, raises when they compare their settings."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))

    def rank_result(rank: int) -> Exception | None:
        try:
            require_same_settings(store, rank, len(settings), settings[rank])
        except (ValueError, PeerFailedError) as error:
            return error
        return None

    with ThreadPoolExecutor(len(settings)) as pool:
        return list(pool.map(rank_result, range(len(settings))))


@pytest.mark.parametrize(
    ("config_class", "override", "values"),
    [
        (RunConfig, "optim.lr=0.01", "optim.lr is 0.001 on rank 0 and 0.01 on rank 1"),
        (RunConfig, "seed=3", "seed is 0 on rank 0 and 3 on rank 1"),
        (RunConfig, "optim.precision=fp32", "optim.precision is 'bf16' on rank 0 and 'fp32' on rank 1"),
        (RunConfig, "optim.global_batch_size=16", "optim.global_batch_size is 2048 on rank 0 and 16 on rank 1"),
        (RunConfig, "output.log_every=1", "output.log_every is 10 on rank 0 and 1 on rank 1"),
        (RunConfig, "runtime.rank_timeout_s=9", "runtime.rank_timeout_s is 3600.0 on rank 0 and 9.0 on rank 1"),
        (RunConfig, "runtime.device=cpu", "runtime.device is 'auto' on rank 0 and 'cpu' on rank 1"),
        (RunConfig, "runtime.loader=torch", "runtime.loader is 'dali' on rank 0 and 'torch' on rank 1"),
        (RunConfig, "views.crop.scale=[0.2, 1]", r"views.crop.scale is \[0.3, 1.0\] on rank 0 and \[0.2, 1.0\] on"),
        (RunConfig, "runtime.deepspeed.dump_state=true", "runtime.deepspeed.dump_state is None on rank 0 and True on"),
        (RunConfig, "init_from=weights.pth", "init_from is 'unset' on rank 0 and 'set' on rank 1"),
        (RunConfig, "resume=auto", "resume is 'never' on rank 0 and 'auto' on rank 1"),
        (FinetuneConfig, "tune.lr=0.01", "tune.lr is 0.001 on rank 0 and 0.01 on rank 1"),
        (FinetuneConfig, "arms=encoder", "arms is 'all' on rank 0 and 'encoder' on rank 1"),
    ],
)
def test_a_differing_setting_is_refused_on_all_ranks_and_named_by_one(config_class, override, values):
    first = build(config_class, {}, ["run=r"] if config_class is FinetuneConfig else [])
    other = build(config_class, {}, ["run=r", override] if config_class is FinetuneConfig else [override])
    main, *others = compare(*map(flat_settings, (first, other, first)))
    assert isinstance(main, ValueError) and re.search(f"^the ranks differ: {values}", str(main)), main
    assert str(main).endswith("start all machines with the same command, files and packages")
    assert [type(error) for error in others] == [PeerFailedError] * 2


def test_many_differences_are_counted_and_the_first_rank_is_named():
    same, other = dict.fromkeys("abcdefgh", 1), dict.fromkeys("abcdefgh", 2)
    message = str(compare(same, same, other, other)[0])
    assert message.startswith("the ranks differ: a is 1 on rank 0 and 2 on rank 2; b is") and "; 3 more;" in message


def test_equal_settings_and_paths_that_may_differ_are_accepted():
    one, two = (
        flat_settings(
            build(RunConfig, {}, [f"data.train={folder}/x.tar", f"data.val={folder}/y", f"init_from={folder}"])
        )
        for folder in ("/a", "/b")
    )
    assert compare(one, two) == [None, None] and {"data.train", "output.folder", "runtime.ops"} <= one.keys()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("version of the source of iwm-fast", "_source_digest"),
        ("version of torch", "installed_versions"),
        ("version of nvidia-dali-cuda130", "installed_versions"),
    ],
)
def test_other_packages_on_a_rank_are_refused(monkeypatch, name, function):
    package = name.removeprefix("version of ")
    answers = iter(["1.0", "2.0"])
    answer = (lambda: next(answers)) if function == "_source_digest" else (lambda: {package: next(answers)})
    monkeypatch.setattr(rank_agreement, function, answer)
    assert f"{name} is " in str(compare({}, {})[0])


def test_a_variable_that_changes_results_is_compared(monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert rank_agreement._describe_environment()["environment variable NVIDIA_TF32_OVERRIDE"] == "1"


@pytest.fixture
def start(tiny_shards, tmp_path):
    """Return a function that starts two ranks, of which rank 1 has further settings, and returns code and output."""
    settings = tiny_yaml(tmp_path / "run.yaml", tiny_shards, runtime={"engine": "plain", "loader": "torch"})

    def act(*of_rank_1: str) -> tuple[int, str]:
        with run_starter(settings, tmp_path / "run") as begin:
            run = begin(torchrun(target=str(WORKERS / "differing_train.py")), IWM_RANK_1="\n".join(of_rank_1))
            return run.end(), run.log.read_text()

    return act


@pytest.mark.launcher
@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.lr=0.01", "error (rank 0): the ranks differ: optim.lr is 0.001 on rank 0 and 0.01 on rank 1; start"),
        ("runtime.rank_timeout_s=30", "the ranks differ: runtime.rank_timeout_s is 3600.0 on rank 0 and 30.0 on rank"),
        ("optim.lr=abc", "error (rank 1): optim.lr must be a finite number, got 'abc'"),
        ("data.train=ONE_SHARD", "rank 1: 1 shards, but 3 on rank 0; copy the shards of rank 0"),
        ("data.train=absent.tar", "error (rank 0): data.train = 'absent.tar' on rank 1: shard pattern 'absent.tar'"),
        ("init_from=absent", "the ranks differ: init_from is 'unset' on rank 0 and 'set' on rank 1"),
    ],
)
def test_ranks_under_a_launcher_end_with_one_message_and_write_nothing(start, tiny_shards, tmp_path, setting, message):
    code, output = start(setting.replace("ONE_SHARD", str(min(tiny_shards.folder.glob("*.tar")))))
    assert code != 0 and output.count("error (rank") == 1 and message in output, output
    # Rank 0 waits for the other one, and is asked to stop by the launcher.
    assert {path.name for path in (tmp_path / "run").glob("*")} <= ({"status.json"} if "abc" in setting else set())


@pytest.mark.launcher
@pytest.mark.slow
def test_a_rank_may_read_copies_of_the_shards_with_the_same_content(start, tiny_shards, tmp_path):
    copies = shutil.copytree(tiny_shards.folder, tmp_path / "copies")
    code, output = start(f"data.train={copies}", "data.val=elsewhere")
    assert code == 0, output
    # The same samples in another order are not the same data.
    backwards = "::".join(sorted(map(str, copies.glob("*.tar")), reverse=True))
    code, output = start(f"data.train={backwards}")
    assert code != 0 and "has other samples than" in output, output
