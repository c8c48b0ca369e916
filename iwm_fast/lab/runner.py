"""`iwm lab LAB.yaml`: runs the cells of a lab with their evaluations, and judges the claims by the results.

    <folder>/cells/<cell>-seed<k>/      folder of a run; lab.log holds the output of its commands
    <folder>/lab.yaml                   copy of the lab's file
    <folder>/lab.json                   results of finished commands, the verdicts, and correlations with MRR
    <folder>/report.html                the report page

Every command of a cell can also be entered by a user. Finished commands are not repeated and interrupted ones resume,
so a lab can be stopped and started at any time, and cells, seeds and evaluations can be added later.
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
from iwm_fast.config.fingerprint import has_vicreg_terms
from iwm_fast.config.loading import config_to_dict, load_config, saved_tree
from iwm_fast.config.run import RunConfig
from iwm_fast.config.writable import require_writable
from iwm_fast.evals.results import Result, read_result
from iwm_fast.evaluate import EVALUATIONS, read_settings
from iwm_fast.lab.claims import judge, values_by_seed
from iwm_fast.lab.config import LabConfig, read_lab
from iwm_fast.lab.correlations import correlate
from iwm_fast.lab.report import write_lab_report
from iwm_fast.pipelines.demo_data import write_demo_shards
from iwm_fast.pipelines.storage.atomic import replace_file, write_json
from iwm_fast.runtime.json_lines import read_starts
from iwm_fast.runtime.run_status import read_status
from iwm_fast.training.resume import require_same_shards

log = logging.getLogger(__name__)

LAB, _LOG = "lab.yaml", "lab.log"
# Number of lines of a log that an error message quotes.
_TAIL = 15


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the grid: a cell of the lab's file with one of the seeds."""

    name: str
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class LabCommand:
    """A command that trains or evaluates a cell."""

    cell: Cell
    name: str
    """Either "train" or the name of the evaluation."""
    arguments: tuple[str, ...]
    """Arguments of `iwm`."""


class LabStoppedError(Exception):
    """The lab was asked to stop, and its running commands have saved and exited."""


def list_cells(lab: LabConfig) -> list[Cell]:
    """Return all runs, ordered by seed, so that an unfinished lab has complete comparisons for some seeds."""
    return [
        Cell(name=name, seed=seed, folder=lab.folder / "cells" / f"{name}-seed{seed}")
        for seed in lab.seeds
        for name in lab.cells
    ]


def iter_commands(lab: LabConfig, cell: Cell) -> Iterator[LabCommand]:
    """Yield the commands of a cell in the order in which they have to run."""
    settings = (*lab.settings, *lab.cells[cell.name], f"seed={cell.seed}", f"output.folder={cell.folder}")
    yield LabCommand(cell=cell, name="train", arguments=("train", str(lab.base), *settings, "resume=auto"))
    for evaluation in lab.evaluations:
        if cell.name in evaluation.cells:
            chosen = (setting.replace("{seed}", str(cell.seed)) for setting in evaluation.settings)
            arguments = (f"run={cell.folder}", f"seed={cell.seed}", *chosen)
            yield LabCommand(cell=cell, name=evaluation.task, arguments=("evaluate", evaluation.task, *arguments))


def training_config(command: LabCommand) -> RunConfig:
    """Return the settings of a command that trains a cell."""
    _, base, *overrides = command.arguments
    return load_config(base, overrides)


def is_done(command: LabCommand) -> bool:
    """Return whether the command has finished with the same settings.

    The result of an evaluation must be of the last checkpoint, unless its settings name one.
    """
    folder = command.cell.folder
    if command.name == "train":
        if read_status(folder).get("state") != "finished":
            return False
        configs = training_config(command), load_config(folder / "config.yaml")
        requested, saved = (saved_tree(config) for config in configs)
        # Settings in `runtime` and `output` do not affect the result, except for the micro-batch of VICReg's terms.
        return _vicreg_batch(configs[0]) == _vicreg_batch(configs[1]) and all(
            requested[key] == saved[key] for key in requested if key not in ("runtime", "output", "resume")
        )
    return any(_is_result_of(command, result) for result in read_results(folder))


def _vicreg_batch(config: RunConfig) -> int | None:
    """Return the images over which VICReg's terms are computed in a single process; None without these terms."""
    if not has_vicreg_terms(config):
        return None
    return config.runtime.micro_batch_size or config.optim.global_batch_size


