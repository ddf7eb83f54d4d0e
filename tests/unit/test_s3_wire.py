"""The wire to S3 against a server that misbehaves on cue: answers that end early, dead connections, stores that are slow."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from types import MappingProxyType

import pytest
from botocore.credentials import Credentials

from checkpoint_operator.storage import s3_wire
from checkpoint_operator.storage.buffers import Buffers
from checkpoint_operator.storage.connector import WireError
from checkpoint_operator.storage.gate import Gate
from checkpoint_operator.storage.s3_errors import error_of
from checkpoint_operator.storage.s3_wire import Answer, TooLarge, Wire

Turn = Callable[[socket.socket], object]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nwhole"[:-1]


class Server:
    """Plays one turn for each request, in order, whatever connection it comes on; a turn that returns False hangs up."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.requests = 0
        self.extra = bytearray()
        """What came of a body with its headers."""
        self._open: list[socket.socket] = []
        self._counting = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/bucket"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self._open.append(connection)
            self._threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while self._one(connection):
                pass

    def _one(self, connection: socket.socket) -> bool:
        head = b""
        while b"\r\n\r\n" not in head:
            got = connection.recv(65536)
            if not got:
                return False
            head += got
        with self._counting:
            self.requests += 1
            turn = self.turns.pop(0)
            self.extra += head.partition(b"\r\n\r\n")[2]
        return turn(connection) is not False

    def close(self) -> None:
        with suppress(OSError):  # a test may have closed it
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(timeout=10)


@pytest.fixture
def server() -> Iterator[Server]:
    with closing(Server()) as server:
        yield server


