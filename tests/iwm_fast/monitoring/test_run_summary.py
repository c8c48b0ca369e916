"""What a finished run tells on the console."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from iwm_fast.config.run import ModelConfig, OutputConfig, PredictorConfig, RunConfig, RuntimeConfig
from iwm_fast.monitoring.run_summary import summarize_run, time_shares
from iwm_fast.monitoring.step_timer import PHASES
from iwm_fast.pipelines.config import DataConfig


def row(step: int, *, step_s: float = 1.0, **times_s: float) -> dict[str, float]:
    phases = dict.fromkeys((*PHASES, "other"), 0.0) | times_s
    return {"step": step, "speed/step_s": step_s, **{f"time/{name}_s": value for name, value in phases.items()}}


def config(**runtime) -> RunConfig:
    output = OutputConfig(folder="runs/my run", evaluate_every=50)
    return RunConfig(data=DataConfig(val="val.tar"), output=output, runtime=RuntimeConfig(device="cpu", **runtime))


def limit(config: RunConfig, **times_s: float) -> str:
    text = summarize_run(config, [row(1, wait=1), row(2, **times_s)], None)
    return next(line for line in text.splitlines() if line.startswith("  limit"))


def test_the_summary_names_files_times_and_next_commands():
    rows = [row(10, wait=1.0), row(20, forward=0.3, teacher=0.1, backward=0.5, optimizer=0.1), row(21, backward=1.0)]
    text = summarize_run(config(), rows, Path("runs/my run/checkpoints/step-00000021"))
    assert text.splitlines() == [
        "finished at step 21",
        "  run folder  runs/my run",
        "  checkpoint  runs/my run/checkpoints/step-00000021",
        "  report      iwm report run='runs/my run'",
        "  time        waiting for data 0 %, forward 36 %, backward 55 %, optimiser 9 %, between steps 0 %",
        "  limit       computation on the CPU, as it should be",
        "next",
        "  iwm evaluate mrr run='runs/my run'",
        "  iwm imagine run='runs/my run'",
        "  iwm export run='runs/my run' to=DIR",
    ]


def test_the_summary_names_the_best_step():
    best = replace(config(), output=replace(config().output, keep_best="knn"))
    rows = [row(10) | {"eval/knn": 0.6931, "eval/best_step": 10}, row(20) | {"eval/knn": 0.5, "eval/best_step": 10}]
    assert "  best        checkpoint=best is step 10, knn 0.6931" in summarize_run(best, rows, None).splitlines()


def test_shares_weigh_rows_by_their_steps_and_skip_the_first_row():
    shares = time_shares([row(5, wait=1.0), row(8, step_s=2.0, forward=1.0, other=1.0), row(10, backward=1.0)])
    assert shares == dict.fromkeys(PHASES, 0.0) | {"forward": 3 / 8, "other": 3 / 8, "backward": 2 / 8}


def test_the_limit_names_the_setting_to_change(monkeypatch):
    assert "raise runtime.loader_threads (now 2)" in limit(config(), wait=0.06, backward=0.94)
    assert "set runtime.loader=dali" in limit(config(loader="torch"), wait=0.5, backward=0.5)
    assert "raise output.checkpoint_every (now 1000) or output.evaluate_every (now 50)" in limit(config(), other=0.3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_gpu = replace(config(), runtime=RuntimeConfig())
    assert "GPU, as it should be; to speed it up, set runtime.compile=true" in limit(on_gpu, backward=1.0)
    compiled = replace(config(), runtime=RuntimeConfig(ops="fused", compile=True))
    assert limit(compiled, backward=1.0).endswith("GPU, as it should be")


@pytest.mark.parametrize("rows", [[], [row(4, wait=1.0)], [{"step": step, "speed/step_s": 1.0} for step in (4, 8)]])
def test_runs_of_one_row_or_an_earlier_version_have_no_times(rows):
    assert "time  " not in summarize_run(config(), rows, None)


def test_next_commands_ask_for_what_the_run_lacks():
    without_val = replace(config(), data=DataConfig())
    assert "iwm imagine run='runs/my run' data.val=SHARDS" in summarize_run(without_val, [], None)
    identity = replace(config(), model=ModelConfig(predictor=PredictorConfig(depth=0)))
    text = summarize_run(identity, [], None)
    assert "iwm evaluate knn run=" in text and "mrr" not in text and "imagine" not in text
