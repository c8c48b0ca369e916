"""Names from outside reach the terminal, logs and pages in printable characters only."""

import logging

import pytest

from iwm_fast.pipelines.errors import ShardError, printable, printable_lines
from iwm_fast.rendering.html import page, table
from iwm_fast.runtime.error_reporting import user_facing_errors
from iwm_fast.runtime.process import log_to_console

NAMES = {
    "colour": "\x1b[31mred",
    "title": "\x1b]0;title\x07",
    "8-bit control": "\x9b2J",
    "direction": "photo\u202egpj.exe",
    "isolate": "\u2066x\u2069",
    "line feed": "a\nerror: all is lost",
    "carriage return": "a\rb",
    "line separator": "a\u2028b",
    "not UTF-8": "\udcff\udc80",
    "zero width": "a\u200bb",
    "backspace": "a\x08b",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_appear_as_escapes_wherever_they_are_printed(name, capsys, monkeypatch):
    text = NAMES[name]
    assert printable(text).isprintable() and printable(text).isascii() and printable(printable(text)) == printable(text)
    assert str(ShardError(f"holds {text}", shard=text, key=text, remedy=text)).isprintable()
    with pytest.raises(SystemExit), user_facing_errors():
        error = OSError(f"cannot read {text}")
        error.add_note(f"in {text}")
        raise error
    assert all(line.isprintable() for line in capsys.readouterr().err.split("\n"))
    assert all(line.isprintable() for line in page(text, [table(["x"], [[text]])]).split("\n"))
    monkeypatch.setattr(logging.root, "handlers", [])
    log_to_console()
    logging.getLogger("test").warning("first line\n%s", text)
    assert all(line.isprintable() for line in capsys.readouterr().err.split("\n"))


@pytest.mark.parametrize("text", ["Füße/写真 1.jpg", "a\\x1b", "{}[]$%", ""])
def test_printable_names_do_not_change(text):
    assert printable(text) == text and printable_lines(f"{text}\n{text}") == f"{text}\n{text}"
