"""`iwm lab LAB.yaml`: a grid of small runs, what is measured on each, and the claims they bear out.

    <folder>/cells/<cell>-seed<k>/      a run's folder, and what was said while it was made: lab.log
    <folder>/lab.yaml                   what was asked for
    <folder>/lab.json                   every number by cell and seed, and the verdicts
    <folder>/report.html                the page

Each step of a cell is a command that a user could give. A step that is done is not done again, one that was stopped
goes on: so a lab can be stopped and started at any time, and grown by cells, seeds and evaluations.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from threading import Event, Lock

import torch

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.config.loading import load_config, saved_tree, to_tree
from iwm_fast.evals.results import Result, read_result
from iwm_fast.evaluate import TASKS, read_settings
from iwm_fast.lab.claims import judge, values_of
from iwm_fast.lab.config import LabConfig, read_lab
from iwm_fast.lab.report import write_lab_report
from iwm_fast.pipelines.demo_data import write_demo_shards
from iwm_fast.pipelines.storage.atomic import replace_file, save_json
from iwm_fast.runtime.run_status import read_status

log = logging.getLogger(__name__)

LAB, _LOG = "lab.yaml", "lab.log"
_TAIL = 15


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the grid."""

    name: str
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of a cell."""

    cell: Cell
    what: str
    """train, or the name of the task."""
    arguments: tuple[str, ...]
    """Of `iwm`."""


class LabStoppedError(Exception):
    """A lab was told to stop, and its runs have stopped in order."""


def cells_of(lab: LabConfig) -> list[Cell]:
    """Return all runs, seed by seed: an unfinished lab has whole comparisons."""
    return [
        Cell(name=name, seed=seed, folder=lab.folder / "cells" / f"{name}-seed{seed}")
        for seed in lab.seeds
        for name in lab.cells
    ]


def steps_of(lab: LabConfig, cell: Cell) -> Iterator[Step]:
    """Yield the commands of a cell in their order."""
    settings = (*lab.settings, *lab.cells[cell.name], f"seed={cell.seed}", f"output.folder={cell.folder}")
    yield Step(cell=cell, what="train", arguments=("train", str(lab.base), *settings, "resume=auto"))
    for evaluation in lab.evaluations:
        if cell.name in evaluation.cells:
            arguments = (f"run={cell.folder}", f"seed={cell.seed}", *evaluation.settings)
            yield Step(cell=cell, what=evaluation.task, arguments=("evaluate", evaluation.task, *arguments))


def is_done(step: Step) -> bool:
    """Return whether a step's outcome is there, and is that of these settings and of the run's last checkpoint."""
    folder = step.cell.folder
    if step.what == "train":
        if read_status(folder).get("state") != "finished":
            return False
        _, base, *overrides = step.arguments
        wanted, there = (saved_tree(one) for one in (load_config(base, overrides), load_config(folder / "config.yaml")))
        # how it was computed may differ
        return all(wanted[name] == there[name] for name in wanted if name not in ("runtime", "output", "resume"))
    newest = checkpoints.newest(folder)
    wanted = to_tree(read_settings(TASKS[step.what].settings, list(step.arguments[2:])))
    return newest is not None and any(
        json.loads(json.dumps(result.settings)) == wanted and result.step == checkpoints.step_of(newest)
        for result in results_of(folder)
        if result.task == step.what
    )


def results_of(folder: Path) -> list[Result]:
    """Return what was measured on a run."""
    return [read_result(path) for path in sorted(folder.glob("evaluations/*.json"))]


class Workers:
    """Runs cells beside each other, each step a process of its own."""

    def __init__(self, lab: LabConfig) -> None:
        self._lab = lab
        num_gpus = torch.cuda.device_count()
        self.count = lab.workers or num_gpus or os.cpu_count() or 1
        self._places: Queue[dict[str, str]] = Queue()
        for worker in range(self.count):
            on_gpu = {"CUDA_VISIBLE_DEVICES": str(worker % num_gpus)} if num_gpus else None
            self._places.put(on_gpu or {"OMP_NUM_THREADS": "1"})
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._lock, self._stopped = Lock(), Event()
        self._num_steps = sum(len(list(steps_of(lab, cell))) for cell in cells_of(lab))
        self._num_done, self._began = 0, time.monotonic()
        self._num_made = 0

    def run(self) -> list[str]:
        """Make every cell and return what went wrong.

        Raises:
            LabStoppedError: if the lab was told to stop; what was under way has saved.
        """
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with ThreadPoolExecutor(self.count) as pool:
                failures = list(pool.map(self._make, cells_of(self._lab)))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._stopped.is_set():
            raise LabStoppedError("stopped; the same command goes on")
        return [failure for failure in failures if failure]

    def _on_signal(self, number: int, _: object) -> None:
        self._stopped.set()
        for process in list(self._running.values()):
            process.send_signal(signal.SIGTERM)

    def _make(self, cell: Cell) -> str:
        """Carry out a cell's steps on a GPU that is free, if there are any, until one fails, and say which."""
        place = self._places.get()
        try:
            for step in steps_of(self._lab, cell):
                if self._stopped.is_set():
                    break
                is_there = is_done(step)
                code = 0 if is_there else self._carry_out(step, os.environ | place)
                if code != 0:
                    return "" if self._stopped.is_set() else self._describe_failure(step, code)
                self._tell(step, is_there)
            return ""
        finally:
            self._places.put(place)

    def _carry_out(self, step: Step, environment: dict[str, str]) -> int:
        step.cell.folder.mkdir(parents=True, exist_ok=True)
        with (step.cell.folder / _LOG).open("ab") as file:
            file.write(f"$ iwm {' '.join(step.arguments)}\n".encode())
            file.flush()
            with self._lock:
                # not into the terminal's group: a Ctrl-C is passed on once, by us
                process = subprocess.Popen(
                    [sys.executable, "-m", "iwm_fast.cli", *step.arguments],
                    stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
                )  # fmt: skip
                self._running[process.pid] = process
            if self._stopped.is_set():
                process.send_signal(signal.SIGTERM)
            code = process.wait()
            del self._running[process.pid]
        return code

    def _describe_failure(self, step: Step, code: int) -> str:
        path = step.cell.folder / _LOG
        tail = "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:])
        return f"{step.cell}: {step.what} ended with {code}; the end of {path}:\n{tail}"

    def _tell(self, step: Step, is_there: bool) -> None:
        with self._lock:
            self._num_done += 1
            self._num_made += not is_there
            if is_there:
                return
            lasted = time.monotonic() - self._began
            left = lasted / self._num_made * (self._num_steps - self._num_done)
            log.info("%d of %d: %s, %s; about %.0f min left", self._num_done, self._num_steps, step.cell, step.what,
                     left / 60)  # fmt: skip


