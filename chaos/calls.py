"""What callers saw: counts, latencies, stalls, recovery. Pure.

Times are seconds by CLOCK_MONOTONIC.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

RECORD = np.dtype(
    [
        ("start_s", "<f8"),
        ("took_s", "<f8"),
        ("kind", "<u2"),
        ("rows", "<u2"),
        ("inexact", "<u2"),
        ("not_numbers", "<u2"),
    ]
)
"""As `chaos.caller` writes them."""


@dataclass(frozen=True)
class Calls:
    """Calls in the order in which they ended.

    Args:
        records: of dtype `RECORD`.
        kinds: names of the kinds of error; kind 1 is the first.
    """

    records: Any
    kinds: Sequence[str] = ()

    @classmethod
    def of(cls, data: bytes, kinds: Sequence[str] = ()) -> Self:
        """From what a caller wrote."""
        whole = len(data) - len(data) % RECORD.itemsize
        return cls(np.frombuffer(data[:whole], RECORD), kinds)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def _end_s(self) -> Any:
        return self.records["start_s"] + self.records["took_s"]

    def ended(self, from_s: float, until_s: float) -> Self:
        """Those that ended in this time."""
        return self._only((self._end_s >= from_s) & (self._end_s < until_s))

    def started(self, from_s: float, until_s: float) -> Self:
        """Those that started in this time."""
        start_s = self.records["start_s"]
        return self._only((start_s >= from_s) & (start_s < until_s))

    def running(self, from_s: float, until_s: float) -> Self:
        """Those that were under way at some moment of this time."""
        return self._only((self._end_s >= from_s) & (self.records["start_s"] < until_s))

    def _only(self, which: Any) -> Self:
        return replace(self, records=self.records[which])

    @property
    def num_failed(self) -> int:
        """Calls that got an error."""
        return int((self.records["kind"] > 0).sum())

    @property
    def num_inexact_rows(self) -> int:
        """Rows that are not bit-equal to the reference, without any error."""
        return int(self.records["inexact"].sum())

    @property
    def num_not_numbers(self) -> int:
        """Rows with NaN or infinity."""
        return int(self.records["not_numbers"].sum())

    @property
    def longest_s(self) -> float:
        """The longest call, failed or not: nobody was stuck longer."""
        return float(self.records["took_s"].max(initial=0.0))

    def longest(self, count: int) -> list[tuple[float, float]]:
        """(start, time taken) of the longest calls, the longest first."""
        order = np.argsort(self.records["took_s"])[::-1][:count]
        return [(float(own["start_s"]), float(own["took_s"])) for own in self.records[order]]

    def percentile_s(self, frac: float) -> float:
        """Of the time calls took; 0 if there are none."""
        return float(np.quantile(self.records["took_s"], frac)) if len(self) else 0.0

    def per_s(self, from_s: float, until_s: float) -> float:
        """Calls that succeeded, a second."""
        ended = self.ended(from_s, until_s)
        return (len(ended) - ended.num_failed) / (until_s - from_s)

    def share_of(self, kind: str) -> float:
        """Of the calls that failed, those of a kind; 0 if none failed."""
        if kind not in self.kinds or not self.num_failed:
            return 0.0
        number = list(self.kinds).index(kind) + 1
        return int((self.records["kind"] == number).sum()) / self.num_failed

    def errors(self) -> str:
        """ "0", or each kind with its number."""
        kinds, counts = np.unique(self.records["kind"], return_counts=True)
        found = [
            f"{self.kinds[kind - 1]} {count}"
            for kind, count in zip(kinds, counts, strict=True)
            if kind
        ]
        return ", ".join(found) or "0"

    def recovered_s(self, fault_s: float, until_s: float, usual_s: float) -> float:
        """Time from a fault to the end of the last call that failed or took longer than `usual_s`,
        of those under way between it and `until_s`; 0 if there was none."""
        hit = self.running(fault_s, until_s)
        troubled = hit._only((hit.records["kind"] > 0) | (hit.records["took_s"] > usual_s))
        return float((troubled._end_s - fault_s).max(initial=0.0))
