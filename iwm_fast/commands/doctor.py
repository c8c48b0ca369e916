"""`iwm doctor`: look at a new machine or cluster, one line per check, and say what to do about each failure.

A check imports what it looks at by itself, so that the others run where a package is missing. A check fails by
returning a failure, by raising or by not returning.
"""

import io
import json
import os
import pickle
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.cuda import nccl
from torch.distributed import PrefixStore, Store, rendezvous  # pyright: ignore[reportPrivateImportUsage]

import iwm_fast
from iwm_fast.config.run import RunConfig, RuntimeConfig
from iwm_fast.runtime import provenance
from iwm_fast.runtime.distributed import RankInfo, choose_device, read_environment
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.runtime.extras import find_missing_package, require_packages, require_training_packages

TIMEOUT_S = 120.0
"""Seconds after which a check counts as hung. The first comparison of a kernel compiles it."""
OK, SKIPPED, FAILED = "ok", "-", "FAILED"
# Decoders and resizing round differently at edges. These are the limits of the tests of the loader on a GPU.
_MEAN_LEVELS, _P98_LEVELS = 1.5, 8.0
# Mean of a single image, larger because a threshold may enlarge differences of one level in many of its pixels.
_IMAGE_LEVELS = 6.0
_BATCH_SIZE = 32
_NUM_BYTES = 64 * 2**20
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


class Result(NamedTuple):
    """What a check found."""

    status: str
    """OK, SKIPPED or FAILED."""
    text: str
    remedy: str = ""
    """What to do about a failure. Empty: what `CHECKS` says."""


class Subject(NamedTuple):
    """What is looked at: this rank of a run, with the store through which ranks exchange values if there are others."""

    config: RunConfig
    info: RankInfo
    store: Store | None = None


def check_gpu(subject: Subject) -> Result:
    """Look at the driver, and at name, compute capability and memory of this rank's GPU, and compute on it."""
    setting = subject.config.runtime.device
    if setting == "cpu" or not (setting == "cuda" or torch.cuda.is_available() or _DRIVER_FILE.exists()):
        return Result(SKIPPED, "runtime.device=cpu" if setting == "cpu" else "no NVIDIA driver, so no GPU")
    # Its error says why there is no GPU, for instance that the driver is too old for this build of torch.
    torch.cuda.init()
    device = choose_device("cuda", subject.info.local_rank)
    torch.ones(1000, device=device).sum().item()
    match = re.search(r"Kernel Module[^\d]*([\d.]+)", _DRIVER_FILE.read_text() if _DRIVER_FILE.exists() else "")
    free, size = (amount / 1e9 for amount in torch.cuda.mem_get_info(device))
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}, compute capability {capability}"
    driver = match[1] if match else "unknown"
    return Result(OK, f"{gpus}, {free:.0f} of {size:.0f} GB free, driver {driver}, CUDA {torch.version.cuda}")


def check_versions(subject: Subject) -> Result:
    """List versions, and import the packages that this run needs."""
    runtime, loggers = subject.config.runtime, subject.config.output.loggers
    text = ", ".join(f"{name} {version}" for name, version in _versions().items())
    try:
        require_training_packages(runtime.loader, runtime.engine, loggers)
    except ModuleNotFoundError as error:
        problem, _, remedy = str(error).partition(": ")
        return Result(FAILED, f"{problem} ({text})", remedy)
    if runtime.engine == "deepspeed":
        from iwm_fast.engines.deepspeed_engine import import_deepspeed

        import_deepspeed(subject.info.device)
    return Result(OK, text)


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version(), **provenance.installed_versions()}
    versions["iwm-fast"] = f"{iwm_fast.__version__} (commit {provenance.current_commit()})"
    has_nccl = torch.version.cuda is not None and dist.is_nccl_available()
    return versions | {"NCCL": ".".join(map(str, nccl.version())) if has_nccl else "missing"}


def check_kernel(operation: str, subject: Subject) -> Result:
    """Compare a fused operation with PyTorch's, in the shapes and the precision of the run."""
    config, device = subject.config, subject.info.device
    if device.type != "cuda":
        return Result(SKIPPED, "no GPU")
    from iwm_fast.models.kernel_check import kernel_errors, tolerance
    from iwm_fast.models.student import choose_ops

    try:
        choose_ops(replace(config, runtime=replace(config.runtime, ops="fused")), device)
    except ValueError as error:
        return Result(SKIPPED, str(error))
    errors, limit = dict(kernel_errors(config, device, operation)), tolerance(config)
    text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items()) or "not used by this run"
    # Not `error > limit`, which would let a NaN pass.
    status = OK if all(error <= limit for error in errors.values()) else FAILED
    return Result(status, f"relative errors: {text}; accepted {limit:g}")


