"""Which replica computes which rows of a call: whole experts first, split where it pays. Pure.

Every replica of a call has a level: when it would be done, by what it costs and has to do already.
Experts that several replicas hold go whole to whoever is done first. If that leaves one replica
working while another that could help is idle, they are poured over their holders instead, fewest
copies first, so that the highest level gets as low as it can; more rounds pour each of them again.
After a few rounds that is within a few per cent of the linear program "min T: each expert's rows on
its holders, each level below T", which DeepSeek's LPLB solves for equal replicas.

Times are in microseconds. Rows that go to a replica are whole numbers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from random import Random
from typing import NamedTuple

from expertmesh.router.pools import Pool, Standing, by_start, water_level, whole_rows

ROUNDS = 4
MESSAGE_US = 75.0
"""What another message of a call costs the router, whoever gets it."""
SPLIT_GAIN_US = 100.0
"""An expert's rows are split only if the call is done sooner by that much: a product of its own is
not free."""
_SPLIT_GAIN_FRAC = 0.01
POUR_US = 10.0
"""What pouring takes the router for each expert that has a choice, about. A call whose replicas
could be done sooner by less than that would only be late by it."""

Shares = dict[int, list[tuple[str, int]]]
"""expert -> (replica, rows), at least one row each."""


class _Able(NamedTuple):
    """The holders of some experts."""

    pools: list[Pool]
    is_drawn: bool
    """Whether two of them are drawn for each expert."""
    may_split: bool


class _Several:
    """An expert that several replicas hold."""

    __slots__ = ("asked", "count", "expert", "may_split", "pools")

    def __init__(self, expert: int, count: int, pools: Sequence[Pool], may_split: bool) -> None:
        self.expert = expert
        self.count = count
        self.pools = pools
        self.may_split = may_split
        self.asked: Sequence[Pool] = ()
        """Those that have some of its rows now."""


def share_out(
    rows: Mapping[int, int],
    holders: Mapping[int, Sequence[str]],
    standing: Callable[[str], Standing],
    random: Random,
    *,
    message_us: float = MESSAGE_US,
    split_gain_us: float = SPLIT_GAIN_US,
) -> Shares:
    """The replicas of each expert's rows.

    Of more than two holders with old news, two drawn at random are considered (Mitzenmacher, "How
    useful is old information?", 2000), and those that are asked anyway.

    Args:
        rows: expert -> rows, at least 1 each.
        holders: expert -> replicas that hold it, at least one each; hashable.
        standing: how a replica stands.
        message_us, split_gain_us: see MESSAGE_US, SPLIT_GAIN_US.
    """
    call = _Call(standing, random, message_us, split_gain_us)
    several = []
    for expert, count in rows.items():
        able = holders[expert]
        if len(able) == 1:
            call.give(able[0], expert, count)
        else:
            several.append(expert)
    if len(several) > 1:
        several.sort(key=lambda expert: (len(holders[expert]), -rows[expert]))
    choices = [call.choice(expert, rows[expert], holders[expert]) for expert in several]
    for choice in choices:
        call.ask_one(choice)
    if call.may_gain(choices):
        call.pour(choices)
    return call.shares(rows)


class _Call:
    def __init__(
        self,
        standing: Callable[[str], Standing],
        random: Random,
        message_us: float,
        split_gain_us: float,
    ) -> None:
        self._standing = standing
        self._random = random
        self._message_us = message_us
        self._split_gain_us = split_gain_us
        self._pools: dict[str, Pool] = {}
        self._able: dict[Sequence[str], _Able] = {}
        self._num_asked = 0

    def choice(self, expert: int, count: int, names: Sequence[str]) -> _Several:
        """An expert that several replicas hold, and those of them that are considered."""
        able = self._able.get(names)
        if able is None:
            pools = [self._pools.get(name) or self._pool(name) for name in names]
            able = self._able[names] = _Able(
                pools,
                len(names) > 2 and not all(pool.is_fresh for pool in pools),
                all(pool.may_split for pool in pools),
            )
        pools = able.pools
        if able.is_drawn:
            drawn = self._random.sample(pools, 2)
            pools = drawn + [pool for pool in pools if pool.rows and pool not in drawn]
        return _Several(expert, count, pools, count > 1 and able.may_split)

    def _pool(self, name: str) -> Pool:
        pool = self._pools[name] = Pool(name, self._standing(name), self._random.random())
        return pool

    def give(self, name: str, expert: int, count: int) -> None:
        """All rows of an expert to its only holder."""
        pool = self._pools.get(name) or self._pool(name)
        self._take(pool, expert, count, pool.start_us(expert, self._message_us * self._num_asked))

    def pour(self, several: Sequence[_Several]) -> None:
        """Give out the experts that have a choice, until nothing changes."""
        for expert in several:
            self._give_back(expert)
        before = None
        for _ in range(ROUNDS if len(several) > 1 else 1):
            for expert in several:
                self._place(expert)
            now = [pool.level_us for pool in self._pools.values()]
            if now == before:
                break
            before = now
        self._make_whole([expert for expert in several if len(expert.asked) > 1])

    def may_gain(self, several: Sequence[_Several]) -> bool:
        """Whether the call may end noticeably sooner if experts are split: some rows of those that
        are done last could go to a replica that is done well before."""
        most_us, message_us = self._most_us(), self._message_us * self._num_asked
        if most_us - self._even_us() < POUR_US * len(several):
            return False
        least_us = most_us - self._gain_us(most_us)
        if least_us <= 0:  # all of it takes less than a split has to gain
            return False
        for expert in several:
            if expert.may_split and expert.asked[0].level_us >= least_us:
                for pool in expert.pools:
                    if (pool.level_us if pool.rows else pool.first_us + message_us) < least_us:
                        return True
        return False

    def _most_us(self) -> float:
        return max([pool.level_us for pool in self._pools.values()])

    def _even_us(self) -> float:
        """The level of all if all were done at the same time, about."""
        levels = [pool.level_us for pool in self._pools.values()]
        return sum(levels) / len(levels)

    def _gain_us(self, most_us: float) -> float:
        return max(self._split_gain_us, _SPLIT_GAIN_FRAC * most_us)

    def _place(self, expert: _Several) -> None:
        self._give_back(expert)
        if expert.may_split:
            self._fill(expert)
        else:
            self.ask_one(expert)

    def _make_whole(self, split: list[_Several]) -> None:
        """Undo the splits that do not let the call end sooner, or hardly."""
        if not split:
            return
        most_us = self._most_us()
        most_us += self._gain_us(most_us)
        for expert in sorted(split, key=lambda own: own.count):
            self._give_back(expert)
            self.ask_one(expert)
            if expert.asked[0].level_us > most_us:
                self._give_back(expert)
                self._fill(expert)

    def ask_one(self, expert: _Several) -> None:
        """All rows to whoever has them done first."""
        number, count = expert.expert, expert.count
        message_us = self._message_us * self._num_asked
        best, least_us = expert.pools[0], inf
        for pool in expert.pools:
            # `Pool.start_us`, in place: half of all that a decision for one token does
            end_us = pool.level_us + pool.expert_us + count * pool.row_us
            if not pool.rows:
                end_us += pool.first_us + message_us
            if pool.resident is not None and number not in pool.resident:
                end_us += pool.load_us
            if end_us < least_us or (end_us == least_us and pool.tie < best.tie):
                best, least_us = pool, end_us
        if not best.rows:
            self._num_asked += 1
        best.rows[number] = count
        best.level_us = least_us
        expert.asked = [best]

    def _take(self, pool: Pool, expert: int, rows: int, start_us: float) -> None:
        self._num_asked += not pool.rows
        pool.take(expert, rows, start_us)

    def _give_back(self, expert: _Several) -> None:
        """As if nobody had been asked for the expert."""
        for pool in expert.asked:
            pool.give_back(expert.expert)
            self._num_asked -= not pool.rows
        expert.asked = ()

    def _fill(self, expert: _Several) -> None:
        """Pour the rows of an expert over those that start first."""
        message_us, number = self._message_us * self._num_asked, expert.expert
        starts = [(pool.start_us(number, message_us), pool.tie, pool) for pool in expert.pools]
        level_us, few = water_level(sorted(starts, key=by_start), expert.count)
        poured = whole_rows(few, level_us, expert.count)
        for pool, rows, start_us in poured:
            self._take(pool, number, rows, start_us)
        expert.asked = [pool for pool, _, _ in poured]

    def shares(self, rows: Iterable[int]) -> Shares:
        """What came out, experts in the order given."""
        found: Shares = {expert: [] for expert in rows}
        for pool in self._pools.values():
            for expert, count in pool.rows.items():
                found[expert].append((pool.name, count))
        return found
