"""Results: saved, read back and shown as tables; bootstrap intervals; and samples shared among ranks."""

import io
import json
import os
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

from fixtures.launchers import CHILD_ENVIRONMENT, free_port
from fixtures.paths import WORKERS
from iwm_fast.evals import results
from iwm_fast.evals.results import Result, Row, bootstrap, read_result, save_result
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


def test_a_saved_result_is_read_back_unchanged(tmp_path):
    path = save_result(tmp_path / "run", RESULT)
    assert path == tmp_path / "run" / "evaluations" / "knn_json.a.json"
    assert read_result(path) == RESULT
    assert set(json.loads(path.read_text(encoding="utf-8"))["commit"]) <= set("0123456789abcdef+changesunknow")


def test_the_rows_are_saved_as_a_table_with_fixed_column_types(tmp_path):
    table = parquet.read_table(save_result(tmp_path, RESULT).with_suffix(".parquet"))
    shared = {"task": "knn", "name": "knn_json.a", "step": 1000, "seed": 3}
    assert table.to_pylist() == [shared | asdict(row) for row in RESULT.rows]
    assert table.column_names == [*shared, *(column.name for column in fields(Row))]
    # Columns without any value have a type, too, so that tables of many runs can be concatenated.
    bare = parquet.read_table(save_result(tmp_path, replace(RESULT, rows=(BARE,))).with_suffix(".parquet"))
    assert bare.schema == table.schema


def test_a_later_result_replaces_the_earlier_one_without_leftovers(tmp_path):
    save_result(tmp_path, RESULT)
    path = save_result(tmp_path, replace(RESULT, step=2000, rows=(BARE,)))
    assert read_result(path).step == 2000 and len(parquet.read_table(path.with_suffix(".parquet"))) == 1
    assert sorted(file.name for file in path.parent.iterdir()) == ["knn_json.a.json", "knn_json.a.parquet"]


def test_a_missing_or_old_result_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"knn_json\.a\.json does not exist; run `iwm evaluate knn` first"):
        read_result(tmp_path / "knn_json.a.json")
    (tmp_path / "knn.json").write_text('{"knn": 0.7}')
    with pytest.raises(ValueError, match=r"knn\.json was written by an older iwm-fast, without rows; delete it or"):
        read_result(tmp_path / "knn.json")


def test_values_and_rows_are_looked_up_by_subject_and_metric():
    assert RESULT.value("predictor", "accuracy") == 0.5 and RESULT.row("encoder", "error") is BARE
    with pytest.raises(KeyError, match=r"knn_json\.a has no row for 'encoder', 'accuracy'"):
        RESULT.value("encoder", "accuracy")


def lines_of(result: Result) -> list[str]:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(results.result_table(result))
    return console.export_text().splitlines()


def test_a_table_has_no_empty_columns():
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


def test_the_interval_covers_all_ways_to_resample_two_images():
    # Resampling 0 and 1 gives means of 0 and 1 with probability 1/4 each, so both are inside the 95 % interval.
    assert bootstrap(np.array([0.0, 1.0])) == (0.0, 1.0)
    assert bootstrap(np.array([0.25])) == (0.25, 0.25)


def test_the_interval_of_many_images_is_that_of_a_normal_distribution():
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
def test_a_single_process_has_all_samples_in_their_order(count, rest):
    samples = np.arange(count, dtype=np.int64)[::-1].copy()
    alone = single_process("cpu")
    share = local_share(samples, alone)
    values = torch.rand(count, *rest)
    assert np.array_equal(share, samples) and np.array_equal(drop_padding(share), samples)
    assert torch.equal(gather_in_order(share, values, alone), values)


def test_padding_is_dropped():
    assert drop_padding(np.array([4, 0, PADDING])).tolist() == [4, 0]


@pytest.mark.multi_rank
def test_three_ranks_gather_their_shares_in_the_order_of_samples():
    ranks, port = [], free_port()
    for rank in "012":
        launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(
            subprocess.Popen([sys.executable, str(WORKER)], env=os.environ | launch | CHILD_ENVIRONMENT,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )  # fmt: skip
    printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 3, printed
    assert all("shares of 0 .. 8 samples joined" in text for text in printed)
