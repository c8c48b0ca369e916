"""Random invalid settings, on the command line and in YAML: one message with the setting's name, nothing written."""

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iwm_fast import cli
from iwm_fast.cli import COMMANDS
from iwm_fast.config.loading import _leaf_fields, build, iter_settings
from iwm_fast.config.run import Logger, RunConfig
from iwm_fast.evaluate import import_object

pytestmark = pytest.mark.timeout(300)
checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]

WORDS = st.text("abcdefghijkxyz", min_size=1, max_size=8)
LISTS = st.sampled_from(
    ["[]", "[a]", "[[1, 2]]", "[1, 2, 3]", "[null, null]", "[.nan, 1]", "[1, true]", "{}", "{a: 1}"]
)
NO_NUMBERS = st.sampled_from(
    [".inf", "-.inf", ".nan", "nan", "inf", "1e999", "-1e39", "true", "no", "1,5", "1:30", "'x'"]
)
NO_INTEGERS = st.sampled_from(["1.0", "1e3", "0x10", "010", "-9223372036854775809", "9" * 25, "9" * 5000])
BROKEN = st.sampled_from(
    ["[", "'", "!!float 1", "!x 1", "*a", "1\n---\n2", "@", "{a: 1, a: 2}", "[[[[[[[[[[[[[[[[[[[[[[["]
)


def invalid_values(kind: Any) -> st.SearchStrategy[str]:
    """Return YAML texts that are invalid for a type."""
    parts = get_args(kind)
    if type(None) in parts:
        (inner,) = (part for part in parts if part is not type(None))
        return invalid_values(inner).filter(lambda text: text != "null")
    if get_origin(kind) is Literal:
        return st.one_of(WORDS, LISTS, NO_NUMBERS, BROKEN).filter(lambda text: text not in map(str, parts))
    if kind is bool:
        return st.one_of(st.sampled_from(["0", "1", "2", "null", "tru", "1.0"]), LISTS, BROKEN)
    if kind is int:
        return st.one_of(WORDS, LISTS, NO_NUMBERS, NO_INTEGERS, BROKEN, st.sampled_from(["null", "-1"]))
    if kind is float:
        return st.one_of(WORDS, LISTS, NO_NUMBERS, BROKEN, st.sampled_from(["null", "-0.5"]))
    if get_origin(kind) is tuple:
        # The last one has two finite numbers above all limits, in the wrong order.
        wrong = ["1", "1, 2", "[a, b]", "[.nan, 1]", "[1, [2]]", "null", "[9e9, -9e9]"]
        wrong += [] if parts[-1] is ... else ["[1]", "[1, 2, 3]"]
        # A run may have no loggers.
        wrong += ["[]"] if parts[0] is not Logger else []
        return st.one_of(WORDS, NO_NUMBERS, BROKEN, st.sampled_from(wrong))
    return st.one_of(LISTS.filter(lambda text: text != "{}"), WORDS, NO_NUMBERS, BROKEN)


FIELDS = {name: field.type for name, field, _ in _leaf_fields(RunConfig)}
# Every text is valid for these.
TEXTS = [name for name, kind in FIELDS.items() if kind is str]


@st.composite
def invalid_settings(draw) -> tuple[str, str]:
    name = draw(st.sampled_from(sorted(FIELDS)))
    if name in TEXTS:
        return name, draw(WORDS) + draw(st.sampled_from(["\0", "\udcff"])) + draw(WORDS)
    return name, draw(invalid_values(FIELDS[name]))


def as_yaml(name: str, text: str) -> str:
    *groups, leaf = name.split(".")
    if name in TEXTS:
        text = '"' + text.replace("\0", "\\0").replace("\udcff", "\\udcff") + '"'
    # Text of several lines stays in its place.
    text = text.replace("\n", "\n" + "  " * len(groups))
    return (
        "".join(f"{'  ' * depth}{group}:\n" for depth, group in enumerate(groups))
        + f"{'  ' * len(groups)}{leaf}: {text}\n"
    )


def refused_by_train(*arguments: str) -> str:
    """Return the message of a training that must end with code 2, and writes nothing to the working directory."""
    printed = io.StringIO()
    with pytest.raises(SystemExit) as stop, redirect_stderr(printed):
        cli.main(["train", *arguments])
    assert stop.value.code == 2
    message = printed.getvalue()
    assert message.startswith("error: ") and "Traceback" not in message and len(message) < 2000
    return message


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=250, deadline=None, suppress_health_check=checks)
@given(invalid=invalid_settings())
def test_an_invalid_setting_on_the_command_line_is_named(folder, monkeypatch, invalid):
    monkeypatch.chdir(folder)
    Path("run.yaml").touch()
    name, text = invalid
    assert name in refused_by_train("run.yaml", f"{name}={text}")
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]


@settings(max_examples=250, deadline=None, suppress_health_check=checks)
@given(invalid=invalid_settings())
def test_an_invalid_setting_in_a_file_is_named(folder, monkeypatch, invalid):
    monkeypatch.chdir(folder)
    name, text = invalid
    Path("run.yaml").write_text("seed: 1\n" * (name != "seed") + as_yaml(name, text), encoding="utf-8")
    message = refused_by_train("run.yaml")
    # What is not YAML, is named by its line.
    assert name in message or "run.yaml is not" in message
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]


KINDS = sorted({command.settings for command in COMMANDS.values() if command.settings})


@settings(max_examples=100, deadline=None, suppress_health_check=checks)
@given(data=st.data())
def test_settings_of_all_commands_are_checked_alike(data):
    config_class = import_object(data.draw(st.sampled_from(KINDS)))
    kinds = {name: field.type for name, field, _ in _leaf_fields(config_class)}
    name = data.draw(st.sampled_from(sorted(kinds)))
    text = "a\0b" if kinds[name] is str else data.draw(invalid_values(kinds[name]))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        build(config_class, {}, [f"{name}={text}"])


def test_the_fuzz_reaches_every_setting():
    assert set(FIELDS) == {name for name, *_ in iter_settings(RunConfig)} and len(TEXTS) > 4
