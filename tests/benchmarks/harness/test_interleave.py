"""Interleaved rounds: one open stream at a time, discarded batches, failures, percentiles, the time limit."""

import subprocess
import sys
import time
from itertools import count, repeat

import pytest

from benchmarks.harness import interleave, records
from benchmarks.harness.interleave import Stream, StreamBudget, StreamRound
from benchmarks.harness.session import Case, Session
from benchmarks.harness.timing import QUICK, Failure

SHORT = StreamBudget(rounds=3, seconds=0.0, min_batches=2)


def stream(numbers=None, images=4, events=None, **values):
    """Return an endless stream that appends its batch numbers to `numbers`, and "open" and "closed" to `events`."""
    numbers, events = [] if numbers is None else numbers, [] if events is None else events

    def start():
        events.append("open")
        try:
            for number in count():
                numbers.append(number)
                yield images
        finally:
            events.append("closed")

    return Stream(start, lambda batch: batch, **values)


def test_prefetched_batches_are_not_counted():
    numbers = []
    result = interleave.run_round(stream(numbers, prefetched=3), SHORT)
    assert result.images == 2 * 4 and len(result.batch_s) == 2 and numbers == [0, 1, 2, 3, 4]


def test_a_round_ends_after_a_complete_burst():
    assert len(interleave.run_round(stream(burst=5), SHORT).batch_s) == 5


def test_a_round_lasts_at_least_its_seconds():
    slow = stream()._replace(consume=lambda batch: time.sleep(0.01) or batch)
    result = interleave.run_round(slow, StreamBudget(rounds=1, seconds=0.05, min_batches=1))
    assert 4 <= len(result.batch_s) <= 6 and 0.05 <= sum(result.batch_s) < 1
    assert result.images_per_s == pytest.approx(result.images / sum(result.batch_s))


def test_one_stream_is_open_at_a_time_and_the_order_alternates():
    log = []

    def logging(name):
        def start():
            log.append(name)
            try:
                yield from repeat(4)
            finally:
                log.append(name.lower())

        return Stream(start, lambda batch: batch)

    results = interleave.compare({name: logging(name) for name in "AB"}, SHORT, prepare=lambda: log.append("-"))
    assert "".join(log) == "-Aa-Bb" + "-Bb-Aa" + "-Aa-Bb"
    assert [len(rounds) for rounds in results.values()] == [3, 3]


def test_a_stream_that_raises_is_closed_and_the_others_continue():
    events = []
    broken = stream(events=events)._replace(consume=lambda batch: 1 // 0)
    results = interleave.compare({"bad": broken, "good": stream()}, SHORT)
    assert isinstance(results["bad"], Failure) and "ZeroDivisionError" in results["bad"].message
    assert isinstance(results["good"], list) and len(results["good"]) == 3
    assert events == ["open", "closed"], "it is not opened again"


def test_all_streams_have_one_round_after_the_deadline():
    results = interleave.compare({name: stream() for name in "AB"}, SHORT, deadline=time.monotonic() - 1)
    assert [len(rounds) for rounds in results.values()] == [1, 1]


def test_max_batches_ends_a_round_and_a_round_without_batches_raises():
    endless = StreamBudget(rounds=1, seconds=1e9, min_batches=1)
    assert len(interleave.run_round(stream(prefetched=2), endless, max_batches=6).batch_s) == 4
    with pytest.raises(RuntimeError, match="too little data"):
        interleave.run_round(stream(prefetched=4), endless, max_batches=4)


def test_a_record_contains_rate_percentiles_and_waiting_times(tmp_path):
    session = Session({"cores": 2}, budget=QUICK, device="cpu", out=tmp_path / "x.jsonl")
    rounds = [StreamRound(80, [0.1] * 10), StreamRound(80, [0.2] * 10), StreamRound(80, [0.1] * 9 + [3.1])]
    interleave.record(session, Case("read", {"B": 8}), "ours", rounds, doubt=0.5)
    interleave.record(session, Case("read", {"B": 8}), "peer", Failure("no"))
    ours, peer = records.read(tmp_path / "x.jsonl")
    assert (ours.median_ms, ours.repeats) == (pytest.approx(200), 3)
    assert ours.p20_ms is not None and 100 < ours.p20_ms < 200
    assert ours.figures["images_per_s"] == 40 and ours.figures["images_per_s_per_core"] == 20
    assert ours.figures["batch_p50_ms"] == 100 and ours.figures["batch_p99_ms"] == 3100
    assert ours.figures["images"] == 240 and ours.figures["doubt"] == 0.5
    assert peer.failure == "no" and peer.median_ms is None
    assert "cpu_ms_per_image" not in ours.figures, "it was not measured"


def test_a_record_contains_the_median_cpu_time_per_image():
    session = Session({"cores": 2}, budget=QUICK, device="cpu")
    rounds = [StreamRound(100, [1.0], cpu_s) for cpu_s in (0.3, 0.2, 0.9)]
    interleave.record(session, Case("read", {"B": 8}), "ours", rounds)
    assert session.records[0].figures["cpu_ms_per_image"] == 3


def test_the_cpu_time_of_a_round_includes_worker_processes():
    busy = "import sys, time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\nsys.stdin.read()"

    def start():
        # The worker is a child of a child, as with a fork server, and is still alive at the end of the round.
        worker = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"
        command = [sys.executable, "-c", worker]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            yield 4
            assert process.stdout is not None
            process.stdout.readline()
            yield 4

    once = StreamBudget(rounds=1, seconds=0.0, min_batches=2)
    cpu_s = interleave.run_round(Stream(start, lambda batch: batch), once).cpu_s
    assert cpu_s is not None and 0.45 < cpu_s < 5


def test_all_percentiles_of_a_single_round_are_equal():
    summary = interleave.summarize([StreamRound(8, list(repeat(0.1, 2)))])
    assert summary == {"median_ms": 100, "p20_ms": 100, "p80_ms": 100, "repeats": 1}