def check_dali(subject: Subject) -> Result:
    """Decode and render JPEGs by DALI on the device, and compare the pixels with those of the torch loader."""
    if subject.config.runtime.loader == "torch":
        return Result(SKIPPED, "runtime.loader=torch")
    require_packages(["nvidia.dali"])
    from iwm_fast.commands.measured_speed import open_loader
    from iwm_fast.pipelines.storage.shard_set import open_shards
    from iwm_fast.pipelines.transforms.normalization import denormalize_view

    views, device = [], subject.info.device
    with tempfile.TemporaryDirectory() as folder:
        _write_shard(Path(folder, "generated.tar"))
        shards = open_shards(folder)
        for runtime, place in ((subject.config.runtime, device), (RuntimeConfig(loader="torch"), torch.device("cpu"))):
            with closing(open_loader(replace(subject.config, runtime=runtime), shards, place)) as loader:
                view = denormalize_view(next(loader).source_view, subject.config.data.normalization)
                views.append(view.cpu().int())
    difference = (views[0] - views[1]).abs().numpy()
    mean, p98 = float(difference.mean()), float(np.quantile(difference, 0.98))
    worst = float(difference.mean((1, 2, 3)).max())
    text = f"JPEGs rendered on {device.type} differ from the torch loader's by {mean:.2f} grey levels on average"
    text = f"{text}, the worst one by {worst:.2f}, 98 % of the pixels by at most {p98:.0f}"
    status = OK if mean < _MEAN_LEVELS and worst < _IMAGE_LEVELS and p98 <= _P98_LEVELS else FAILED
    return Result(status, f"{text}; accepted {_MEAN_LEVELS:g}, {_IMAGE_LEVELS:g} and {_P98_LEVELS:g}")


def _write_shard(path: Path) -> None:
    """Write JPEGs of waves: smooth, and coarse enough for decoders to agree on their edges."""
    waves = np.sin(np.mgrid[:240, :320].sum(0)[..., None] / [5, 9, 23])
    Image.fromarray((127 + 100 * waves).astype(np.uint8)).save(content := io.BytesIO(), "JPEG", quality=90)
    with tarfile.open(path, "w") as archive:
        for number in range(_BATCH_SIZE):
            member = tarfile.TarInfo(f"{number:02}.jpg")
            member.size = content.tell()
            archive.addfile(member, io.BytesIO(content.getvalue()))


def check_ranks(subject: Subject) -> Result:
    """Compare the ranks with each other, and measure a sum over all of them."""
    _, info, store = subject
    if store is None:
        count = max(2, torch.cuda.device_count())
        return Result(SKIPPED, f"one rank; `torchrun --nproc-per-node {count} -m iwm_fast doctor` starts more")
    # A connection of its own: a thread that hangs in a store would keep it from `gather`.
    store, is_gpu = store.clone(), info.device.type == "cuda"
    gpu = str(torch.cuda.get_device_properties(info.device).uuid) if is_gpu else f"none on rank {info.rank}"
    store.set(f"facts of {info.rank}", json.dumps({"device": info.device.type, "GPU": gpu, **_versions()}))
    difference = find_difference([json.loads(store.get(f"facts of {rank}")) for rank in range(info.world_size)])
    if difference is not None:
        return difference
    bandwidth = _all_reduce_bandwidth(info, store)
    text = f"{info.world_size} ranks{' on different GPUs' if is_gpu else ''}, all_reduce of {_NUM_BYTES >> 20} MiB by"
    return Result(OK, f"{text} {'NCCL' if is_gpu else 'gloo'}: {bandwidth / 1e9:.3g} GB/s of bus bandwidth")


def find_difference(facts: list[dict[str, str]]) -> Result | None:
    """Return a failure if ranks differ, or share a GPU; None if all is well. `facts` has the values of each rank."""
    gpus = [own["GPU"] for own in facts]
    for rank, own in enumerate(facts):
        different = [name for name in sorted(own.keys() | facts[0].keys()) if own.get(name) != facts[0].get(name)]
        for name in set(different) - {"GPU"}:
            text = f"{name} is {facts[0].get(name)} on rank 0 and {own.get(name)} on rank {rank}"
            return Result(FAILED, text, "start all ranks with the same packages, code and kind of device")
    if len(set(gpus)) < len(gpus):
        remedy = "start one rank per GPU, as torchrun does: on each machine, LOCAL_RANK counts from 0"
        return Result(FAILED, f"ranks share a GPU; in order of rank: {', '.join(gpus)}", remedy)
    return None