@pytest.fixture
def wire(server: Server, monkeypatch: pytest.MonkeyPatch) -> Wire:
    monkeypatch.setattr(s3_wire.time, "sleep", lambda _: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return Wire(server.url, Credentials("key", "secret", "session-token"), "us-east-1", None, limit=4)


def says(answer: bytes, *, hang_up: bool = False) -> Turn:
    def turn(connection: socket.socket) -> bool:
        connection.sendall(answer)
        return not hang_up

    return turn


def together(count: int, answer: bytes) -> list[Turn]:
    """So many requests, none of which is answered before all are there."""
    all_there = threading.Barrier(count, timeout=10)

    def turn(connection: socket.socket) -> None:
        all_there.wait()
        connection.sendall(answer)

    return [turn] * count


def put(wire: Wire, headers: Mapping[str, str] = MappingProxyType({}), body: bytes = b"body") -> Answer:
    with wire.putting("x", "", headers, body) as answer:
        return answer()


def test_a_body_that_ends_early_is_asked_for_again(server: Server, wire: Wire) -> None:
    server.turns = [says(OK[:-2], hang_up=True), says(OK)]
    assert bytes(wire.get("x", {}, 4).body) == b"whol"
    assert server.requests == 2


def test_an_answer_that_does_not_say_how_long_it_is_is_not_believed(server: Server, wire: Wire) -> None:
    server.turns = [says(b"HTTP/1.1 200 OK\r\n\r\nhalf", hang_up=True), says(OK)]
    assert bytes(wire.get("x", {}, 4).body) == b"whol"


def test_a_chunked_body_leaves_nothing_for_the_next_answer(server: Server, wire: Wire) -> None:
    size = s3_wire._SLICE
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % size + bytes(size) + b"\r\n0\r\n\r\n"
    server.turns = [says(chunked), says(OK)]
    assert len(wire.get("x", {}, size).body) == size
    assert bytes(wire.get("x", {}, 4).body) == b"whol"


def test_nobody_makes_us_take_more_memory_than_we_asked_for(server: Server, wire: Wire) -> None:
    server.turns = [says(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n", hang_up=True)]
    with pytest.raises(TooLarge):
        wire.get("x", {}, 4)


def test_a_connection_that_died_while_idle_is_not_used_again(server: Server, wire: Wire) -> None:
    server.turns = [says(OK, hang_up=True), says(OK)]
    wire.get("x", {}, 4)
    wire.get("x", {}, 4)
    assert server.requests == 2, "the second request was not spent on the dead connection"


def test_what_the_store_says_last_is_what_is_told(server: Server, wire: Wire) -> None:
    slow = b"<Error><Code>SlowDown</Code><Message>later</Message></Error>"
    answer = b"HTTP/1.1 503 Slow\r\nContent-Length: %d\r\n\r\n" % len(slow) + slow
    server.turns = [says(answer)] * s3_wire.ATTEMPTS
    said = put(wire)
    assert (said.status, server.requests) == (503, s3_wire.ATTEMPTS)
    assert "SlowDown" in str(error_of(said, "PutObject"))
    assert wire.gate.limit == 1


def test_a_body_that_stalled_on_its_way_is_sent_again(server: Server, wire: Wire) -> None:
    late = b"<Error><Code>RequestTimeout</Code></Error>"
    server.turns = [says(b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n" % len(late) + late), says(OK)]
    assert put(wire).status == 200


def test_nobody_answers(server: Server, wire: Wire) -> None:
    server.turns = [lambda _: False] * s3_wire.ATTEMPTS
    with pytest.raises(WireError, match="6 times"):
        wire.get("x", {}, 4)


@pytest.mark.parametrize("value", ["a\r\nHost: evil", "a\rb", "a\nb", "a\0b"])
def test_a_header_with_a_control_character_is_never_sent(server: Server, wire: Wire, value: str) -> None:
    with pytest.raises(WireError, match="control character"):
        put(wire, {"x-amz-meta-artifact-uid": value}, b"")
    assert server.requests == 0


def test_the_session_token_is_in_no_log(server: Server, wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    server.turns = [says(OK)]
    with caplog.at_level(logging.DEBUG):
        wire.get("x", {}, 4)
    assert "session-token" not in caplog.text
    assert "secret" not in caplog.text


def test_one_thread_has_several_bodies_on_their_way_before_it_reads_an_answer(server: Server, wire: Wire) -> None:
    """The server says nothing before it has all of them, and the gate lets one thread in once."""
    wire.gate = Gate(1)
    server.turns = together(6, OK)
    with ExitStack() as stack:
        answers = [stack.enter_context(wire.putting(f"{number}", "", {}, b"body")) for number in range(6)]
        assert [answer().status for answer in answers] == [200] * 6
    server.turns = [says(OK)]
    assert put(wire).status == 200
    assert server.requests == 7


def test_nothing_that_was_sent_happens_after_a_block_that_did_not_ask(server: Server, wire: Wire) -> None:
    arrived, may_answer, done = threading.Event(), threading.Event(), threading.Event()

    def late(connection: socket.socket) -> None:
        arrived.set()
        may_answer.wait(10)
        done.set()
        connection.sendall(OK)

    def leave() -> bool:
        with suppress(KeyError), wire.putting("x", "", {}, b"body"):
            raise KeyError
        return done.is_set()

    wire.gate = Gate(1)
    server.turns = [late, says(OK)]
    with ThreadPoolExecutor(1) as pool:
        left = pool.submit(leave)
        assert arrived.wait(10)
        may_answer.set()
        assert left.result(timeout=10)
    assert put(wire).status == 200, "the gate is free again"


def test_a_block_that_did_not_ask_makes_no_second_attempt(server: Server, wire: Wire) -> None:
    server.turns = [lambda _: False]
    with wire.putting("x", "", {}, b"body"):
        pass
    assert server.requests == 1


SLOW = b"HTTP/1.1 503 Slow\r\nContent-Length: 0\r\n\r\n"


def test_of_answers_that_were_under_way_together_the_first_slows_down(server: Server, wire: Wire) -> None:
    wire.gate = Gate(8)
    server.turns = together(4, SLOW) + [says(OK)] * 4
    with ExitStack() as stack:
        answers = [stack.enter_context(wire.putting(f"{number}", "", {}, b"body")) for number in range(4)]
        assert [answer().status for answer in answers] == [200] * 4
    assert wire.gate.limit == 4


def test_a_store_that_is_slow_gets_one_body_at_a_time_from_each_thread(server: Server, wire: Wire) -> None:
    wire.gate.slow_down()
    server.turns = [says(OK)] * 3
    with ExitStack() as stack:
        answers = [stack.enter_context(wire.putting(f"{number}", "", {}, b"body")) for number in range(3)]
        for number, answer in enumerate(answers):
            assert answer().status == 200
            assert server.requests == number + 1


def test_what_fails_on_its_way_is_sent_again_when_its_answer_is_asked_for(server: Server, wire: Wire) -> None:
    server.turns = [lambda _: False, lambda _: False, says(OK), says(OK)]
    with wire.putting("x", "", {}, b"body") as first, wire.putting("y", "", {}, b"body") as second:
        assert (first().status, second().status) == (200, 200)
    assert server.requests == 4


def test_a_store_that_is_not_there_is_told_of_when_the_answer_is_asked_for(server: Server, wire: Wire) -> None:
    server.close()
    with wire.putting("x", "", {}, b"body") as answer, pytest.raises(WireError, match="refused"):
        answer()


def test_a_body_of_any_size_arrives_as_it_was(server: Server, wire: Wire) -> None:
    sizes = [0, 1, 100, 130 << 10, (1 << 20) + 7, 5 << 20]
    for size in sizes:
        body, got = os.urandom(size), bytearray()

        def swallow(connection: socket.socket, size: int = size, got: bytearray = got) -> None:
            while len(got) < size:
                got += connection.recv(1 << 16)
            connection.sendall(OK)

        server.turns = [swallow]
        server.extra = got
        assert put(wire, body=body).status == 200
        assert bytes(got) == body


def test_https_without_tls_is_refused() -> None:
    with pytest.raises(ValueError, match="https"):
        Wire("HTTPS://127.0.0.1:1/bucket", Credentials("key", "secret"), "us-east-1", None, limit=1)


@pytest.mark.parametrize(
    "body", [b"no XML", b'<?xml version="1.0" encoding="Shift_JIS"?><a/>', b'<?xml version="1.0" encoding="x"?>']
)
def test_an_error_page_of_somebody_else_is_an_error_and_no_bug(body: bytes) -> None:
    assert "502" in str(error_of(Answer(502, {}, body), "GetObject"))


def test_slow_stores_get_half_of_the_requests_and_calm_ones_more_again() -> None:
    gate = Gate(8)
    gate.slow_down()
    gate.slow_down()
    assert gate.limit == 2
    for _ in range(8):
        gate.went_well()
    assert gate.limit == 3


def test_a_thread_that_is_inside_the_gate_passes_again_and_others_wait_until_it_has_left_for_good() -> None:
    gate, inside = Gate(1), threading.Event()

    def other() -> None:
        with gate.passed():
            inside.set()

    gate.enter()
    gate.enter()
    waiting = threading.Thread(target=other)
    waiting.start()
    gate.leave()
    assert not inside.wait(timeout=0.05)
    gate.leave()
    waiting.join(timeout=10)
    assert inside.is_set()


def test_buffers_stay_within_their_budget_and_one_that_is_too_large_comes_alone() -> None:
    buffers = Buffers(4 << 20)
    first = buffers.take(3 << 20)
    got = threading.Event()

    def second() -> None:
        with buffers.lent(8 << 20):
            got.set()

    waiting = threading.Thread(target=second)
    waiting.start()
    assert not got.wait(timeout=0.05)
    buffers.give(first)
    waiting.join(timeout=10)
    assert got.is_set()
    again = buffers.take(3 << 20)
    assert len(again) == 3 << 20
