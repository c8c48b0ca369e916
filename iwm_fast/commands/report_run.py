"""`iwm report run=DIR`: write a self-contained HTML page about a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.config.loading import config_to_dict, load_run_config
from iwm_fast.config.run import RunConfig
from iwm_fast.evals.results import Result, Row, read_result
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.monitoring.step_timer import PHASES
from iwm_fast.monitoring.throughput import format_rate
from iwm_fast.pipelines.storage.atomic import replace_file
from iwm_fast.rendering.charts import IntervalChart, IntervalPoint, draw_line_chart, draw_plot, draw_waterfall_chart
from iwm_fast.rendering.html import card, collapsible, embedded_png, escape, metric_tiles, page, section, table
from iwm_fast.runtime.json_lines import read_starts
from iwm_fast.runtime.run_status import read_status

# One line chart each: title, label of the y axis, and the metrics it shows, as legend label -> name in metrics.jsonl.
_CHARTS = (
    ("Prediction loss", "per token", {"loss": "loss/prediction"}),
    ("Collapse: diversity of target tokens", "", {"standard deviation over tokens": "monitor/target_std",
                                                  "cosine similarity between images": "monitor/cosine",
                                                  "loss relative to the mean token": "monitor/loss_over_mean"}),
    ("Collapse: effective rank of target tokens", "dimensions", {"RankMe": "monitor/rank_me"}),
    ("Speed", "images/s", {"images/s": "speed/images_per_s"}),
    ("Learning rate", "", {"learning rate": "optim/lr"}),
    ("Gradient norm before clipping", "", {"gradient norm": "optim/grad_norm"}),
    ("MRR during training", "", {"MRR": "eval/mrr", "untrained predictor": "eval/mrr_untrained"}),
    ("Accuracy during training", "", {"k-NN": "eval/knn", "linear probe": "eval/linear",
                                      "attentive probe": "eval/attentive", "k-NN, untrained": "eval/knn_untrained"}),
    ("Effective rank during training", "dimensions", {"RankMe": "eval/rank_me", "LiDAR": "eval/lidar"}),
)  # fmt: skip
_TIMES = tuple(f"time/{name}_s" for name in (*PHASES, "other"))
_ROW_NAMES = {"step", "loss/prediction", "speed/images_per_s", "data/wait_share", *_TIMES}

# Pictures that other commands write into the run folder, and their titles in the report.
_PICTURES = {
    "show.png": "Training samples: views, masks and actions",
    "imagine.png": "Retrieval: source, requested change and retrieved image",
    "imagine_sweeps.png": "Retrieval: sweeps over single entries of the action",
    "imagine_plots.png": "Recovered parameters and ranks",
    "evaluations/plan.png": "Planning: true and recovered changes",
    "evaluations/plan_difference.png": "Planning by the difference readout: true and recovered changes",
    "evaluations/segment.png": "Segmentation",
    "evaluations/decode.png": "Decoded tokens",
}


def write_run_report(run: Path) -> Path:
    """Write `report.html`, with the metrics, results, pictures and settings of a run, and return its path.

    Raises:
        FileNotFoundError: if the folder holds no run.
    """
    config = load_run_config(run)
    results = [read_result(path) for path in sorted(run.glob("evaluations/*.json"))]
    # A disk may have damaged any of the rows.
    rows = [row for row in read_metrics(run) if row.keys() >= _ROW_NAMES]
    parts = [f"<h1>{escape(run.name)}</h1>", _run_summary(run), metric_tiles(_headline_numbers(rows, results))]
    if rows:
        charts = '<div class="grid">' + "".join(_line_charts(rows) + _checkpoint_charts(results)) + "</div>"
        parts += [section("Training curves", charts), _step_breakdown(rows)]
    if results:
        parts.append(section("Evaluations", *_tuning_charts(results), *map(_result_card, results)))
    pictures = {name: title for name, title in _PICTURES.items() if (run / name).is_file()}
    if pictures:
        cards = (card(title, embedded_png(run / name, title)) for name, title in pictures.items())
        parts.append(section("Pictures", *cards))
    all_settings = collapsible("all settings", yaml.safe_dump(config_to_dict(config)))
    parts += [_changes_on_resuming(run), section("Settings that differ from the defaults", _changed_settings(config),
                                                 all_settings)]  # fmt: skip
    path = run / "report.html"
    html = page(f"iwm-fast: {run.name}", parts)
    replace_file(path, lambda draft: draft.write_text(html, encoding="utf-8"))
    return path


def _run_summary(run: Path) -> str:
    """Return two lines of HTML: machine, ranks, commit, status and newest checkpoint, and the command."""
    # The file has one line per start of the run. The last line describes the latest start.
    started = [{}, *read_starts(run)][-1]
    newest, status = checkpoints.find_newest_folder(run), read_status(run)
    facts = {
        "machine": started.get("machine"),
        "ranks": started.get("world_size"),
        "commit": started.get("commit"),
        "status": " ".join(str(status.get(name, "")) for name in ("state", "reason")).strip(),
        "checkpoint": newest.name if newest else "none",
    }
    line = " · ".join(f"{name} {escape(value)}" for name, value in facts.items() if value not in (None, ""))
    return f'<p class="soft">{line}</p><p class="soft small"><code>{escape(started.get("command", ""))}</code></p>'


def _headline_numbers(rows: list[dict[str, Any]], results: list[Result]) -> dict[str, str]:
    """Return the numbers at the top of the page, by their captions."""
    values = {}
    for task, subject, metric, name in (
        ("mrr", "jitter", "mrr", "MRR"), ("knn", "", "accuracy", "k-NN accuracy"),
        ("linear", "", "accuracy", "linear accuracy"),
    ):  # fmt: skip
        for result in results:
            for row in result.rows:
                if result.task == task and row.metric == metric and (not subject or row.subject == subject):
                    chance = "" if row.chance is None else f", chance {row.chance:.3f}"
                    values[f"{name} ({result.name}{chance})"] = f"{row.value:.3f}"
    if rows:
        last = rows[-1]
        values["steps"] = f"{last['step']:,}"
        values["images/s, last log row"] = format_rate(last["speed/images_per_s"])
        loss = last["loss/prediction"]
        values["prediction loss"] = "not finite" if loss is None else f"{loss:.4f}"
        values["waiting for data"] = f"{100 * last['data/wait_share']:.1f} %"
        if last.get("speed/mfu") is not None:
            values["MFU"] = f"{100 * last['speed/mfu']:.1f} %"
    return values


def _line_charts(rows: list[dict[str, Any]]) -> list[str]:
    """Return a card per chart; charts without data, such as those of evaluations that did not run, are left out."""
    cards = []
    for title, unit, names in _CHARTS:
        lines = {}
        for label, name in names.items():
            # A metric is absent from rows that did not measure it, and None where it was not finite.
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                lines[label] = (steps, values)
        if lines:
            cards.append(card(title, draw_line_chart(lines, unit=unit)))
    return cards


def _checkpoint_charts(results: list[Result]) -> list[str]:
    """Return a card for each evaluation of several checkpoints: the result's first number over training."""
    by_name: dict[str, dict[int, Row]] = {}
    for result in results:
        by_name.setdefault(result.name.partition("-step-")[0], {})[result.step] = result.rows[0]
    cards = []
    for name, by_step in by_name.items():
        steps = sorted(by_step)
        rows = [by_step[step] for step in steps]
        if len(steps) > 1:
            lines = {rows[0].subject: (steps, [row.value for row in rows])}
            controls = [row.control for row in rows if row.control is not None]
            if len(controls) == len(steps):
                lines[rows[0].control_name] = (steps, controls)
            cards.append(card(f"{name} of several checkpoints", draw_line_chart(lines, unit=rows[0].metric)))
    return cards


