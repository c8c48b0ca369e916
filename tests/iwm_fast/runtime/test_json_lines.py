"""Files of JSON lines: damaged lines are left out, whatever damaged them, and the next one is appended after them."""

import pytest

from iwm_fast.runtime.json_lines import append_line, read_lines, read_starts

FIRST, LAST = b'{"step": 1}\n', b'{"step": 3}\n'
DAMAGED = {
    "a cut line": b'{"step": 2\n',
    "not UTF-8": b'{"step": "\xff"}\n',
    "NUL bytes": bytes(100) + b"\n",
    "an empty line": b"\n",
    "another value": b"[2]\n",
    "UTF-16": '{"step": 2}'.encode("utf-16") + b"\n",
    "brackets without end": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_is_left_out_and_named(tmp_path, damage):
    path = tmp_path / "started.jsonl"
    path.write_bytes(FIRST + DAMAGED[damage] + LAST)
    assert read_lines(path) == ([{"step": 1}, {"step": 3}], [2])
    # At the end of the file, cut off by a crash.
    path.write_bytes(FIRST + DAMAGED[damage].removesuffix(b"\n"))
    assert read_lines(path)[0] == read_starts(tmp_path) == [{"step": 1}]
    append_line(path, {"step": 4})
    assert read_lines(path)[0] == [{"step": 1}, {"step": 4}]


def test_a_row_is_appended_to_a_new_an_empty_and_a_whole_file(tmp_path):
    append_line(tmp_path / "new", {"a": 1})
    (tmp_path / "empty").touch()
    append_line(tmp_path / "empty", {"a": 1})
    append_line(tmp_path / "new", {"b": "ü"})
    assert read_lines(tmp_path / "new") == ([{"a": 1}, {"b": "ü"}], [])
    assert read_lines(tmp_path / "empty") == ([{"a": 1}], [])
    assert read_lines(tmp_path / "absent") == ([], [])


def test_starts_in_a_file_that_cannot_be_read_are_none(tmp_path):
    (tmp_path / "started.jsonl").mkdir()
    assert read_starts(tmp_path) == []