def _is_result_of(command: LabCommand, result: Result) -> bool:
    """Return whether a result of the command's cell has the settings of the command and is not outdated."""
    newest = checkpoints.find_newest_folder(command.cell.folder)
    if result.task != command.name or newest is None:
        return False
    requested = config_to_dict(read_settings(EVALUATIONS[command.name].settings, list(command.arguments[2:])))
    # A result of a checkpoint that the settings name is not outdated by newer checkpoints.
    is_current = requested["checkpoint"] or result.step == checkpoints.parse_step(newest)
    return bool(is_current) and json.loads(json.dumps(result.settings)) == requested


def read_results(folder: Path) -> list[Result]:
    """Return the results of all evaluations of a run."""
    return [read_result(path) for path in sorted(folder.glob("evaluations/*.json"))]


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES accepts them."""
    num_gpus = torch.cuda.device_count()
    # If the variable is set, it may give other numbers than 0, 1, ..., or ids of GPUs or of parts of them. CUDA ignores
    # what follows an invalid name.
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in given.split(",")][:num_gpus] if given else [str(gpu) for gpu in range(num_gpus)]


class WorkerPool:
    """Runs several cells at a time, each command in its own process."""

    def __init__(self, lab: LabConfig) -> None:
        self._lab: LabConfig = lab
        gpus = visible_gpus()
        self.num_workers: int = lab.workers or len(gpus) or os.cpu_count() or 1
        self._free_environments: Queue[dict[str, str]] = Queue()
        for worker in range(self.num_workers):
            on_gpu = {"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)]} if gpus else None
            # Without GPUs, each process has a single thread, so that the processes do not compete for cores.
            self._free_environments.put(on_gpu or {"OMP_NUM_THREADS": "1"})
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._lock = Lock()
        self._stopped = Event()
        self._num_commands: int = sum(len(list(iter_commands(lab, cell))) for cell in list_cells(lab))
        self._num_done: int = 0
        self._num_executed: int = 0
        self._start_s: float = time.monotonic()

    def run(self) -> list[str]:
        """Run all commands that are not done and return a message for each cell that failed.

        Raises:
            LabStoppedError: if the lab was asked to stop, after the running commands have saved.
        """
        old_handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with ThreadPoolExecutor(self.num_workers) as pool:
                failures = list(pool.map(self._run_cell, list_cells(self._lab)))
        finally:
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
        if self._stopped.is_set():
            raise LabStoppedError("stopped; run the same command again to resume")
        return [failure for failure in failures if failure]

    def _on_signal(self, number: int, _: object) -> None:
        # No lock here: the handler may interrupt code that holds it. A process that starts meanwhile is signalled by
        # `_execute`, which checks the event after it has registered the process.
        self._stopped.set()
        for process in list(self._processes.values()):
            process.send_signal(signal.SIGTERM)

    def _run_cell(self, cell: Cell) -> str:
        """Run the commands of a cell, on a GPU if there are any, and return a message if one fails."""
        environment = self._free_environments.get()
        try:
            for command in iter_commands(self._lab, cell):
                if self._stopped.is_set():
                    break
                was_done = is_done(command)
                code = 0 if was_done else self._execute(command, os.environ | environment)
                if code != 0:
                    # A command that was asked to stop exits with a code other than 0, too.
                    return "" if self._stopped.is_set() else self._describe_failure(command, code)
                self._log_progress(command, was_done)
            return ""
        finally:
            self._free_environments.put(environment)

    def _execute(self, command: LabCommand, environment: dict[str, str]) -> int:
        command.cell.folder.mkdir(parents=True, exist_ok=True)
        with (command.cell.folder / _LOG).open("ab") as file:
            file.write(f"$ iwm {' '.join(command.arguments)}\n".encode())
            file.flush()
            with self._lock:
                # In its own session, the process does not get the terminal's Ctrl-C in addition to the signal
                # that `_on_signal` sends: a second signal could make it abort without a checkpoint.
                process = subprocess.Popen(
                    [sys.executable, "-m", "iwm_fast.cli", *command.arguments],
                    stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
                )  # fmt: skip
                self._processes[process.pid] = process
            if self._stopped.is_set():
                process.send_signal(signal.SIGTERM)
            code = process.wait()
            del self._processes[process.pid]
        return code

    def _describe_failure(self, command: LabCommand, code: int) -> str:
        path = command.cell.folder / _LOG
        tail = "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:])
        return f"{command.cell}: {command.name} exited with code {code}; the last lines of {path}:\n{tail}"

    def _log_progress(self, command: LabCommand, was_done: bool) -> None:
        with self._lock:
            self._num_done += 1
            self._num_executed += not was_done
            if was_done:
                return
            # Commands that were done before took no time, so they do not enter the mean duration.
            elapsed_s = time.monotonic() - self._start_s
            remaining_s = elapsed_s / self._num_executed * (self._num_commands - self._num_done)
            log.info("%d of %d: %s, %s; about %.0f min remaining", self._num_done, self._num_commands, command.cell,
                     command.name, remaining_s / 60)  # fmt: skip


def run_lab(path: Path) -> Path:
    """Run the commands of a lab that are not done, judge its claims, and return the path of the report page.

    Raises:
        ValueError: if the file is invalid, its folder cannot be written, or cells were trained on other images.
        RuntimeError: if a command failed, after the commands of all other cells.
        LabStoppedError: if the lab was asked to stop; calling this again resumes.
    """
    lab = read_lab(path, set(EVALUATIONS))
    require_writable("folder", str(lab.folder))
    lab.folder.mkdir(parents=True, exist_ok=True)
    (lab.folder / LAB).write_bytes(path.read_bytes())
    if lab.has_demo_data:
        write_demo_shards(Path(load_config(lab.base, lab.settings).data.train).parent)
    # Cells that were trained on other images must not be compared with new ones.
    for cell in list_cells(lab):
        # The settings of a cell without a checkpoint may be invalid, which its command reports.
        if checkpoints.find_newest_folder(cell.folder) is not None:
            require_same_shards(training_config(next(iter_commands(lab, cell))))
    failures: list[str] = []
    try:
        failures = WorkerPool(lab).run()
    finally:
        page = write_results(lab)
    if failures:
        raise RuntimeError("\n\n".join(failures) + "\n\nremove the cause and run the same command again to resume")
    require_all_done(lab)
    return page


def require_all_done(lab: LabConfig) -> None:
    """Check that every command of a lab whose commands have all been run without a failure has a result.

    Raises:
        RuntimeError: naming the first that has none, because another evaluation of its cell has replaced it.
    """
    for cell in list_cells(lab):
        for command in iter_commands(lab, cell):
            if not is_done(command):
                settings = " ".join(command.arguments[3:]) or "no settings"
                raise RuntimeError(
                    f"{cell}: {command.name} has run, but its result ({settings}) is not in {cell.folder}: evaluations "
                    "of a cell whose results have the same name replace each other; give one of them another name by "
                    f"its setting `name`, or, if {command.name} has no such setting, give it another cell"
                )


def write_results(lab: LabConfig) -> Path:
    """Write the results of a lab's finished commands and return the path of the report page."""
    rows = [
        {"cell": cell.name, "seed": cell.seed, "result": result.name, "step": result.step, **asdict(row)}
        for cell, result in finished_results(lab)
        for row in result.rows
    ]
    judged = [judge(claim, lambda selector: values_by_seed(selector, rows)) for claim in lab.claims]
    verdicts = {outcome.claim.name: outcome.verdict for outcome in judged}
    correlations = [asdict(correlation) for correlation in correlate(rows)]
    tree = {**_provenance(lab), "verdicts": verdicts, "correlations": correlations, "rows": rows}
    replace_file(lab.folder / "lab.json", lambda draft: write_json(tree, draft))
    return write_lab_report(lab, judged, rows)


