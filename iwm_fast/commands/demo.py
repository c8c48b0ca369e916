"""Photographs to a trained, measured world model in one command; what `make demo` runs.

Every part is the real one: shards, launcher, engine, evaluations. Only the model and the data are small.
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
from iwm_fast.commands.show_batch import show
from iwm_fast.config.evaluation import ImagineConfig, KnnConfig, MrrConfig
from iwm_fast.config.fingerprint import digest, fingerprint
from iwm_fast.config.loading import load_config
from iwm_fast.config.run import RunConfig
from iwm_fast.evals.probing.knn import evaluate_knn
from iwm_fast.evals.retrieval.mrr import evaluate_mrr
from iwm_fast.evals.retrieval.visualize import imagine
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.pipelines.demo_data import write_demo_shards
from iwm_fast.runtime.provenance import commit
from iwm_fast.training.loaders import open_training_shards

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
BANK = 64


def demo(overrides: Sequence[str]) -> None:
    """Write shards, train under the DeepSpeed launcher, evaluate, draw, print one table; what is done is kept."""
    console = Console()
    config = load_config(CONFIG, overrides)
    folder = Path(config.output.folder)
    write_demo_shards(Path(config.data.train).parent)
    identity = digest(fingerprint(config, open_training_shards(config.data).content_digest))
    summary = read_summary(folder, identity)
    if summary is None:
        launch(overrides)
        show(config)
        summary = measure(config, identity)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.print(table(summary, folder))


def launch(overrides: Sequence[str]) -> None:
    """Train on every GPU, or on two CPU ranks.

    Raises:
        RuntimeError: if training failed; its message stands above.
    """
    num_ranks = torch.cuda.device_count() or 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deepspeed = Path(sys.executable).parent / "deepspeed"
    launcher = [str(deepspeed), "--num_accelerators", str(num_ranks), "--master_port", str(port)]
    command = [*launcher, "--module", "iwm_fast.train", str(CONFIG), *overrides, "resume=auto"]
    print("$", " ".join(command), flush=True)
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise RuntimeError(
            f"training ended with exit code {code}; its message stands above; `make clean-demo` starts anew"
        )


def measure(config: RunConfig, identity: str) -> dict[str, Any]:
    """Evaluate the run and sum up its speed."""
    run, started = config.output.folder, time.perf_counter()
    # the bank of the strengths the run was trained with comes first; the default one is weaker and so harder
    own = evaluate_mrr(MrrConfig(run=run, num_images=BANK, bank_size=BANK, bank="run"))
    weak = evaluate_mrr(MrrConfig(run=run, num_images=BANK, bank_size=BANK, bank="default", families=("jitter",)))
    mrr, weak_mrr = (result.row("jitter", "mrr") for result in (own, weak))
    knn = evaluate_knn(KnnConfig(run=run)).row("encoder", "accuracy")
    picture, *_ = imagine(ImagineConfig(run=run, bank_size=BANK))
    return {
        "mrr": mrr.value,
        "mrr_interval": [mrr.low, mrr.high],
        "mrr_chance": mrr.chance,
        "mrr_untrained": mrr.control,
        "mrr_bank": {"size": BANK, "jitter": own.details["bank_strengths"]},
        "mrr_default_bank": weak_mrr.value,
        "mrr_default_bank_untrained": weak_mrr.control,
        "knn": knn.value,
        "knn_untrained": knn.control,
        "knn_chance": knn.chance,
        **speed(run),
        "evaluation_s": time.perf_counter() - started,
        "picture": str(picture),
        "step": own.step,
        "settings": identity,
        "commit": commit(),
        "machine": json.loads((Path(run) / "started.jsonl").read_text().splitlines()[0])["machine"],
    }


def speed(run: str) -> dict[str, float]:
    """Return images/s, waiting and time of training from its log rows, without the first: it fills caches."""
    first, *rows = read_metrics(Path(run))
    steps = [row["step"] - before["step"] for before, row in zip([first, *rows], rows, strict=False)]
    lasted = [count * row["speed/step_s"] for count, row in zip(steps, rows, strict=True)]
    images = sum(row["speed/images_per_s"] * time_s for row, time_s in zip(rows, lasted, strict=True))
    total_s = sum(lasted)
    return {
        "images_per_s": images / total_s,
        "wait_share": sum(row["data/wait_s"] for row in rows) / total_s,
        "training_s": total_s + first["step"] * first["speed/step_s"],
    }


def read_summary(folder: Path, identity: str) -> dict[str, Any] | None:
    """Return the summary of an earlier demo if it belongs to these settings and this folder's newest checkpoint."""
    path, newest = folder / "summary.json", checkpoints.newest(folder)
    if not path.is_file() or newest is None:
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    is_same = summary["settings"] == identity and newest.name == f"step-{summary['step']:08d}"
    return summary if is_same else None


def table(summary: dict[str, Any], folder: Path) -> Table:
    """Lay out the summary for a terminal."""
    jitter = "/".join(f"{value:g}" for value in summary["mrr_bank"]["jitter"].values())
    rows = Table("what", "world model", "control", title=f"demo: {summary['machine']}, commit {summary['commit']}")
    chance = f"chance {summary['mrr_chance']:.3f}, untrained predictor "
    rows.add_row(
        f"MRR in a bank of {summary['mrr_bank']['size']}, jitter {jitter}",
        "{:.3f} (95 %: {:.3f} .. {:.3f})".format(summary["mrr"], *summary["mrr_interval"]),
        chance + f"{summary['mrr_untrained']:.3f}",
    )
    weak = f"{summary['mrr_default_bank']:.3f}"
    rows.add_row("MRR, jitter 0.4/0.4/0.2/0.1", weak, chance + f"{summary['mrr_default_bank_untrained']:.3f}")
    control = f"chance {summary['knn_chance']:.3f}, untrained encoder {summary['knn_untrained']:.3f}"
    rows.add_row("k-NN accuracy", f"{summary['knn']:.3f}", control)
    rows.add_row("training", f"{summary['images_per_s']:.0f} images/s", f"{summary['training_s']:.0f} s in all")
    limit = (
        "" if summary["wait_share"] < 0.05 else "above 5 %: the loader limits; give it runtime.loader_threads or cores"
    )
    rows.add_row("waiting for data", f"{100 * summary['wait_share']:.1f} %", limit)
    rows.add_section()
    rows.add_row("pictures", f"{folder}/show.png", summary["picture"])
    rows.add_row("numbers", f"{folder}/summary.json", f"{folder}/metrics.jsonl")
    rows.add_row("checkpoint, TensorBoard", f"{folder}/checkpoints", f"{folder}/tensorboard")
    return rows
