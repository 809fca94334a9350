"""Which replica of those that hold an expert gets its rows. Pure.

Power of two choices (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001):
of two replicas drawn at random take the one with less work. Unlike "always the least loaded" it
does not send every router to the same replica when the loads they know are old.
"""

from collections.abc import Callable, Mapping, Sequence
from random import Random


def pick_replica(
    holders: Sequence[str],
    contacted: Mapping[str, object],
    backlog_rows: Callable[[str], int],
    random: Random,
) -> str:
    """The replica for one expert's rows.

    Args:
        holders: ids of the replicas that hold the expert, at least one.
        contacted: replicas that get rows of this call anyway; one of them saves a message.
        backlog_rows: rows waiting at a replica as far as known, plus our own in flight.
    """
    if len(holders) == 1:
        return holders[0]
    known = [name for name in holders if name in contacted]
    first, second = random.sample(list(known if len(known) > 1 else holders), 2)
    if len(known) == 1:
        return known[0]
    return min(first, second, key=backlog_rows)