def finished_results(lab: LabConfig) -> list[tuple[Cell, Result]]:
    """Return the results of finished evaluations of trained cells.

    All others are left out, because results of other settings must not be compared with them: those of cells whose
    training is not finished with the lab's settings, and those of evaluations that the lab does not have (any more).
    """
    results: list[tuple[Cell, Result]] = []
    num_untrained = num_foreign = 0
    for cell in list_cells(lab):
        training, *evaluations = iter_commands(lab, cell)
        found = read_results(cell.folder)
        if found and not is_done(training):
            num_untrained += len(found)
            continue
        kept = [(cell, result) for result in found if any(_is_result_of(command, result) for command in evaluations)]
        num_foreign += len(found) - len(kept)
        results += kept
    if num_untrained or num_foreign:
        log.warning(
            "results that are left out: %d of cells whose training is not finished with the lab's settings, and %d of "
            "other evaluations, settings or checkpoints than the lab has", num_untrained, num_foreign,
        )  # fmt: skip
    return results


def _provenance(lab: LabConfig) -> dict[str, list[str]]:
    """Return the machines and commits that produced the runs, without repetitions."""
    starts = [start for cell in list_cells(lab) for start in read_starts(cell.folder)]
    return {key: sorted({start[key] for start in starts if key in start}) for key in ("machine", "commit")}


def report_lab(folder: Path) -> Path:
    """Write the results and the report page of a lab again from its folder, and return the path of the page.

    Raises:
        FileNotFoundError: if the folder holds no lab.
    """
    return write_results(read_lab(folder / LAB, set(EVALUATIONS)))
