"""`iwm demo`: train a small world model on photographs, evaluate it and print a table; `make demo` runs this.

The demo uses the same shards, launcher, engine and evaluations as a large run. Only the model and the data are small.
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.commands.show_batch import show_batch
from iwm_fast.config.evaluation import ImagineConfig, KnnConfig, MrrConfig
from iwm_fast.config.fingerprint import fingerprint, fingerprint_digest
from iwm_fast.config.loading import load_config
from iwm_fast.config.named_configs import CONFIGS
from iwm_fast.config.run import RunConfig
from iwm_fast.config.writable import require_writable
from iwm_fast.evals.probing.knn import evaluate_knn
from iwm_fast.evals.results import Result, read_result
from iwm_fast.evals.retrieval.mrr import evaluate_mrr
from iwm_fast.evals.retrieval.visualize import imagine
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.pipelines.demo_data import write_demo_shards
from iwm_fast.pipelines.storage.atomic import replace_file
from iwm_fast.runtime.json_lines import read_starts
from iwm_fast.runtime.provenance import current_commit
from iwm_fast.training.loaders import open_training_shards
from iwm_fast.training.resume import require_same_shards

CONFIG = CONFIGS / "demo.yaml"
BANK_SIZE = 64
_NUM_EVALUATIONS = 6


def demo(overrides: Sequence[str]) -> None:
    """Write shards, train under the DeepSpeed launcher, evaluate, draw pictures and print one table.

    Results stay in the run folder, and another call with the same settings prints them at once. `overrides` are
    settings as key=value, which replace those of the configuration `demo`.
    """
    console = Console()
    config = load_config(CONFIG, overrides)
    require_writable("output.folder", config.output.folder)
    folder = Path(config.output.folder)
    write_demo_shards(Path(config.data.train).parent)
    require_same_shards(config)
    identity = fingerprint_digest(fingerprint(config, open_training_shards(config.data).content_digest))
    summary = read_summary(folder, identity)
    if summary is None:
        train_with_deepspeed(overrides)
        _announce(1, "pictures of training samples")
        show_batch(config)
        summary = summarize_run(config, identity)
        text = json.dumps(summary, indent=2) + "\n"
        replace_file(folder / "summary.json", lambda draft: draft.write_text(text, encoding="utf-8"))
    console.print(summary_table(summary, folder))


def train_with_deepspeed(overrides: Sequence[str]) -> None:
    """Train with the GPUs of this machine, one rank each and at most 8, or with two ranks on the CPU.

    Raises:
        RuntimeError: if training fails; the launcher has printed the reason.
    """
    _launch("iwm_fast.train", str(CONFIG), *overrides, "resume=auto")


def train_decoder(run: str, num_steps: int) -> Result:
    """Train the pixel decoder of a run for a number of steps on as many ranks, and return how well it decodes.

    Raises:
        RuntimeError: if training fails; the launcher has printed the reason.
    """
    length = f"tune.steps={num_steps}", "tune.global_batch_size=32"
    _launch("iwm_fast.evaluate", "decode", f"run={run}", *length, "controls=false")
    return read_result(Path(run) / "evaluations" / "decode.json")


def choose_num_ranks(num_gpus: int) -> int:
    """Return the number of ranks: a power of two, which divides the demo's batches of 64 and 32 images."""
    return min(2 ** (num_gpus.bit_length() - 1), 8) if num_gpus else 2


def _launch(module: str, *arguments: str) -> None:
    num_ranks = choose_num_ranks(torch.cuda.device_count())
    # DeepSpeed's default port is the same for all jobs of a machine. A free one lets several demos run side by side.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deepspeed = Path(sys.executable).parent / "deepspeed"
    launcher = [str(deepspeed), "--num_accelerators", str(num_ranks), "--master_port", str(port)]
    # At its default level, the launcher prints a dozen lines about its processes.
    launcher += ["--log_level", "warning"]
    command = [*launcher, "--module", module, *arguments]
    print("$", " ".join(command), flush=True)
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise RuntimeError(
            f"training ended with exit code {code}, see its message above; `make clean-demo` deletes the demo's files"
        )


