"""Health endpoints that tell the truth: alive while a restart would not help, dead when nothing else would."""

import asyncio
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest
from prometheus_client import CollectorRegistry, Counter

from checkpoint_operator.controller.config import parse_address
from checkpoint_operator.controller.health import (
    CONNECTIONS,
    DEAF,
    STUCK,
    AddressError,
    Health,
    beat_forever,
    serve,
)


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    return Health(300, clock)


def test_an_operator_that_lists_is_alive_but_not_ready(health: Health) -> None:
    assert health.sick() is None
    assert health.unready() == "the artifacts are being listed"
    health.filled()
    assert health.unready() is None


def test_a_loop_that_turns_is_alive_however_long_nothing_happens(health: Health, clock: Clock) -> None:
    for _ in range(200):
        clock.now += 300
        health.beat()
        health.listed(0)
        assert health.sick() is None


def test_a_loop_that_is_stuck_is_dead(health: Health, clock: Clock) -> None:
    health.filled()
    clock.now += STUCK
    assert health.sick() is None
    clock.now += 1
    assert health.sick() == "the event loop has been stuck for 31 s"
    assert health.unready() == health.sick()
    health.beat()
    assert health.sick() is None


def test_a_watch_that_says_nothing_while_listings_find_changes_is_dead(health: Health) -> None:
    health.listed(3)
    assert health.sick() is None
    health.listed(1)
    assert health.sick() == "the watch is dead: 2 listings in a row found changes that it had not told"


def test_a_watch_that_is_late_is_not_dead(health: Health) -> None:
    health.listed(3)
    health.event()
    health.listed(2)
    health.listed(2)
    assert health.sick() is None


def test_a_silent_watch_of_a_cluster_where_nothing_happens_is_not_dead(health: Health) -> None:
    for _ in range(10):
        health.listed(0)
    assert health.sick() is None


def test_an_api_server_that_is_away_for_minutes_is_no_reason_for_a_restart(health: Health, clock: Clock) -> None:
    clock.now += DEAF
    health.beat()
    assert health.sick() is None
    clock.now += 1
    assert health.sick() == "nothing was heard of the API server for 1801 s"
    health.event()
    assert health.sick() is None


def test_whoever_lists_seldom_is_given_as_much_longer(clock: Clock) -> None:
    health = Health(3600, clock)
    clock.now += 3 * 3600
    health.beat()
    assert health.sick() is None


async def test_the_end_of_a_part_is_a_sickness_and_the_end_of_everything_is_not(health: Health) -> None:
    async def part() -> None:
        await asyncio.Event().wait()

    async def broken() -> None:
        raise RuntimeError("why")

    stopped = asyncio.create_task(part(), name="resync")
    health.watch_over(stopped)
    stopped.cancel()
    await asyncio.wait([stopped])
    assert health.sick() is None
    failed = asyncio.create_task(broken(), name="worker 3")
    health.watch_over(failed)
    await asyncio.wait([failed])
    await asyncio.sleep(0)
    assert health.sick() == "a part that runs for ever has ended: worker 3"


async def test_the_loop_beats(health: Health, clock: Clock) -> None:
    clock.now += 60
    task = asyncio.create_task(beat_forever(health))
    await asyncio.sleep(0)
    assert health.sick() is None
    task.cancel()


@pytest.fixture
def port(health: Health) -> Iterator[int]:
    registry = CollectorRegistry()
    Counter("answers", "How many.", registry=registry).inc(42)
    with serve("127.0.0.1:0", health, registry) as port:
        assert port is not None
        yield port


def ask(port: int, path: str, **headers: str) -> tuple[int, str, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers["Content-Type"]
    finally:
        connection.close()


def test_one_port_serves_all_three(port: int, health: Health) -> None:
    assert ask(port, "/healthz")[:2] == (200, "ok\n")
    assert ask(port, "/readyz")[:2] == (503, "the artifacts are being listed\n")
    health.filled()
    assert ask(port, "/readyz?verbose")[:2] == (200, "ok\n")
    status, text, content_type = ask(port, "/metrics")
    assert (status, "answers_total 42.0" in text, content_type.partition(";")[0]) == (200, True, "text/plain")
    assert ask(port, "/metrics", Accept="application/openmetrics-text")[1].endswith("# EOF\n")
    assert ask(port, "/other")[0] == 404


def test_a_sick_operator_says_why(port: int, health: Health) -> None:
    health.ended("resync")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10)
    assert caught.value.code == 503
    assert caught.value.read() == b"a part that runs for ever has ended: resync\n"
    caught.value.close()


def test_it_answers_while_the_operators_own_thread_is_busy(port: int) -> None:
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(ask(port, "/healthz")[0]))
    thread.start()
    while thread.is_alive():
        sum(range(10_000))
    assert answers == [200]


def test_clients_that_keep_connections_open_do_not_keep_others_out_for_long(port: int) -> None:
    idle = [HTTPConnection("127.0.0.1", port) for _ in range(CONNECTIONS + 5)]
    try:
        for connection in idle:
            connection.connect()
    finally:
        for connection in idle:
            connection.close()
    while True:  # those threads end when they see their client gone
        try:
            assert ask(port, "/healthz")[0] == 200
            break
        except OSError:
            continue


def test_clients_that_never_come_to_an_end_do_not_keep_out_a_probe(port: int) -> None:
    """Any pod of the cluster may connect; a probe that found no place would have the operator restarted."""
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS)]
    try:
        for connection in slow:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
        for _ in range(3):
            assert ask(port, "/healthz")[0] == 200
    finally:
        for connection in slow:
            connection.close()


def test_an_address_that_is_taken_is_named(port: int, health: Health) -> None:
    with (
        pytest.raises(AddressError, match=f"'127.0.0.1:{port}' cannot be listened at"),
        serve(f"127.0.0.1:{port}", health, CollectorRegistry()),
    ):
        pass


def test_no_address_serves_nothing(health: Health) -> None:
    with serve("", health, CollectorRegistry()) as port:
        assert port is None


def test_addresses() -> None:
    assert parse_address("10.0.0.1:8080") == ("10.0.0.1", 8080)
    assert parse_address("[::]:1") == ("::", 1)
    for wrong in ("8080", ":8080", "host:", "host:http", "host:70000"):
        with pytest.raises(ValueError, match="write it like"):
            parse_address(wrong)
