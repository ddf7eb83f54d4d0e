"""The address plan of a node: no two parts of it overlap, and no two clusters."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from itertools import pairwise

import pytest

from local_cluster.node_agents import Timings
from local_cluster.node_network import Network


@pytest.fixture
def network() -> Network:
    return Network(IPv4Network("198.18.32.0/20"))


def test_each_part_lies_in_the_range_of_the_cluster_and_in_no_other_part(network: Network) -> None:
    link = IPv4Network((int(network.range.network_address), 24))
    ends = [network.host, network.server, network.node(1), network.node(2)]
    assert len(set(ends)) == 4
    assert all(IPv4Address(item) in link for item in ends)
    parts = [link, network.services, network.pods]
    assert all(part.subnet_of(network.range) for part in parts)
    assert not any(first.overlaps(second) for first, second in pairwise(sorted(parts)))
    first, second = network.pods_of(1), network.pods_of(2)
    assert not first.overlaps(second)
    assert first.subnet_of(network.pods)
    assert second.subnet_of(network.pods)
    assert network.service(1) == "198.18.33.1"


def test_the_names_of_two_clusters_differ_and_fit_a_link(network: Network) -> None:
    last = Network(IPv4Network("198.19.240.0/20"))
    assert (network.slot, last.slot) == (2, 31)
    assert network.device != last.device
    assert len(last.device) <= 15


@pytest.mark.parametrize(("lost_after", "period"), [(40, 5), (8, 2), (2, 1)])
def test_a_lost_node_is_looked_for_often_enough(lost_after: int, period: int) -> None:
    flags = Timings(lost_after=lost_after).manager_flags
    assert flags == (f"--node-monitor-grace-period={lost_after}s", f"--node-monitor-period={period}s")
