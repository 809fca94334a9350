"""What callers allow when experts are missing, and what it has cost them. Imports no torch."""

from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

from expertmesh.runtime.errors import InvalidInput
from expertmesh.v1 import generate_pb2, router_pb2

Policy = Literal["strict", "substitute", "renormalise"]
"""The last rungs of the failure ladder: see `router_pb2.MissingExperts`."""
POLICIES: tuple[Policy, ...] = get_args(Policy)
_PREFIX = "MISSING_EXPERTS_"


def policy_of(value: int, default: Policy) -> Policy:
    """The policy that a message's `missing_experts` asks for; `default` if it says nothing.

    Raises:
        InvalidInput: a number that is none.
    """
    if value == router_pb2.MISSING_EXPERTS_UNSPECIFIED:
        return default
    for policy in POLICIES:
        if value == to_proto(policy):
            return policy
    names = ", ".join(router_pb2.MissingExperts.keys())
    raise InvalidInput.of("missing_experts", expected=f"one of {names}", got=value)


def to_proto(policy: str | None) -> "router_pb2.MissingExperts.ValueType":
    """As it stands in a message; None leaves it to the other side.

    Raises:
        InvalidInput: there is no such policy.
    """
    if policy is None:
        return router_pb2.MISSING_EXPERTS_UNSPECIFIED
    if policy not in POLICIES:
        expected = f"one of {', '.join(POLICIES)}"
        raise InvalidInput.of("missing_experts", expected=expected, got=repr(policy))
    return router_pb2.MissingExperts.Value(_PREFIX + policy.upper())


class _Seen(NamedTuple):
    num: int = 0
    sum: float = 0.0
    largest: float = 0.0


class DegradedMass:
    """What missing experts have cost a request, over the tokens of all its layers.

    One thread adds while others read.
    """

    def __init__(self) -> None:
        self._seen = _Seen()  # swapped whole

    def add(self, mass_T: Iterable[float]) -> None:
        """Account the tokens of one layer: the share of each one's weights that was missing."""
        num, total, largest = self._seen
        for mass in mass_T:
            num += 1
            total += mass
            largest = max(largest, mass)
        self._seen = _Seen(num, total, largest)

    @property
    def largest(self) -> float:
        """Of any token in any layer; 0 if everything was exact."""
        return self._seen.largest

    @property
    def mean(self) -> float:
        """Over all tokens and layers."""
        seen = self._seen
        return seen.sum / seen.num if seen.num else 0.0

    def to_proto(self) -> generate_pb2.DegradedMass:
        """As it stands in an answer."""
        return generate_pb2.DegradedMass(largest=self.largest, mean=self.mean)
