"""Why experts are missing, in an error that names model, layer, expert and cause. Pure."""

from collections.abc import Mapping, Sequence

from expertmesh.router.snapshot import Replica, Snapshot
from expertmesh.runtime.errors import (
    ExpertMeshError,
    ExpertUnavailable,
    InternalError,
    QueueFull,
    WeightsUnavailable,
)

OF_THE_LIVING = (QueueFull, WeightsUnavailable, InternalError)
"""Failures that another copy may not share, of replicas that go on getting work."""
_SHOWN = 3
"""Replicas whose reasons are spelt out."""
Failed = Mapping[str, ExpertMeshError]
"""replica -> how it has failed the call"""


def why_missing(
    model: str, layer: int, missing: Sequence[int], snapshot: Snapshot, failed: Failed
) -> ExpertMeshError:
    """The error of a call that needs experts nobody is left to be asked for.

    ExpertUnavailable, about the first expert that has no live replica at all; if every one has a
    replica that is too busy, could not get its weights or has a bug, the error of such a one: the
    refusal that says to come again soonest, if any is too busy.

    Args:
        missing: experts of the layer that the call needs, at least one.
        failed: by those that were asked in this call.
    """
    alive = {expert: _alive(layer, expert, snapshot, failed) for expert in missing}
    dead = [expert for expert, errors in alive.items() if not errors]
    if not dead:
        return _of_the_living([error for errors in alive.values() for error in errors])
    return expert_unavailable(model, layer, dead, cause_of(layer, dead[0], snapshot, failed))


def expert_unavailable(
    model: str, layer: int, missing: Sequence[int], cause: str
) -> ExpertUnavailable:
    """The error about the first of these experts.

    Args:
        missing: experts of the layer; all are in the field `missing`, for `missing_in`.
    """
    others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    return ExpertUnavailable(
        f"model {model}, layer {layer}, expert {missing[0]}{others}: no live replica holds it: "
        f"{cause}; `expertmesh status` shows what is missing",
        model=model,
        layer=layer,
        expert=missing[0],
        missing=",".join(map(str, missing)),
        cause=cause,
    )


def missing_in(error: ExpertUnavailable) -> frozenset[int]:
    """The experts of the layer that the error is about."""
    listed = error.fields.get("missing") or error.fields.get("expert", "")
    return frozenset(int(expert) for expert in listed.split(",") if expert)


def cause_of(layer: int, expert: int, snapshot: Snapshot, failed: Failed) -> str:
    """Why nobody computes an expert now."""
    claimed = _claimed(layer, expert, snapshot)
    if not claimed:
        return "no replica has announced it"
    asked = [f"{name} failed: {failed[name].message}" for name in claimed if name in failed]
    aside = [
        f"{name}: {replica.set_aside or 'it is draining'}"
        for name, replica in claimed.items()
        if name not in failed and not replica.takes_work
    ]
    whose = "its only holder is" if len(claimed) == 1 else f"all {len(claimed)} holders are"
    told = [f"{whose} set aside: {_few(aside)}"] if aside and not asked else aside
    return _few([*asked, *told]) or "its replicas came back only after they were asked for"


def _few(reasons: Sequence[str]) -> str:
    more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    return "; ".join(reasons[:_SHOWN]) + more


def _alive(layer: int, expert: int, snapshot: Snapshot, failed: Failed) -> list[ExpertMeshError]:
    """How replicas failed that have the expert and are well."""
    errors = [failed[name] for name in _claimed(layer, expert, snapshot) if name in failed]
    return [error for error in errors if isinstance(error, OF_THE_LIVING)]


def _of_the_living(errors: Sequence[ExpertMeshError]) -> ExpertMeshError:
    """The one that callers see."""
    busy = [error for error in errors if isinstance(error, QueueFull)]
    return min(busy, key=_delay_s) if busy else errors[0]


def _delay_s(error: ExpertMeshError) -> float:
    return float("inf") if error.retry_after_s is None else error.retry_after_s


def _claimed(layer: int, expert: int, snapshot: Snapshot) -> dict[str, Replica]:
    """The replicas that claim to hold an expert, by name."""
    return {
        name: replica
        for name, replica in sorted(snapshot.replicas.items())
        if any(held.layer == layer and expert in held.experts for held in replica.state.holds)
    }
