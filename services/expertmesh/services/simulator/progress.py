"""How far every request is, while time goes by in steps: prompts first come, first served; every
forward carries one token of each answer under way. Vectorised over requests; pure.
"""

import numpy as np
from numpy.typing import NDArray

from expertmesh.services.simulator.arrivals import Arrivals

_EPS = 1e-6


class Progress:
    """The requests of a simulation."""

    def __init__(self, arrivals: Arrivals) -> None:
        self._arrivals = arrivals
        self._upto = np.cumsum(arrivals.context, dtype=np.float64)
        """Prompt tokens of the requests up to and with each."""
        count = len(arrivals)
        self.first_s = np.full(count, np.inf)
        """When the first token was there."""
        self._first_at = np.full(count, np.inf)
        """Forwards done by then."""
        self._size = 1 << int(arrivals.generated.max(initial=1) + 4096).bit_length()
        self._ends: NDArray[np.int64] = np.zeros(self._size, np.int64)
        """Answers that end with each forward, around a ring."""
        self._arrived = self._begun = 0
        self._prefilled = 0.0
        self._forwards = 0.0
        self._times: list[tuple[float, float]] = [(0.0, 0.0)]
        self._failures: list[float] = []
        self.active = 0
        """Answers under way."""
        self.tokens = 0.0
        """Passed through the model."""

    @property
    def is_done(self) -> bool:
        """Whether every request has been answered, or has failed."""
        return self._begun == len(self._upto) and not self.active

    def arrive(self, until_s: float) -> int:
        """Requests come until then. Returns the tokens of their prompts."""
        before = self._arrived
        times_s = self._arrivals.times_s
        self._arrived = before + int(np.searchsorted(times_s[before:], until_s, side="left"))
        return int(self._arrivals.context[before : self._arrived].sum())

    def next_arrival_s(self) -> float:
        """When the next request comes; infinite if none does."""
        if self._arrived == len(self._upto):
            return float("inf")
        return float(self._arrivals.times_s[self._arrived])

    @property
    def waiting_tokens(self) -> float:
        """Prompt tokens that have come and not been computed."""
        came = self._upto[self._arrived - 1] if self._arrived else 0.0
        return max(0.0, float(came) - self._prefilled)

    def go_on(
        self, begin_s: float, took_s: float, forwards: float, prompt_tokens: float, forward_s: float
    ) -> float:
        """A step of time. Returns the tokens of answers in it.

        Args:
            forwards: that each answer under way took part in.
            prompt_tokens: computed in the step.
            forward_s: what one forward takes.
        """
        done, last = self._prefilled + prompt_tokens, self._forwards + forwards
        answers = self._end(last)
        stop = int(np.searchsorted(self._upto[: self._arrived], done + _EPS, side="right"))
        if stop > self._begun:
            own = slice(self._begun, stop)
            part = (self._upto[own] - self._prefilled) / max(prompt_tokens, _EPS)
            part = np.clip(part, 0, 1)
            at_s = begin_s + part * took_s
            self.first_s[own] = np.maximum(at_s, self._arrivals.times_s[own] + forward_s)
            self._first_at[own] = self._forwards + part * forwards
            answers += self._start(own, last)
            self._begun = stop
        self._prefilled, self._forwards = done, last
        self._times.append((last, begin_s + took_s))
        self.tokens += prompt_tokens + answers
        return answers

    def _end(self, last: float) -> float:
        """Answers go on until so many forwards are done. Returns their tokens."""
        places = np.arange(int(self._forwards), int(last))
        ending = self._ends[places % self._size]
        self._ends[places % self._size] = 0
        tokens = self.active * (last - self._forwards) - float((ending * (last - places)).sum())
        self.active -= int(ending.sum())
        return max(0.0, tokens)

    def _start(self, own: slice, last: float) -> float:
        """Answers begin, some of which may end at once. Returns their tokens until then."""
        first_at, more = self._first_at[own], self._arrivals.generated[own] - 1
        ends = np.floor(first_at + more).astype(np.int64)
        goes_on = ends >= int(last)
        np.add.at(self._ends, ends[goes_on] % self._size, 1)
        self.active += int(goes_on.sum())
        return float(np.minimum(more, last - first_at).sum())

    def fail(self, now_s: float) -> None:
        """Everything that is under way, or has come, fails."""
        self._failures.append(self._forwards)
        self._ends[:] = 0
        self.active = 0
        self._begun = self._arrived
        self._prefilled = float(self._upto[self._arrived - 1]) if self._arrived else 0.0
        self._forwards += 1
        self._times.append((self._forwards, now_s))

    def last_s(self) -> NDArray[np.float64]:
        """When each answer was complete; infinite if it failed."""
        at, when_s = (np.array(column) for column in zip(*self._times, strict=True))
        ends = self._first_at + self._arrivals.generated - 1
        last_s: NDArray[np.float64] = np.full(len(ends), np.inf)
        begun = np.isfinite(self._first_at)
        last_s[begun] = np.interp(ends[begun], at, when_s)
        np.maximum(last_s, self.first_s, out=last_s)
        if self._failures:
            failures = np.array(self._failures)
            # the first failure after the first token; none if the answer ended before it
            place = np.searchsorted(failures, np.where(begun, self._first_at, 0.0), side="left")
            hit = np.append(failures, np.inf)[place] < ends
            last_s[begun & hit] = np.inf
        return last_s
