"""A test's first folder is its marker; no test sees the caller's EXPERTMESH_* variables."""

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# transformers must never look for a hub: everything a test needs is made or committed here
os.environ["HF_HUB_OFFLINE"] = "1"
# fp32 bits depend on the number of threads, and more of them only wait for each other here
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its folder: unit, integration or e2e."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        item.add_marker(getattr(pytest.mark, folder))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("EXPERTMESH_"):
            monkeypatch.delenv(name)
