"""What is said of calls: shares of time, failures, recovery."""

import numpy as np
import pytest
from chaos.caller import RECORD as WRITTEN
from chaos.calls import RECORD, Calls


def calls(*records: tuple[float, float, int, int, int, int]) -> Calls:
    """(start, took, kind, rows, inexact, not_numbers) of each."""
    return Calls.of(b"".join(WRITTEN.pack(*record) for record in records), ("DEAD", "FULL"))


def test_what_a_caller_writes_is_what_is_read() -> None:
    assert WRITTEN.size == RECORD.itemsize
    [record] = calls((1.5, 0.25, 2, 16, 3, 1)).records
    assert record.tolist() == (1.5, 0.25, 2, 16, 3, 1)


def test_a_record_half_written_is_left_out() -> None:
    whole = WRITTEN.pack(1.0, 0.1, 0, 16, 0, 0)
    assert len(Calls.of(whole + whole[:5])) == 1
    assert len(Calls.of(b"")) == 0


def test_windows_by_start_by_end_and_by_overlap() -> None:
    seen = calls((0.0, 1.0, 0, 1, 0, 0), (0.5, 2.0, 0, 1, 0, 0), (3.0, 0.1, 0, 1, 0, 0))
    assert len(seen.started(0.0, 1.0)) == 2
    assert len(seen.ended(0.0, 2.0)) == 1
    assert len(seen.running(1.5, 2.0)) == 1
    assert len(seen.running(1.5, 4.0)) == 2


def test_errors_and_wrong_rows_are_counted() -> None:
    seen = calls((0, 1, 0, 16, 3, 1), (0, 1, 1, 16, 0, 0), (0, 1, 2, 16, 0, 0), (0, 1, 2, 16, 0, 0))
    assert seen.num_failed == 3
    assert (seen.num_inexact_rows, seen.num_not_numbers) == (3, 1)
    assert seen.errors() == "DEAD 1, FULL 2"
    assert seen.share_of("FULL") == pytest.approx(2 / 3)
    assert seen.share_of("LATE") == 0
    assert calls((0, 1, 0, 16, 0, 0)).errors() == "0"


def test_throughput_counts_what_succeeded() -> None:
    seen = calls((0, 0.5, 0, 1, 0, 0), (0, 0.6, 1, 1, 0, 0), (0, 0.7, 0, 1, 0, 0))
    assert seen.per_s(0, 2) == 1.0


def test_recovery_ends_with_the_last_call_that_suffered() -> None:
    seen = calls(
        (0.0, 9.0, 0, 1, 0, 0),  # slow, but over before the fault
        (9.5, 0.9, 0, 1, 0, 0),
        (10.0, 0.1, 1, 1, 0, 0),
        (10.2, 0.1, 0, 1, 0, 0),
        (12.0, 3.0, 0, 1, 0, 0),  # after the time looked at
    )
    assert seen.recovered_s(10.0, 11.0, usual_s=0.5) == pytest.approx(0.4)
    assert seen.recovered_s(10.0, 11.0, usual_s=1.0) == pytest.approx(0.1)
    assert calls().recovered_s(0, 1, 0.1) == 0


def test_percentiles_of_nothing_are_zero() -> None:
    assert calls().percentile_s(0.99) == calls().longest_s == 0
    assert calls((0, 2, 0, 1, 0, 0)).percentile_s(0.5) == 2
    assert np.isclose(calls((0, 1, 0, 1, 0, 0), (0, 3, 0, 1, 0, 0)).longest_s, 3)


def test_the_longest_calls_come_first() -> None:
    seen = calls((0, 1, 0, 1, 0, 0), (5, 3, 0, 1, 0, 0), (7, 2, 0, 1, 0, 0))
    assert seen.longest(2) == [(5, 3), (7, 2)]
