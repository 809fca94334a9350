"""Replicas of a group that may not share a node, as Serve reads it."""

from typing import Any

import pytest
from tests.unit.services.test_serve_config import scaled


def spread(**overrides: Any) -> set[tuple[Any, Any]]:
    """(most per node, surge) of the groups; None: not said."""
    deployments = [app.deployments[0].model_dump(exclude_unset=True) for app in scaled(**overrides)]
    return {(own.get("max_replicas_per_node"), own.get("max_surge_percent")) for own in deployments}


def test_by_default_serve_decides() -> None:
    assert spread(experts__replicas=2) == {(None, None)}


@pytest.mark.parametrize(
    "overrides",
    [
        {"experts__replicas": 2},
        {"experts__scaling__mode": "on", "experts__scaling__min_replicas": 2},
    ],
)
def test_copies_make_room_for_their_successors(overrides: dict[str, Any]) -> None:
    assert spread(experts__max_replicas_per_node=1, **overrides) == {(1, 0)}


def test_a_lone_replica_serves_until_its_successor_does() -> None:
    assert spread(experts__max_replicas_per_node=1) == {(1, None)}
