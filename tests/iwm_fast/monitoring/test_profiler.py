"""Profiles of selected steps."""

import json
from dataclasses import replace

import pytest
import torch

from fixtures.tiny_pretraining import tiny_run
from iwm_fast.monitoring.profiler import StepProfiler
from iwm_fast.monitoring.step_timer import PHASES
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.train import run

RANK_INFO = RankInfo(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


def trace(profiler: StepProfiler, steps: range) -> None:
    for step in steps:
        profiler.before_step(step)
        torch.ones(2 + step).cumsum(0)
    profiler.close(steps.stop)


def calls(path, name: str) -> int:
    events = json.loads(path.read_text())["traceEvents"]
    return sum(event.get("name") == name and event.get("ph") == "X" for event in events)


def test_a_run_writes_a_trace_of_the_selected_steps(tiny_shards, tmp_path, caplog):
    caplog.set_level("INFO")
    run(replace(tiny_run(tiny_shards, tmp_path / "run", profile="2:4")))
    folder = tmp_path / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["steps-2-4.json", "steps-2-4.txt"]
    # Phases have the names of the log rows.
    assert {phase: calls(folder / "steps-2-4.json", phase) for phase in PHASES} == dict.fromkeys(PHASES, 2)
    assert "aten::" in (folder / "steps-2-4.txt").read_text()
    assert f"profile of steps 2:4: {folder / 'steps-2-4.json'}" in caplog.text


def test_a_trace_has_only_the_selected_steps(tmp_path):
    trace(StepProfiler("1:4", tmp_path, RANK_INFO), range(6))
    assert calls(tmp_path / "steps-1-4.json", "aten::cumsum") == 3
    assert "aten::cumsum" in (tmp_path / "steps-1-4.txt").read_text()


@pytest.mark.parametrize(
    ("steps", "file_name", "message"),
    [
        (range(3), "steps-2-3.json", "runtime.profile=2:5: the run ended before step 3"),
        (range(2), None, "runtime.profile=2:5: no trace, because none of these steps was run before the end at step 2"),
        # A run that resumes in the middle of the selected steps, and one that resumes after them.
        (range(4, 8), "steps-4-5.json", None),
        (range(6, 8), None, "no trace, because none of these steps was run"),
        (range(5), "steps-2-5.json", None),
    ],
)
def test_a_run_outside_the_selected_steps_warns(tmp_path, caplog, steps, file_name, message):
    trace(StepProfiler("2:5", tmp_path, RANK_INFO), steps)
    assert [path.name for path in tmp_path.glob("*.json")] == ([file_name] if file_name else [])
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (message is not None) and (message or "") in "".join(warnings)


def test_nothing_is_traced_without_the_setting_or_on_other_ranks(tmp_path, caplog):
    trace(StepProfiler("", tmp_path, RANK_INFO), range(3))
    trace(StepProfiler("0:2", tmp_path, replace(RANK_INFO, rank=1, world_size=2)), range(3))
    assert not list(tmp_path.iterdir()) and not caplog.records
