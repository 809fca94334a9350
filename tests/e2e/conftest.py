"""Ray is started once for all tests that deploy on it, and once by README's `serve`."""

from collections.abc import Iterator

import pytest
from tests.e2e.cluster import Cluster, open_cluster
from tests.e2e.served import Served, serving


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Ray Serve, Redis and a loop."""
    with open_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """The demo model, served as README says."""
    with serving() as running:
        yield running