def _tuning_charts(results: list[Result]) -> list[str]:
    """Return a card for each task and label that attempts with several numbers of trained parameters were made at."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.task in ("finetune", "segment"):
            groups.setdefault(json.dumps((result.task, result.step, result.settings.get("data"))), []).append(result)
    cards = []
    for attempts in groups.values():
        metric = attempts[0].rows[0].metric
        by_arm: dict[str, list[tuple[Result, Row]]] = {}
        for attempt in attempts:
            for row in attempt.rows:
                if row.metric == metric:
                    by_arm.setdefault(row.subject, []).append((attempt, row))
        if any(len({row.num_tuned for _, row in pairs}) > 1 for pairs in by_arm.values()):
            cards.append(_tuning_card(metric, by_arm))
    return cards


def _tuning_card(metric: str, by_arm: dict[str, list[tuple[Result, Row]]]) -> str:
    """Return a chart and a table of a metric against the number of trained parameters, by arm."""
    series = {arm: [IntervalPoint(row.num_tuned, row.value, *_interval(row)) for _, row in pairs]
              for arm, pairs in by_arm.items()}  # fmt: skip
    lines = [
        (arm, attempt.name, _trained_blocks(arm, attempt), f"{row.num_tuned:,}", f"{row.value:.4f}",
         "{:.4f} to {:.4f}".format(*_interval(row)))
        for arm, pairs in by_arm.items()
        for attempt, row in sorted(pairs, key=lambda pair: pair[1].num_tuned)
    ]  # fmt: skip
    note = (
        '<p class="soft small">All attempts on the same data; other settings than tune.blocks may differ, too. '
        "Intervals are over images.</p>"
    )
    title = f"{metric} against trained parameters"
    chart = IntervalChart(title=title, note="", x_label="trained parameters", y_label=metric, series=series)
    columns = ["arm", "result", "blocks", "trained parameters", metric, "95 % interval"]
    return card(title, draw_plot(chart), note, table(columns, lines))


def _interval(row: Row) -> tuple[float, float]:
    return (row.value, row.value) if row.low is None or row.high is None else (row.low, row.high)


def _trained_blocks(arm: str, attempt: Result) -> str:
    if arm in ("attentive", "head", "untrained_head"):
        return "none"
    blocks = attempt.settings.get("tune", {}).get("blocks")
    return "all" if blocks is None else str(blocks)


def _step_breakdown(rows: list[dict[str, Any]]) -> str:
    """Return the mean duration of each phase of a step, without the first log row, whose steps fill caches."""
    rows = rows[1:] or rows
    means_ms = {
        name.removeprefix("time/").removesuffix("_s").replace("_", " "): 1000
        * sum(row[name] for row in rows)
        / len(rows)
        for name in _TIMES
    }
    note = '<p class="soft small">Means over all ranks. A step takes as long as its slowest rank.</p>'
    return section("Time per step", card("Duration of each phase", draw_waterfall_chart(means_ms, unit="ms"), note))


def _result_card(result: Result) -> str:
    """Return a result as a table with a column for each subject; lines that would be empty are left out."""
    quantities: dict[str, Callable[[Row], str]] = {
        "95 % interval": lambda row: "" if row.low is None else f"{row.low:.4f} to {row.high:.4f}",
        "control": lambda row: "" if row.control is None else f"{row.control:.4f}",
        "control is": lambda row: row.control_name,
        "chance": lambda row: "" if row.chance is None else f"{row.chance:.4f}",
        "trained parameters": lambda row: f"{row.num_tuned:,}" if row.num_tuned else "",
        "images": lambda row: f"{row.num_samples:,}" if row.num_samples else "",
    }
    # Dictionaries instead of sets keep the order.
    subjects, metrics = ({getattr(row, field): None for row in result.rows} for field in ("subject", "metric"))
    lines: list[list[str]] = []
    for metric in metrics:
        rows = {row.subject: row for row in result.rows if row.metric == metric}
        lines.append([metric, *(f"{rows[subject].value:.4f}" if subject in rows else "" for subject in subjects)])
        for name, cell in quantities.items():
            cells = [cell(rows[subject]) if subject in rows else "" for subject in subjects]
            if any(cells):
                lines.append([name, *cells])
    body = table(["", *subjects], lines, css_class="arms")
    return card(f"{result.name}, step {result.step}, seed {result.seed}", body)


def _changes_on_resuming(run: Path) -> str:
    """Return a table of the settings that changed when the run was resumed; empty if none did."""
    changes = [change for start in read_starts(run) for change in start.get("changes", [])]
    rows = [[change["setting"], change["step"], *(json.dumps(change[name]) for name in ("from", "to"))]
            for change in changes]  # fmt: skip
    body = table(["setting", "after step", "before", "from then on"], rows)
    return section("Settings changed on resuming", body) if rows else ""


def _changed_settings(config: RunConfig) -> str:
    """Return a table of the settings that differ from the defaults."""
    flat = dict(_flatten(config_to_dict(config)))
    defaults = dict(_flatten(config_to_dict(RunConfig())))
    rows = [
        (name, json.dumps(value))
        for name, value in flat.items()
        # Compared as JSON, because YAML has lists where the defaults have tuples.
        if name in defaults and json.dumps(value) != json.dumps(defaults[name])
    ]
    return table(["setting", "value"], rows)


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return dotted setting names with their values, in order."""
    flat: list[tuple[str, Any]] = []
    for name, value in tree.items():
        # All dicts are groups of settings, but for this setting.
        is_group = isinstance(value, dict) and name != "deepspeed"
        flat += _flatten(value, f"{prefix}{name}.") if is_group else [(f"{prefix}{name}", value)]
    return flat