def _all_reduce_bandwidth(info: RankInfo, store: Store) -> float:
    """Return the bus bandwidth in bytes per second, as nccl-tests define it: 2 (n - 1) / n * size / time."""
    is_gpu, ranks, seconds = info.device.type == "cuda", info.world_size, list[float]()
    dist.init_process_group(
        "nccl" if is_gpu else "gloo", store=PrefixStore("doctor", store), rank=info.rank, world_size=ranks,
        # Longer than a check may take: NCCL would end the process, and with it the report.
        timeout=timedelta(seconds=20 * TIMEOUT_S), device_id=info.device if is_gpu else None,
    )  # fmt: skip
    for _ in range(6):
        numbers = torch.full((_NUM_BYTES // 4,), info.rank + 1.0, device=info.device)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(numbers)
        # Reading a number waits for the GPU.
        total, expected = numbers[-1].item(), ranks * (ranks + 1) / 2
        seconds.append(time.perf_counter() - began)
        if total != expected:
            raise ArithmeticError(f"the sum over all ranks is {total:g} instead of {expected:g}")
    dist.destroy_process_group()
    # The first one makes the connections.
    return 2 * (ranks - 1) / ranks * _NUM_BYTES / statistics.median(seconds[1:])


def check_disk(subject: Subject) -> Result:
    """Write a file to the disk of output.folder and remove it; once on each machine."""
    if subject.info.local_rank > 0:
        return Result(SKIPPED, "the first rank of the machine writes")
    folder = Path(subject.config.output.folder).absolute()
    folder = next(place for place in (folder, *folder.parents) if place.exists())
    content = os.urandom(_NUM_BYTES)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".iwm-doctor-") as file:
        began = time.perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        speed = _NUM_BYTES / (time.perf_counter() - began)
    free = shutil.disk_usage(folder).free / 1e9
    return Result(OK, f"{_NUM_BYTES >> 20} MiB written to {folder} at {speed / 1e6:,.0f} MB/s, {free:,.1f} GB free")


def check_data(subject: Subject) -> Result:
    """Read the first shard of data.train, and render its images as training does."""
    config, runtime = subject.config, subject.config.runtime
    if not config.data.train:
        return Result(SKIPPED, "no data.train; `iwm doctor data.train=SHARDS` reads the first shard")
    from iwm_fast.commands.measured_speed import measure_reading, measure_rendering, predict_limit
    from iwm_fast.pipelines.storage.shard_set import find_shards, open_shards

    path = find_shards(config.data.train)[0]
    shards = open_shards(path, config.data.image, max_pixels=config.data.max_pixels)
    reading = measure_reading(shards, runtime.reader_threads)
    decoding = measure_rendering(config, shards, subject.info.device)
    limit = predict_limit(config, [reading, decoding], is_on_gpu=subject.info.device.type == "cuda")
    return Result(OK, f"{reading}; {decoding} per rank; {limit}")


# Only signals count, so it ends at once, without what libraries do at the end of a process.
_TRIAL = """
import os, pickle, sys
try:
    check, subject = pickle.load(sys.stdin.buffer)
    check(subject)
finally:
    os._exit(0)
"""


def check_after_trial(check: Callable[[Subject], Result], subject: Subject) -> Result:
    """Make a check that decodes on a GPU, after another process has tried it: a crash would end the report."""
    runtime = subject.config.runtime
    if subject.info.device.type != "cuda" or runtime.loader != "dali" or runtime.decode != "gpu":
        return check(subject)
    # The process has no part in the exchange between ranks.
    command, trial = [sys.executable, "-c", _TRIAL], pickle.dumps((check, subject._replace(store=None)))
    done = subprocess.run(command, input=trial, capture_output=True, check=False, timeout=TIMEOUT_S)
    # What the check finds or raises, it will find or raise here.
    if done.returncode >= 0:
        return check(subject)
    name = signal.Signals(-done.returncode).name
    return Result(FAILED, f"decoding on the GPU ends the process by {name}", "set runtime.decode=cpu, and report this")


_REPORT = "set runtime.ops=reference and report this with this output; a newer triton or driver may help"
CHECKS = {
    "GPU": (check_gpu, "update the driver, or install the build of torch for its CUDA version (pytorch.org); pass the "
            "GPUs to the container; look at CUDA_VISIBLE_DEVICES; or set runtime.device=cpu"),
    "versions": (check_versions, "install the package again: pip install 'iwm-fast[train-cuda13]'"),
    **{name: (partial(check_kernel, name), _REPORT) for name in ("attention", "residual_norm", "predictor_input")},
    "DALI": (partial(check_after_trial, check_dali), "install DALI for the driver's CUDA version, set "
             "runtime.decode=cpu if only the GPU's decoder fails, or set runtime.loader=torch"),
    "ranks": (check_ranks, "set NCCL_DEBUG=INFO to see more; name the network interface in NCCL_SOCKET_IFNAME "
              "(GLOO_SOCKET_IFNAME on CPUs); open the ports between machines"),
    "disk": (check_disk, "free space or quota, make the folder writable, or choose another output.folder"),
    "data": (partial(check_after_trial, check_data),
             "correct data.train; `iwm shards check SHARDS` names damaged files"),
}  # fmt: skip
"""Function and general advice of each check by name, in this order."""


def doctor(arguments: list[str]) -> None:
    """Print one line per check and a verdict; under a launcher, rank 0 prints for all ranks.

    Raises:
        SystemExit: with code 1 if a check failed.
    """
    with same_error_on_all_ranks():
        subject = _join(_read(arguments))
    statuses = []
    for name in CHECKS:
        results = gather(subject, name, run_check(name, subject))
        if results:
            statuses.append(_print_line(name, results))
    # Other ranks print nothing, and never fail: the launcher would end rank 0 before its verdict.
    if statuses:
        ok, skipped, failed = map(statuses.count, (OK, SKIPPED, FAILED))
        verdict = "something is wrong" if failed else "all right"
        print(f"{verdict}: {ok} ok, {skipped} not looked at, {failed} failed", flush=True)
        if failed:
            raise SystemExit(1)


def _read(arguments: list[str]) -> RunConfig:
    if not arguments:
        return RunConfig()
    from iwm_fast.config.loading import build, load_config

    return build(RunConfig, {}, arguments) if "=" in arguments[0] else load_config(arguments[0], arguments[1:])


def _join(config: RunConfig) -> Subject:
    """Find the other ranks of the launch."""
    rank, local_rank, world_size = read_environment()
    device, store = torch.device("cpu"), None
    # The check of the GPU reports the error.
    with suppress(RuntimeError):
        device = choose_device(config.runtime.device, local_rank)
    if world_size > 1:
        try:
            store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timedelta(seconds=TIMEOUT_S)))
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {rank} does not find the others: {error}; open MASTER_PORT on MASTER_ADDR"
            ) from error
        # Slow checks of other ranks are waited for.
        store.set_timeout(timedelta(seconds=2 * TIMEOUT_S))
    return Subject(config, RankInfo(rank=rank, local_rank=local_rank, world_size=world_size, device=device), store)


