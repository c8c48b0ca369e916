"""What the YAML reader refuses, with which words, and how it reads the rest."""

import time
from pathlib import Path

import pytest

from iwm_fast.config.loading import load_config
from iwm_fast.config.strict_yaml import MAX_BYTES, parse_float, parse_int, parse_yaml, read_yaml, resolve
from iwm_fast.evals.multitask.task_list import read_task_list
from iwm_fast.lab.config import read_lab

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
"""A text of 400 bytes that stands for 10^9 values."""

REFUSED: dict[str | bytes, str] = {
    # keys that occur twice
    "data:\n  train: a\ndata:\n  train: b\n": "run.yaml is not accepted in line 3: 'data' occurs twice, first in line",
    "optim: {lr: 1.0, lr: 2.0}": "in line 1: 'optim.lr' occurs twice, first in line 1; remove or merge one",
    "seed: 1\noptim:\n  lr: 1\n  'lr': 2\n": "in line 4: 'optim.lr' occurs twice, first in line 3",
    # encodings
    b"\xff\xfe\0bad": "run.yaml must be text in UTF-8, got UTF-16; save it as UTF-8",
    "seed: 1\n".encode("utf-16"): "run.yaml must be text in UTF-8, got UTF-16; save it as UTF-8",
    "seed: 1\n".encode("utf-16-le"): "run.yaml is not valid YAML in line 1: unexpected '\\\\x00'",
    "a: 1\ndata: {train: café}\n".encode("latin-1"): "must be text in UTF-8, got byte 0xe9 in line 2; save it as UTF-8",
    b"\x89PNG\r\n\x1a\n": "run.yaml must be text in UTF-8, got byte 0x89 in line 1",
    b"seed: 1\n\x00": "run.yaml is not valid YAML in line 2: unexpected '\\\\x00'",
    # size, depth and aliases
    "[" * 30_000: "in line 1: values must be nested at most 20 deep",
    "optim: " + "{a: " * 5000: "in line 1: values must be nested at most 20 deep",
    "- " * 10_000: "values must be nested at most 20 deep",
    BOMB: "in line 5: aliases must stand for at most 20,000 values in all",
    "optim: &o [*o]": "in line 1: no value before this one has the anchor &o",
    "optim: *o": "in line 1: no value before this one has the anchor &o",
    "#" * (MAX_BYTES + 1): "run.yaml must have at most 1,048,576 bytes, as a file of settings",
    # what only programs write
    "seed: !!python/object/apply:os.getpid []": "in line 1: tags such as !!python/object/apply:os.getpid are not",
    "seed: !custom 1": "tags such as !custom are not accepted; write the value without it",
    "!!str seed: 1": "tags such as !!str are not accepted",
    "seed: 1\n---\nseed: 2\n": "in line 2: a second document begins here; use one file per document",
    "? [a, b]\n: 1\n": "in line 1: a key must be text",
    "<<: 3\nseed: 1\n": "in line 1: the merge key << must be followed by the alias of a mapping",
    # what is no YAML
    "seed: 1\n\toptim: 2\n": "run.yaml is not valid YAML in line 2: .*; indent with spaces",
    "seed: 'x": "run.yaml is not valid YAML in line 1: found unexpected end of stream",
    "data: {train: a": "run.yaml is not valid YAML in line 1",
    'seed: "\\UFFFFFFFF"': "an escape sequence names no character",
    # another kind of value
    "- seed\n": r"run.yaml must hold `group:` and `key: value` lines, got \['seed'\]",
    "seed": "run.yaml must hold `group:` and `key: value` lines, got 'seed'",
    "optim: [lr]": r"optim must hold settings as `key: value`, got \['lr'\]",
}


