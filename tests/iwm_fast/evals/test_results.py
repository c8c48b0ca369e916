"""Rows of numbers: written whole, read back the same, laid out; and evaluations shared among ranks."""

import io
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pyarrow import parquet
from rich.console import Console

from fixtures.launchers import CHILD
from fixtures.paths import WORKERS
from iwm_fast.evals.results import Result, Row, bootstrap, read_result, save_result, table
from iwm_fast.runtime.distributed import single_process
from iwm_fast.runtime.sharding import PADDING, drop_padding, gather_in_order, local_share

WORKER = WORKERS / "ranks_sharing.py"

FULL = Row(
    subject="predictor", metric="accuracy", value=0.5, low=0.25, high=0.75, control=0.125, control_name="untrained",
    chance=0.1, num_tuned=1234, num_samples=20_000, images_per_s=99.6, time_s=0.04,
)  # fmt: skip
BARE = Row(subject="encoder", metric="error", value=2.0)
RESULT = Result(
    task="knn", name="knn_json.a", rows=(FULL, BARE), step=1000, seed=3,
    settings={"lrs": [0.1, 1e-3], "data": {"a": ""}},
    details={"chosen": None, "names": ["ä"]},
)  # fmt: skip


def test_a_result_is_read_as_it_was_saved(tmp_path):
    path = save_result(tmp_path / "run", RESULT)
    assert path == tmp_path / "run" / "evaluations" / "knn_json.a.json"
    assert read_result(path) == RESULT
    assert set(json.loads(path.read_text(encoding="utf-8"))["commit"]) <= set("0123456789abcdef+changesunknow")


def test_the_rows_alone_are_a_table_with_a_type_for_every_column(tmp_path):
    found = parquet.read_table(save_result(tmp_path, RESULT).with_suffix(".parquet"))
    shared = {"task": "knn", "name": "knn_json.a", "step": 1000, "seed": 3}
    assert found.to_pylist() == [shared | asdict(row) for row in RESULT.rows]
    assert found.column_names == [*shared, *(one.name for one in fields(Row))]
    # also of a column in which nobody has anything, so that tables of many runs can be joined
    bare = parquet.read_table(save_result(tmp_path, replace(RESULT, rows=(BARE,))).with_suffix(".parquet"))
    assert bare.schema == found.schema


def test_a_later_result_replaces_the_earlier_one_and_drafts_are_gone(tmp_path):
    save_result(tmp_path, RESULT)
    path = save_result(tmp_path, replace(RESULT, step=2000, rows=(BARE,)))
    assert read_result(path).step == 2000 and len(parquet.read_table(path.with_suffix(".parquet"))) == 1
    assert sorted(one.name for one in path.parent.iterdir()) == ["knn_json.a.json", "knn_json.a.parquet"]


def test_what_has_not_been_evaluated_is_asked_for_by_its_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"knn_json\.a\.json does not exist; run `iwm evaluate knn` first"):
        read_result(tmp_path / "knn_json.a.json")
    (tmp_path / "knn.json").write_text('{"knn": 0.7}')
    with pytest.raises(ValueError, match=r"knn\.json was written by an older iwm-fast, without rows; delete it, or"):
        read_result(tmp_path / "knn.json")


def test_a_number_is_found_by_its_names():
    assert RESULT.value("predictor", "accuracy") == 0.5 and RESULT.row("encoder", "error") is BARE
    with pytest.raises(KeyError, match=r"knn_json\.a has no row 'encoder', 'accuracy'"):
        RESULT.value("encoder", "accuracy")


def lines_of(result: Result) -> list[str]:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(result))
    return console.export_text().splitlines()


def test_a_table_shows_what_rows_have_and_no_empty_columns():
    title, _, heading, _, first, second, *_ = lines_of(RESULT)
    assert title.strip() == "knn_json.a, step 1000, seed 3"
    cells = [[cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]] for line in (heading, first, second)]
    assert cells == [
        ["", "measured", "value", "95 % interval", "control", "chance", "tuned", "images/s", "s", "images"],
        ["predictor", "accuracy", "0.5000", "0.2500 .. 0.7500", "0.1250 untrained", "0.1000", "1,234", "100", "0.0",
         "20,000"],
        ["encoder", "error", "2.0000", *[""] * 7],
    ]  # fmt: skip
    heading = lines_of(replace(RESULT, rows=(BARE,)))[2]
    assert [cell.strip() for cell in heading.split("┃")[1:-1]] == ["", "measured", "value"]


def test_the_interval_is_that_of_all_ways_to_draw_two_images_anew():
    # of 0 and 1: mean 0 and 1 with probability 1/4 each, so both lie inside 95 %
    assert bootstrap(np.array([0.0, 1.0])) == (0.0, 1.0)
    assert bootstrap(np.array([0.25])) == (0.25, 0.25)


def test_the_interval_is_the_normal_one_where_there_are_many_images():
    correct = (np.arange(4000) % 5 == 0).astype(float)
    low, high = bootstrap(correct)
    half = 1.96 * np.sqrt(0.2 * 0.8 / 4000)
    assert (low, high) == (pytest.approx(0.2 - half, abs=1e-3), pytest.approx(0.2 + half, abs=1e-3))
    assert bootstrap(correct) == (low, high) != bootstrap(correct, seed=1)


@settings(max_examples=20)
@given(arrays.arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1)))
def test_an_interval_lies_within_the_values(values):
    low, high = bootstrap(values)
    assert values.min() - 1e-9 <= low <= high <= values.max() + 1e-9


@given(st.integers(0, 50), st.sampled_from([(), (3,), (2, 0), (2, 3)]))
def test_one_process_has_everything_as_it_is(count, rest):
    samples = np.arange(count, dtype=np.int64)[::-1].copy()
    alone = single_process("cpu")
    part = local_share(samples, alone)
    values = torch.rand(count, *rest)
    assert np.array_equal(part, samples) and np.array_equal(drop_padding(part), samples)
    assert torch.equal(gather_in_order(part, values, alone), values)


def test_padding_is_not_computed():
    assert drop_padding(np.array([4, 0, PADDING])).tolist() == [4, 0]


@pytest.mark.multi_rank
def test_three_ranks_join_their_shares_in_the_order_of_the_samples():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in "012":
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(
            subprocess.Popen([sys.executable, str(WORKER)], env=os.environ | place | CHILD,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )  # fmt: skip
    printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 3, printed
    assert all("shares of 0 .. 8 samples joined" in one for one in printed)
