"""Skips tests on hosts where this machine cannot have any."""

import pytest

from tests.cluster.hosts import missing


@pytest.fixture(scope="session")
def _hosts_can_be_made() -> None:
    if (reason := missing()) is not None:
        pytest.skip(reason)
