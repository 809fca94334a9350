"""How a replica stands when a call is planned: what it costs and what it has to do. Pure."""

from expertmesh.router.pools import Standing
from expertmesh.router.snapshot import Replica

FRESH_S = 0.02
"""News from before is old: in that time other routers have sent calls that it does not count."""


def standing_of(
    replica: Replica, layer: int, own_rows: int, transport_us: float, age_s: float
) -> Standing:
    """The replica as it is now.

    Rows that others had queued when it was last heard of are done one after the other since then;
    ours are known.

    Args:
        own_rows: rows that this router has sent it and not got back.
        transport_us: what a message there and back takes without the compute.
        age_s: time since it was last heard of.
    """
    ready_us = transport_us
    if own_rows or replica.others_rows:  # most are idle, for a caller with one token
        row_us = replica.load.row_time_us
        ready_us += max(0.0, replica.others_rows * row_us - age_s * 1e6) + own_rows * row_us
    resident = replica.resident_in(layer)
    return Standing(replica.costs, ready_us, resident, age_s <= FRESH_S, replica.may_split)
