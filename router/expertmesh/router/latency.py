"""How long answers take, and from when on one is late. Pure; the caller measures.

Dean and Barroso, "The Tail at Scale" (2013): ask another copy what has taken longer than the 95th
percentile of such calls.
"""

WINDOW = 128
LEAST = 20
"""Times below which nothing is said of a size."""
_LATE_QUANTILE = 0.95
_LEAST_OUTLIER = 2.0
"""Late is no sooner than this many medians: where all answers take alike, none is late."""
_LEAST_LATE_S = 1e-3
_RENEW_EVERY = 16


class _Window:
    """The newest times of one size."""

    __slots__ = ("_late_s", "_renew_at", "num_seen", "times_s")

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.num_seen = 0
        self._late_s: float | None = None
        self._renew_at = LEAST

    def observe(self, time_s: float) -> None:
        if self.num_seen < WINDOW:
            self.times_s.append(time_s)
        else:
            self.times_s[self.num_seen % WINDOW] = time_s
        self.num_seen += 1

    def late_s(self) -> float | None:
        """Sorts only when it is asked: the times of all replicas together hardly ever are."""
        if self.num_seen >= self._renew_at:
            self._renew_at = self.num_seen + _RENEW_EVERY
            ordered = sorted(self.times_s)
            outlier_s = _LEAST_OUTLIER * ordered[len(ordered) // 2]
            quantile_s = ordered[int(_LATE_QUANTILE * (len(ordered) - 1))]
            self._late_s = max(quantile_s, outlier_s, _LEAST_LATE_S)
        return self._late_s


class Latencies:
    """Of one replica, or of all. Sizes are powers of two of rows."""

    def __init__(self) -> None:
        self._windows: dict[int, _Window] = {}

    def observe(self, num_rows: int, time_s: float) -> None:
        """An answer came, or was no longer waited for, after `time_s`."""
        size = num_rows.bit_length()
        window = self._windows.get(size)
        if window is None:
            window = self._windows[size] = _Window()
        window.observe(time_s)

    def late_s(self, num_rows: int) -> float | None:
        """Time after which an answer for that many rows is late; None until enough have come."""
        window = self._windows.get(num_rows.bit_length())
        return window.late_s() if window else None