def run_lab(path: Path) -> Path:
    """Make what is not there yet, judge the claims and write the page; return that.

    Raises:
        RuntimeError: if a step failed; the others are made all the same.
        LabStoppedError: if the lab was told to stop; the same call goes on.
    """
    lab = read_lab(path, set(TASKS))
    lab.folder.mkdir(parents=True, exist_ok=True)
    (lab.folder / LAB).write_bytes(path.read_bytes())
    if lab.has_demo_data:
        write_demo_shards(Path(load_config(lab.base, lab.settings).data.train).parent)
    failures: list[str] = []
    try:
        failures = Workers(lab).run()
    finally:
        page = write_outcome(lab)
    if failures:
        raise RuntimeError("\n\n".join(failures) + "\n\nmend it, and give the same command again: it goes on")
    return page


def write_outcome(lab: LabConfig) -> Path:
    """Write the numbers and the page of a lab, finished or not."""
    rows = [
        {"cell": cell.name, "seed": cell.seed, "result": result.name, "step": result.step, **asdict(row)}
        for cell in cells_of(lab)
        for result in results_of(cell.folder)
        for row in result.rows
    ]
    outcomes = [judge(claim, lambda number: values_of(number, rows)) for claim in lab.claims]
    tree = {
        **_made_by(lab),
        "verdicts": {one.claim.name: one.verdict for one in outcomes},
        "rows": rows,
    }
    replace_file(lab.folder / "lab.json", lambda draft: save_json(tree, draft))
    return write_lab_report(lab, outcomes, rows)


def _made_by(lab: LabConfig) -> dict[str, list[str]]:
    """Return machines and commits of the runs that there are."""
    files = [cell.folder / "started.jsonl" for cell in cells_of(lab)]
    starts = [json.loads(line) for file in files if file.is_file() for line in file.read_text("utf-8").splitlines()]
    return {name: sorted({one[name] for one in starts}) for name in ("machine", "commit")}


def report_lab(folder: Path) -> Path:
    """Write a lab's page anew from what is in its folder.

    Raises:
        FileNotFoundError: if the folder holds no lab.
    """
    return write_outcome(read_lab(folder / LAB, set(TASKS)))
