"""`iwm report run=DIR`: one self-contained HTML page of a run."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.config.loading import iter_settings, load_run_config, to_tree
from iwm_fast.config.run import RunConfig
from iwm_fast.evals.results import Result, Row, read_result
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.monitoring.step_timer import PARTS
from iwm_fast.rendering.charts import curves, shares
from iwm_fast.rendering.html import card, escape, folded, page, picture, section, table, tiles
from iwm_fast.runtime.run_status import read_status

# curves that are drawn together: title, unit, names in metrics.jsonl by label
_CURVES = (
    ("Prediction loss", "per token", {"loss": "loss/prediction"}),
    ("Collapse: spread and likeness", "", {"spread of target tokens": "monitor/target_std",
                                           "cosine between images": "monitor/cosine",
                                           "loss over predicting the mean": "monitor/loss_over_mean"}),
    ("Collapse: effective rank of target tokens", "dimensions", {"RankMe": "monitor/rank_me"}),
    ("Speed", "images/s", {"images/s": "speed/images_per_s"}),
    ("Learning rate", "", {"learning rate": "optim/lr"}),
    ("Gradient norm before clipping", "", {"gradient norm": "optim/grad_norm"}),
    ("Evaluation on the way", "", {"MRR": "eval/mrr", "MRR, untrained": "eval/mrr_untrained", "k-NN": "eval/knn",
                                   "k-NN, untrained": "eval/knn_untrained"}),
)  # fmt: skip
_PICTURES = {
    "show.png": "What the model saw",
    "imagine.png": "Source, requested change, and what the prediction retrieves",
    "imagine_sweeps.png": "Each entry of the action swept",
    "evaluations/segment.png": "Segmentation",
}


def write_run_report(run: Path) -> Path:
    """Write RUN/report.html and return it.

    Raises:
        FileNotFoundError: if the folder holds no run.
    """
    config = load_run_config(run)
    rows, results = read_metrics(run), [read_result(path) for path in sorted(run.glob("evaluations/*.json"))]
    parts = [f"<h1>{escape(run.name)}</h1>", _about_run(run), tiles(_headline(rows, results))]
    if rows:
        parts += [section("Curves", '<div class="grid">' + "".join(_curves(rows)) + "</div>"), _split(rows)]
    parts += [section("Evaluations", *(_result(result) for result in results))] if results else []
    pictures = [name for name in _PICTURES if (run / name).is_file()]
    parts += (
        [section("Pictures", *(card(_PICTURES[name], picture(run / name, _PICTURES[name])) for name in pictures))]
        if pictures
        else []
    )
    parts.append(section("Settings", _differences(config), folded("every setting", yaml.safe_dump(to_tree(config)))))
    path = run / "report.html"
    path.write_text(page(f"iwm-fast: {run.name}", parts), encoding="utf-8")
    return path


def _about_run(run: Path) -> str:
    lines = (run / "started.jsonl").read_text(encoding="utf-8").splitlines() if (run / "started.jsonl").exists() else []
    started = json.loads(lines[-1]) if lines else {}
    newest, status = checkpoints.newest(run), read_status(run)
    said = {
        "machine": started.get("machine"),
        "ranks": started.get("world_size"),
        "commit": started.get("commit"),
        "status": " ".join(str(status.get(name, "")) for name in ("state", "reason")).strip(),
        "checkpoint": newest.name if newest else "none",
    }
    line = " · ".join(f"{name} {escape(value)}" for name, value in said.items() if value not in (None, ""))
    return f'<p class="soft">{line}</p><p class="soft small"><code>{escape(started.get("command", ""))}</code></p>'


def _headline(rows: list[dict[str, Any]], results: list[Result]) -> dict[str, str]:
    values = {}
    for task, subject, metric, name in (
        ("mrr", "jitter", "mrr", "MRR"), ("knn", "", "accuracy", "k-NN accuracy"), ("linear", "", "accuracy", "linear"),
    ):  # fmt: skip
        for result in (one for one in results if one.task == task):
            for row in result.rows:
                if row.metric == metric and (not subject or row.subject == subject):
                    chance = "" if row.chance is None else f", chance {row.chance:.3f}"
                    values[f"{name} ({result.name}{chance})"] = f"{row.value:.3f}"
    if rows:
        last = rows[-1]
        values["steps"] = f"{last['step']:,}"
        values["images/s at the end"] = f"{last['speed/images_per_s']:.0f}"
        values["prediction loss"] = f"{last['loss/prediction']:.4f}"
        values["waiting for data"] = f"{100 * last['data/wait_share']:.1f} %"
        if last.get("speed/mfu") is not None:
            values["MFU"] = f"{100 * last['speed/mfu']:.1f} %"
    return values


def _curves(rows: list[dict[str, Any]]) -> list[str]:
    drawn = []
    for title, unit, names in _CURVES:
        found = {label: [row for row in rows if row.get(name) is not None] for label, name in names.items()}
        lines = {
            label: ([row["step"] for row in own], [row[names[label]] for row in own])
            for label, own in found.items()
            if own
        }
        drawn += [card(title, curves(lines, unit=unit))] if lines else []
    return drawn


def _split(rows: list[dict[str, Any]]) -> str:
    """Show where the time of a step goes: the mean of all log rows but the first, which fills caches."""
    used = rows[1:] or rows
    names = [*PARTS, "other"]
    means = {name: 1000 * sum(row[f"time/{name}_s"] for row in used) / len(used) for name in names}
    said = '<p class="soft small">Mean over ranks; a step of all ranks takes as long as the slowest.</p>'
    return section("Where the time of a step goes", card("milliseconds", shares(means, unit="ms"), said))


def _result(result: Result) -> str:
    cells: dict[str, Callable[[Row], str]] = {
        "": lambda row: row.subject,
        "measured": lambda row: row.metric,
        "value": lambda row: f"{row.value:.4f}",
        "95 % interval": lambda row: "" if row.low is None else f"{row.low:.4f} to {row.high:.4f}",
        "control": lambda row: "" if row.control is None else f"{row.control:.4f}",
        "what that is": lambda row: row.control_name,
        "chance": lambda row: "" if row.chance is None else f"{row.chance:.4f}",
        "tuned": lambda row: f"{row.num_tuned:,}" if row.num_tuned else "",
        "images": lambda row: f"{row.num_samples:,}" if row.num_samples else "",
    }
    filled = {name: cell for name, cell in cells.items() if any(cell(row) for row in result.rows)}
    body = table(list(filled), [[cell(row) for cell in filled.values()] for row in result.rows])
    return card(f"{result.name}, step {result.step}, seed {result.seed}", body)


def _differences(config: RunConfig) -> str:
    """Show what differs from the defaults."""
    flat = dict(_flatten(to_tree(config)))
    defaults = {name: value for name, _, value, _ in iter_settings(RunConfig)}
    rows = [
        (name, json.dumps(value))
        for name, value in flat.items()
        if name in defaults and json.dumps(value) != json.dumps(defaults[name])
    ]
    return table(["setting", "value"], rows)


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in tree.items():
        inner = isinstance(value, dict) and name in {one.name for one in fields(RunConfig)} | {"encoder", "predictor"}
        flat += _flatten(value, f"{prefix}{name}.") if inner else [(f"{prefix}{name}", value)]
    return flat
