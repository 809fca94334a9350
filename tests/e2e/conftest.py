"""Ray is started once for all tests that deploy on it."""

from collections.abc import Iterator

import pytest
from tests.e2e.cluster import Cluster, open_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Ray Serve, Redis and a loop."""
    with open_cluster() as running:
        yield running