@pytest.mark.parametrize("content", REFUSED, ids=lambda content: repr(content[:24]))
def test_a_file_is_refused_quickly_in_one_line(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    began = time.perf_counter()
    with pytest.raises(ValueError, match=REFUSED[content]) as raised:
        load_config(path)
    assert time.perf_counter() - began < 5 and "\n" not in str(raised.value)


def test_a_file_of_a_gigabyte_is_not_read(tmp_path):
    with (tmp_path / "run.yaml").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(ValueError, match="must have at most"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "read",
    [load_config, lambda path: read_lab(path, set()), lambda path: read_task_list(str(path))],
    ids=["run", "lab", "tasks"],
)
def test_every_file_is_read_by_the_same_rules(tmp_path, read):
    (tmp_path / "file.yaml").write_text("a: {label: cls}\na: {label: json.b}\n")
    with pytest.raises(ValueError, match=r"file.yaml is not accepted in line 2: 'a' occurs twice"):
        read(tmp_path / "file.yaml")


def test_a_base_is_read_by_the_same_rules_and_named(tmp_path):
    (tmp_path / "parent.yaml").write_text("seed: 1\nseed: 2\n")
    (tmp_path / "run.yaml").write_text("base: parent.yaml\n")
    with pytest.raises(ValueError, match=r"parent.yaml is not accepted in line 2"):
        load_config(tmp_path / "run.yaml")
    (tmp_path / "parent.yaml").write_text("seed: 1\noptim:\n  lr: fast\n")
    with pytest.raises(ValueError, match=r"optim.lr must be a finite number, got 'fast'") as raised:
        load_config(tmp_path / "run.yaml")
    assert raised.value.__notes__ == [f"it is set in {tmp_path / 'parent.yaml'}, line 3"]


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no configuration file"):
        load_config(tmp_path)
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\ufeff# a byte order mark\n", "optim:\n"])
def test_an_empty_file_gives_the_defaults(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "run.yaml") == load_config(Path(tmp_path / "run.yaml"), ["seed=0"])


def test_settings_have_the_meaning_of_their_type(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "seed: 7\ndata: {train: no, val: 007, max_samples: 1_000}\n"
        "optim: {lr: 1e-3, epochs: 2, clip_norm: ~, weight_decay: [0, 1e-2]}\n"
        "runtime: {compile: yes, zero_stage: 2, activation_checkpointing: False}\noutput: {folder: 2024-01-01}\n"
    )
    config = load_config(tmp_path / "run.yaml")
    assert (config.data.train, config.data.val, config.data.max_samples) == ("no", "007", 1000)
    assert (config.optim.lr, config.optim.epochs, config.optim.clip_norm) == (1e-3, 2.0, None)
    assert config.optim.weight_decay == (0.0, 0.01) and config.output.folder == "2024-01-01"
    assert (config.runtime.compile, config.runtime.zero_stage, config.runtime.activation_checkpointing) == (
        True,
        2,
        False,
    )
    assert type(config.data.train) is str and type(config.output.folder) is str


def test_keys_are_text_and_aliases_and_merge_keys_work():
    text = "on: 1\n1: &a {x: 1, y: [2]}\nno: *a\nmerged: {<<: [*a, {z: 3}], x: 4}\n'<<': 5\n"
    tree = parse_yaml(text, "text")
    assert resolve(tree) == {
        "on": 1,
        "1": {"x": 1, "y": [2]},
        "no": {"x": 1, "y": [2]},
        "merged": {"x": 4, "y": [2], "z": 3},
        "<<": 5,
    }
    # Copies, because settings of the command line are written into one of the places.
    tree["no"]["x"] = None
    assert tree["1"]["x"] == "1"


@pytest.mark.parametrize(
    ("text", "whole", "number"),
    [
        ("0", 0, 0.0),
        ("-12", -12, -12.0),
        ("1_000", 1000, 1000.0),
        ("1e-3", None, 1e-3),
        ("1.5E+2", None, 150.0),
        (".5", None, 0.5),
        ("5.", None, 5.0),
        # YAML 1.1 reads 8, 90 and 16.
        ("010", None, 10.0),
        ("1:30", None, None),
        ("0x10", None, None),
        ("1__0", None, None),
        ("nan", None, None),
        (".inf", None, None),
        ("١", None, None),
        ("", None, None),
        ("+", None, None),
        ("1 ", None, None),
        ("9" * 400, None, None),
    ],
)
def test_numbers_are_decimal(text, whole, number):
    assert (parse_int(text), parse_float(text)) == (whole, number)


def test_quoted_text_is_text():
    assert resolve(parse_yaml("['1', \"true\", 1, true, text, null, '']", "x")) == [
        "1",
        "true",
        1,
        True,
        "text",
        None,
        "",
    ]
