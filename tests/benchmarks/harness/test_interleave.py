"""Turns: one stream at a time, without what was made ahead; failures, spread, time that runs out."""

import time
from itertools import count, repeat

import pytest

from benchmarks.harness import interleave, records
from benchmarks.harness.interleave import Stream, Turn, Turns
from benchmarks.harness.session import Case, Session
from benchmarks.harness.timing import QUICK, Failure

SHORT = Turns(rounds=3, seconds=0.0, fewest=2)


def stream(made=None, images=4, opened=None, **values):
    """Return a stream that lists its batches in `made` and itself in `opened` while it is open."""
    made, opened = [] if made is None else made, [] if opened is None else opened

    def start():
        opened.append("open")
        try:
            for number in count():
                made.append(number)
                yield images
        finally:
            opened.append("closed")

    return Stream(start, lambda batch: batch, **values)


def test_what_was_made_ahead_is_not_counted():
    made = []
    turn = interleave.take_turn(stream(made, ahead=3), SHORT)
    assert turn.images == 2 * 4 and len(turn.batch_s) == 2 and made == [0, 1, 2, 3, 4]


def test_a_turn_ends_when_all_workers_have_delivered():
    assert len(interleave.take_turn(stream(burst=5), SHORT).batch_s) == 5


def test_a_turn_lasts_as_long_as_it_should():
    slow = stream()._replace(take=lambda batch: time.sleep(0.01) or batch)
    turn = interleave.take_turn(slow, Turns(rounds=1, seconds=0.05, fewest=1))
    assert 4 <= len(turn.batch_s) <= 6 and 0.05 <= sum(turn.batch_s) < 1
    assert turn.images_per_s == pytest.approx(turn.images / sum(turn.batch_s))


def test_streams_are_open_one_at_a_time_and_change_places():
    log = []

    def logging(name):
        def start():
            log.append(name)
            try:
                yield from repeat(4)
            finally:
                log.append(name.lower())

        return Stream(start, lambda batch: batch)

    found = interleave.compare({name: logging(name) for name in "AB"}, SHORT, prepare=lambda: log.append("-"))
    assert "".join(log) == "-Aa-Bb" + "-Bb-Aa" + "-Aa-Bb"
    assert [len(taken) for taken in found.values()] == [3, 3]


def test_a_stream_that_raises_is_closed_and_the_others_go_on():
    opened = []
    broken = stream(opened=opened)._replace(take=lambda batch: 1 // 0)
    found = interleave.compare({"bad": broken, "good": stream()}, SHORT)
    assert isinstance(found["bad"], Failure) and "ZeroDivisionError" in found["bad"].line
    assert isinstance(found["good"], list) and len(found["good"]) == 3
    assert opened == ["open", "closed"], "and is not tried again"


def test_when_time_is_up_every_stream_has_had_one_turn():
    found = interleave.compare({name: stream() for name in "AB"}, SHORT, deadline=time.monotonic() - 1)
    assert [len(taken) for taken in found.values()] == [1, 1]


def test_an_epoch_ends_a_turn_and_one_too_short_is_no_result():
    forever = Turns(rounds=1, seconds=1e9, fewest=1)
    assert len(interleave.take_turn(stream(ahead=2), forever, most_batches=6).batch_s) == 4
    with pytest.raises(RuntimeError, match="too little data"):
        interleave.take_turn(stream(ahead=4), forever, most_batches=4)


def test_a_record_tells_speed_spread_and_waits(tmp_path):
    session = Session({"cores": 2}, effort=QUICK, device="cpu", out=tmp_path / "x.jsonl")
    taken = [Turn(80, [0.1] * 10), Turn(80, [0.2] * 10), Turn(80, [0.1] * 9 + [3.1])]
    interleave.note(session, Case("read", {"B": 8}), "ours", taken, doubt=0.5)
    interleave.note(session, Case("read", {"B": 8}), "peer", Failure("no"))
    ours, peer = records.read(tmp_path / "x.jsonl")
    assert (ours.median_ms, ours.repeats) == (pytest.approx(200), 3)
    assert ours.p20_ms is not None and 100 < ours.p20_ms < 200
    assert ours.figures["images_per_s"] == 40 and ours.figures["images_per_s_per_core"] == 20
    assert ours.figures["batch_p50_ms"] == 100 and ours.figures["batch_p99_ms"] == 3100
    assert ours.figures["images"] == 240 and ours.figures["doubt"] == 0.5
    assert peer.failure == "no" and peer.median_ms is None


def test_one_turn_has_no_spread():
    found = interleave.summarize([Turn(8, list(repeat(0.1, 2)))])
    assert found == {"median_ms": 100, "p20_ms": 100, "p80_ms": 100, "repeats": 1}
