"""The display of a running training, on a terminal and in a log."""

import logging
import os
import pty
import re
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from iwm_fast.monitoring.progress_bar import open_display
from iwm_fast.runtime.distributed import RankInfo

ROW = {
    "loss/prediction": 0.34567,
    "speed/images_per_s": 2450.4,
    "speed/step_s": 0.5,
    "data/wait_share": 0.0123,
    "monitor/cosine": 0.5,
}
BAD = ROW | {"monitor/cosine": 0.999}
WIDTH = 80


class Terminal:
    """A pseudo-terminal to be used as standard error, and the text that its screen would show."""

    def __init__(self) -> None:
        self._master, self._slave = pty.openpty()
        self.stream = os.fdopen(self._slave, "w")
        self._read = bytearray()
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def _listen(self) -> None:
        # On Linux, reading from a pseudo-terminal raises an error when its other end has been closed.
        try:
            while content := os.read(self._master, 4096):
                self._read += content
        except OSError:
            pass

    def text(self) -> str:
        self.stream.close()
        self._reader.join(timeout=10)
        os.close(self._master)
        return self._read.decode()

    def screen(self) -> list[str]:
        lines, row, column = [""], 0, 0
        for token in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", self.text()):
            if token == "\r":
                column = 0
            elif token == "\n":
                row += 1
                lines += [""] * (row == len(lines))
            elif token.startswith("\x1b"):
                row -= int(token[2:-1] or 1) if token.endswith("A") else 0
                lines[row] = "" if token == "\x1b[2K" else lines[row]
            else:
                line = lines[row].ljust(column)
                lines[row] = line[:column] + token + line[column + len(token) :]
                column += len(token)
        return [line for line in lines if line.strip()]


@pytest.fixture
def attach(monkeypatch, caplog) -> Iterator[Callable[[], Terminal]]:
    """Return a function that makes a terminal standard error.

    The test must call it, because pytest replaces standard error between set-up and test.
    """
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    caplog.set_level("INFO", logger="iwm_fast")
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)

    def begin() -> Terminal:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        handler.setStream(terminal.stream)
        return terminal

    yield begin
    logging.getLogger().removeHandler(handler)


def rank_info(rank: int = 0) -> RankInfo:
    return RankInfo(rank=rank, local_rank=rank, world_size=2, device=torch.device("cpu"))


def show_three_rows(first: int = 0) -> None:
    display = open_display(rank_info(), first, 375_000)
    for step, row in ((10, ROW), (20, BAD), (30, ROW)):
        display.advance(first + step)
        display.show(first + step, row, loss=row["loss/prediction"])
    display.close()


def test_a_terminal_shows_one_line_with_complete_warnings_above_it(attach):
    terminal = attach()
    show_three_rows()
    logging.getLogger("iwm_fast").info("saved")
    *above, line, last = terminal.screen()
    assert re.fullmatch(r"step 30/375000 \S+ loss 0\.3457  2,450 images/s  waiting 1\.2 % left \S+", line.strip()), line
    assert len(line) <= WIDTH
    warning = " ".join(above)
    assert warning.startswith("step 20: monitor/cosine is 0.999") and warning.endswith(
        "raise optim.teacher_momentum (resume=adjust)"
    )
    assert last == "saved", "handlers write to standard error again"


def test_the_bar_of_a_resumed_run_starts_at_its_step(attach):
    terminal = attach()
    open_display(rank_info(), 374_000, 375_000).close()
    assert terminal.screen()[-1].startswith("step 374000/375000")


def test_a_warning_of_another_rank_erases_the_progress_line(attach):
    terminal = attach()
    terminal.stream.write("step 30/375000 ━━━━━━━━━━━━━━━━━━━━━━━━ loss 0.3457  2,450 images/s  waiting 1.2 %")
    open_display(rank_info(rank=1), 0, 375_000)
    logging.getLogger("iwm_fast").warning("cannot decode")
    assert terminal.screen() == ["[rank 1] cannot decode"]


def test_the_results_of_an_evaluation_are_one_line(monkeypatch, caplog):
    caplog.set_level("INFO")
    controls = {"eval/mrr_untrained": 0.07, "eval/mrr_chance": 0.074, "eval/knn_untrained": 0.5, "eval/knn_chance": 0.1}
    display = open_display(rank_info(), 0, 100)
    display.show(
        10,
        ROW | {"eval/mrr": 0.371, "eval/knn": 0.675, "eval/time_s": 3.2, "eval/time_share": 0.02} | controls,
        loss=0.3,
    )
    display.show(20, ROW, loss=0.3)
    (line,) = [record.message for record in caplog.records if "evaluation" in record.message]
    results = "MRR 0.371 (untrained 0.070, chance 0.074), k-NN 0.675 (untrained 0.500, chance 0.100)"
    assert line == f"step 10: evaluation in 3.2 s, 2.0 % of the time: {results}"


def test_in_a_pipe_there_is_a_line_for_each_row(monkeypatch, caplog):
    caplog.set_level("INFO")
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        show_three_rows()
    with os.fdopen(read) as pipe:
        assert pipe.read() == "", "no control characters in a log"
    messages = [record.message for record in caplog.records]
    assert messages[0] == "step 10/375000  loss 0.3457  2,450 images/s  waiting 1.2 %  left 3124:55"
    assert [message.split("  ")[0] for message in messages] == [
        "step 10/375000", "step 20/375000", messages[2], "step 30/375000",
    ]  # fmt: skip
    assert messages[2].startswith("step 20: monitor/cosine is 0.999")


@pytest.mark.parametrize("kind", ["dumb", "unknown"])
def test_a_terminal_that_cannot_move_the_cursor_gets_plain_lines(attach, monkeypatch, kind):
    monkeypatch.setenv("TERM", kind)
    terminal = attach()
    show_three_rows()
    text = terminal.text()
    assert "\x1b" not in text and text.count("images/s") == 3