def summarize_run(config: RunConfig, identity: str) -> dict[str, Any]:
    """Evaluate a finished run, draw what it retrieves, and return all numbers of the demo's table.

    `identity` is the digest of settings and shards by which `read_summary` recognises the numbers later.
    """
    run, start = config.output.folder, time.perf_counter()
    # One bank has the jitter strengths that the run was trained with. The default strengths are weaker, so that the
    # images of that bank are more alike and retrieval is harder.
    _announce(2, "MRR with the jitter of training")
    result = evaluate_mrr(MrrConfig(run=run, num_images=BANK_SIZE, bank_size=BANK_SIZE, bank="run"))
    _announce(3, "MRR with weaker jitter")
    weak_result = evaluate_mrr(
        MrrConfig(run=run, num_images=BANK_SIZE, bank_size=BANK_SIZE, bank="default", families=("jitter",))
    )
    mrr, weak_mrr = result.row("jitter", "mrr"), weak_result.row("jitter", "mrr")
    difference, weak_difference = (item.row("jitter", "mrr_difference_readout") for item in (result, weak_result))
    _announce(4, "k-NN accuracy of the encoder")
    knn = evaluate_knn(KnnConfig(run=run)).row("encoder", "accuracy")
    _announce(5, "a decoder from tokens to pixels, which is trained")
    decoded = train_decoder(run, result.step)
    _announce(6, "pictures of predictions")
    picture, *_ = imagine(ImagineConfig(run=run, bank_size=BANK_SIZE, bank="run"))
    return {
        "mrr": mrr.value,
        "mrr_interval": [mrr.low, mrr.high],
        "mrr_chance": mrr.chance,
        "mrr_untrained": mrr.control,
        "mrr_difference": difference.value,
        "mrr_difference_untrained": difference.control,
        "mrr_bank": {"size": BANK_SIZE, "jitter": result.details["bank_strengths"]},
        "mrr_default_bank": weak_mrr.value,
        "mrr_default_bank_untrained": weak_mrr.control,
        "mrr_default_bank_difference": weak_difference.value,
        "mrr_default_bank_difference_untrained": weak_difference.control,
        "knn": knn.value,
        "knn_untrained": knn.control,
        "knn_chance": knn.chance,
        "psnr_db": {view: decoded.value(f"decoder, {view}", "psnr_db") for view in ("clean", "changed")},
        **training_speed(run),
        "evaluation_s": time.perf_counter() - start,
        "picture": str(picture),
        "step": result.step,
        "settings": identity,
        "commit": current_commit(),
        "machine": read_starts(Path(run))[0]["machine"],
    }


def _announce(number: int, what: str) -> None:
    print(f"evaluation {number} of {_NUM_EVALUATIONS}: {what} ...", flush=True)


def training_speed(run: str) -> dict[str, float]:
    """Return images/s, the share of time spent waiting for data, and the seconds of training, from the run's metrics.

    The first row of the metrics counts towards the seconds only, because filling caches slows down its steps.
    """
    first, *rows = read_metrics(Path(run))
    # speed/step_s is a mean over the steps since the previous row, and rows may cover different numbers of steps.
    steps = [row["step"] - previous["step"] for previous, row in zip([first, *rows], rows, strict=False)]
    durations_s = [count * row["speed/step_s"] for count, row in zip(steps, rows, strict=True)]
    images = sum(row["speed/images_per_s"] * time_s for row, time_s in zip(rows, durations_s, strict=True))
    total_s = sum(durations_s)
    return {
        "images_per_s": images / total_s,
        "wait_share": sum(row["data/wait_s"] for row in rows) / total_s,
        "training_s": total_s + first["step"] * first["speed/step_s"],
    }


def read_summary(folder: Path, identity: str) -> dict[str, Any] | None:
    """Return the summary of an earlier demo, or None if it belongs to other settings, checkpoints or versions."""
    path, newest = folder / "summary.json", checkpoints.find_newest_folder(folder)
    if not path.is_file() or newest is None:
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    # Earlier versions trained no decoder.
    is_current = summary["settings"] == identity and "psnr_db" in summary
    is_current &= newest.name == f"step-{summary['step']:08d}"
    return summary if is_current else None


def summary_table(summary: dict[str, Any], folder: Path) -> Table:
    """Return the summary as a table for a terminal."""
    jitter = "/".join(f"{value:g}" for value in summary["mrr_bank"]["jitter"].values())
    title = f"demo: {summary['machine']}, commit {summary['commit']}"
    table = Table("measurement", "world model", "control", title=title)
    chance = f"chance {summary['mrr_chance']:.3f}, untrained predictor "
    table.add_row(
        f"MRR in a bank of {summary['mrr_bank']['size']}, jitter {jitter}",
        "{:.3f} (95 %: {:.3f} .. {:.3f})".format(summary["mrr"], *summary["mrr_interval"]),
        chance + f"{summary['mrr_untrained']:.3f}",
    )
    # By name: the readout or the bank, and the key of its MRR.
    for name, key in (
        ("the same, difference readout", "mrr_difference"),
        ("MRR, jitter 0.4/0.4/0.2/0.1", "mrr_default_bank"),
        ("the same, difference readout", "mrr_default_bank_difference"),
    ):
        table.add_row(name, f"{summary[key]:.3f}", chance + f"{summary[f'{key}_untrained']:.3f}")
    control = f"chance {summary['knn_chance']:.3f}, untrained encoder {summary['knn_untrained']:.3f}"
    table.add_row("k-NN accuracy", f"{summary['knn']:.3f}", control)
    decoded = ", ".join(f"{value:.1f} dB {view}" for view, value in summary["psnr_db"].items())
    table.add_row("pixels decoded from tokens, PSNR", decoded, "")
    table.add_row("training", f"{summary['images_per_s']:.0f} images/s", f"{summary['training_s']:.0f} s in total")
    is_loader_bound = summary["wait_share"] >= 0.05
    advice = "above 5 %: the loader is too slow; raise runtime.loader_threads or add cores" if is_loader_bound else ""
    table.add_row("waiting for data", f"{100 * summary['wait_share']:.1f} %", advice)
    table.add_section()
    table.add_row("pictures", f"{folder}/show.png", summary["picture"])
    table.add_row("numbers", f"{folder}/summary.json", f"{folder}/metrics.jsonl")
    table.add_row("checkpoint, TensorBoard", f"{folder}/checkpoints", f"{folder}/tensorboard")
    return table
