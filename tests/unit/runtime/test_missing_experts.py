"""Policies by name and number, and what requests are told of their degraded mass."""

import pytest

from expertmesh.runtime.errors import InvalidInput
from expertmesh.runtime.missing_experts import POLICIES, DegradedMass, policy_of, to_proto
from expertmesh.services.forward_scope import ForwardScope, whole
from expertmesh.v1 import router_pb2


def test_every_policy_has_its_number() -> None:
    assert {to_proto(policy) for policy in POLICIES} | {to_proto(None)} == set(
        router_pb2.MissingExperts.values()
    )
    assert [policy_of(to_proto(policy), "strict") for policy in POLICIES] == list(POLICIES)


@pytest.mark.parametrize("default", POLICIES)
def test_who_says_nothing_gets_the_default(default: str) -> None:
    assert policy_of(to_proto(None), default) == default  # type: ignore[arg-type]


def test_what_is_no_policy() -> None:
    with pytest.raises(InvalidInput, match="missing_experts: expected one of strict, substitute"):
        to_proto("Strict")
    with pytest.raises(InvalidInput, match="missing_experts: expected one of MISSING_EXPERTS_"):
        policy_of(4, "strict")


def test_the_largest_and_the_mean_so_far() -> None:
    degraded = DegradedMass()
    assert (degraded.largest, degraded.mean) == (0, 0)
    degraded.add([0.0, 0.5])
    degraded.add([0.25, 0.0, 0.0, 0.0])
    assert (degraded.largest, degraded.mean) == (0.5, 0.125)
    told = degraded.to_proto()
    assert (told.largest, told.mean) == (0.5, 0.125)


def test_everyone_is_told_of_its_own_tokens() -> None:
    first, second = DegradedMass(), DegradedMass()
    ForwardScope(shares=[(2, first), (1, second)]).account([0.0, 0.5, 0.25])
    assert (first.largest, second.largest) == (0.5, 0.25)


def test_everyone_is_told_of_everything_where_the_shares_do_not_fit() -> None:
    first, second = DegradedMass(), DegradedMass()
    ForwardScope(shares=[(2, first), (1, second)]).account([0.0, 0.5, 0.25, 0.125])
    assert (first.largest, second.largest) == (0.5, 0.5)
    whole(first).account([0.75])
    assert first.largest == 0.75
