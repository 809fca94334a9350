"""DeepSeek's EPLB, global policy, as its `eplb.py` does it (github.com/deepseek-ai/EPLB)."""

from collections.abc import Sequence

from expertmesh.router.placement import Placement


def eplb_placement(loads: Sequence[float], slots: Sequence[int]) -> Placement:
    """Copies to whoever has the largest load per copy, then each copy, largest first, to the
    replica that is least loaded and has a slot. All replicas count as equally fast.

    Args:
        loads: of each expert.
        slots: of each replica. EPLB itself knows only equal ones.
    """
    copies = [1] * len(loads)
    for _ in range(sum(slots) - len(loads)):
        copies[max(range(len(loads)), key=lambda e: loads[e] / copies[e])] += 1
    each = [(loads[e] / copies[e], e) for e in range(len(loads)) for _ in range(copies[e])]
    placement: Placement = [[] for _ in loads]
    level, free = [0.0] * len(slots), list(slots)
    for load, expert in sorted(each, reverse=True):
        able = [own for own, room in enumerate(free) if room]
        # two copies on one replica are one, as EPLB itself makes at times
        best = min(able, key=level.__getitem__)
        level[best] += load
        free[best] -= 1
        if best not in placement[expert]:
            placement[expert].append(best)
    return placement
