"""A real API server for the tests of the chart; what is only rendered needs none."""

from collections.abc import Iterator

import pytest

import local_cluster as lc


@pytest.fixture(scope="session")
def cluster() -> Iterator[lc.Cluster]:
    with lc.start("tests-chart", say=lambda _: None) as started:
        yield started