def run_check(name: str, subject: Subject) -> Result:
    """Run a check, and return its result also if it raises, or hangs in the thread in which it runs."""
    function, remedy = CHECKS[name]
    device = subject.info.device

    def check() -> Result:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return function(subject)

    try:
        result = ThreadPoolExecutor(1).submit(check).result(TIMEOUT_S)
    except Exception as error:
        text = " ".join(str(find_missing_package(error) or error).split())[:400]
        hung = f"no answer within {TIMEOUT_S:g} s" if isinstance(error, TimeoutError) else type(error).__name__
        result = Result(FAILED, text or hung)
    return result._replace(remedy=result.remedy or remedy)


def gather(subject: Subject, name: str, result: Result) -> list[Result]:
    """Return the results of all ranks on rank 0, for which the other ranks wait; those return an empty list."""
    _, info, store = subject
    if store is None:
        return [result]
    store.set(f"{name} of {info.rank}", json.dumps(result))
    if info.rank > 0:
        # Rank 0 may have ended.
        with suppress(RuntimeError):
            store.get(f"{name} is done")
        return []
    results = []
    for rank in range(info.world_size):
        try:
            results.append(Result(*json.loads(store.get(f"{name} of {rank}"))))
        except RuntimeError:
            results.append(Result(FAILED, "no result", "look for its message above"))
    store.set(f"{name} is done", "")
    return results


def _print_line(name: str, results: list[Result]) -> str:
    """Print rank 0's result, or else the first failure and its ranks; return the status."""
    failed = [rank for rank, result in enumerate(results) if result.status == FAILED]
    status, text, remedy = results[failed[0] if failed else 0]
    if len(results) > 1 and failed:
        text = f"rank {', '.join(map(str, failed))}: {text}"
    text = f"not looked at: {text}" if status == SKIPPED else text
    print(f"{status:<6}  {name:<15}  {text}", flush=True)
    if failed:
        print(f"{'':25}remedy: {remedy}", flush=True)
    return status
