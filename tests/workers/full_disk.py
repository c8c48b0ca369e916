"""Train in a folder on a small disk: `python full_disk.py SHARDS DISK`, where DISK is an empty tmpfs.

For each number of free pages, prints a JSON line with the exit code, what was printed, the status and the checkpoints.
"""

import contextlib
import io
import json
import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from fixtures.tar_files import TinyShards
from fixtures.tiny_pretraining import tiny_run
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.runtime.error_reporting import user_facing_errors
from iwm_fast.runtime.run_status import read_status
from iwm_fast.train import run

PAGE = 4096
# The files of a run before its first checkpoint take 8 pages, and a checkpoint takes 136.
FREE_PAGES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 100, 145, 150, 200, 300, 420)


def fill(disk, num_free_pages):
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(PAGE)) == PAGE:
            pass
    with filler.open("r+b") as file:
        file.truncate(max(filler.stat().st_size - num_free_pages * PAGE, 0))


def train_once(config):
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        try:
            with user_facing_errors():
                run(config)
            code = 0
        except SystemExit as end:
            code = end.code
    return code, printed.getvalue()


def main(shards, disk):
    logging.disable(logging.ERROR)
    config = tiny_run(TinyShards(pattern=shards, folder=Path()), disk / "run", loader="torch")
    config = replace(config, resume="auto", output=replace(config.output, log_every=1, action_log=True))
    for num_free_pages in FREE_PAGES:
        fill(disk, num_free_pages)
        code, printed = train_once(config)
        status, newest = read_status(disk / "run"), checkpoints.read_newest(disk / "run")[0]
        (disk / "filler").unlink()
        # With space, the same command resumes the run.
        step = run(config).step
        row = {"free": num_free_pages, "code": code, "printed": printed, "status": status, "step": step,
               "saved": newest.step if newest else 0}  # fmt: skip
        print(json.dumps(row), flush=True)
        shutil.rmtree(disk / "run")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
