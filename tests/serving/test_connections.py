"""Connections end: those of slow and endless clients, and the oldest where there are too many.

Each promise has a control: with the limit planted out of reach, the same measure must show that the
promise is broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
import socket
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
from served import SMALL, Site, encoded, picture, served
from uvicorn.protocols.http.h11_impl import H11Protocol
from waiting import eventually

from useg.serving import connections, middleware, run

ENDLESS = b"10000\r\n" + bytes(65_536) + b"\r\n"
MOST_SENT = 60_000_000


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    limits = replace(SMALL, upload_bytes=2_000_000, response_bytes=20_000_000, pixels=2_000_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "LINGER_SECONDS", 0.3)
        with served(limits=limits) as running:
            yield running


def send(site: Site, path: str, most: int = MOST_SENT) -> tuple[int, bytes]:
    """Send a body that does not end; returns how much was taken, and the response."""
    sent = 0
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", site.port), timeout=60) as connection:
        connection.sendall(head.encode())
        with contextlib.suppress(OSError):
            while sent < most:
                connection.sendall(ENDLESS)
                sent += len(ENDLESS)
        with contextlib.suppress(OSError):
            return sent, connection.recv(65_536)
    return sent, b""


@pytest.mark.parametrize(
    ("path", "status"),
    [("/predict", 413), ("/nothing", 404), ("/v2/models/street/infer", 413), ("/healthz", 405)],
)
def test_a_refused_body_is_not_read(
    site: Site, path: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is sent lies in buffers of the system.
    assert send(site, path)[0] < MOST_SENT / 2
    # A client that sends less sees why.
    monkeypatch.setattr(connections, "LINGER_SECONDS", 60.0)
    _, answer = send(site, path, 3_000_000)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"connection: close" in answer.lower()


def test_the_test_sees_a_service_that_reads_a_refused_body(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_DISCARDED_BYTES", 1 << 40)
    monkeypatch.setattr(connections, "LINGER_SECONDS", 60.0)
    assert send(site, "/nothing")[0] >= MOST_SENT
    eventually(lambda: not site.server.server_state.connections)


@contextlib.contextmanager
def client_that_does_not_read(site: Site, format: str = "probabilities") -> Iterator[socket.socket]:
    body = encoded(picture(1000, 700))
    head = f"POST /predict?format={format} HTTP/1.1\r\nHost: localhost\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", site.port))
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        yield connection


@pytest.mark.parametrize(("seconds", "is_cut_off"), [(0.2, True), (60.0, False)])
def test_a_client_that_does_not_read_is_cut_off(
    site: Site, seconds: float, is_cut_off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a minute to read each piece, the response stays in memory, as the control shows."""
    monkeypatch.setattr(middleware, "READ_SECONDS", seconds)
    start = len(site.log)
    with client_that_does_not_read(site):
        if is_cut_off:
            eventually(lambda: site.log[start:])
        else:
            eventually(lambda: site.service.uploads.response_bytes > 10_000_000)
            time.sleep(1)
            assert site.service.uploads.response_bytes > 10_000_000
            assert not site.log[start:]
    eventually(lambda: site.service.uploads.response_bytes == 0)
    eventually(lambda: site.log[start:])
    if is_cut_off:
        assert site.log[-1]["bytes"] < 10_000_000
        assert site.log[-1]["error"] == "the client did not read the response in time"


def test_responses_that_nobody_reads_have_one_limit(
    site: Site,
) -> None:
    with client_that_does_not_read(site):
        eventually(lambda: site.service.uploads.response_bytes > 10_000_000)
        answer = site.ask("/predict?format=probabilities", encoded(picture(1000, 700)))
        assert (answer.status, answer.json["error"]) == (
            503,
            "too many responses are waiting for their clients to read them; try again in 2 seconds",
        )
        # A small one always finds room.
        assert site.ask("/predict?format=probabilities", encoded(picture())).status == 200
    eventually(lambda: site.service.uploads.response_bytes == 0)


@pytest.mark.parametrize("more", [0, 1000])
def test_too_many_connections_end_those_that_wait_longest(
    more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a thousand more, all of them stay, as the control shows."""
    monkeypatch.setattr(run, "connection_limit", lambda: 10 + more)
    monkeypatch.setattr(connections, "REQUEST_HEAD_SECONDS", 60.0)
    with served() as site, contextlib.ExitStack() as stack:
        clients = []
        for _ in range(30):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", site.port), 60))
            client.sendall(b"GET /he")
            clients.append(client)
            assert site.ask("/healthz").status == 200
        eventually(lambda: len(site.server.server_state.connections) <= 10 + more)
        open_clients = [client for client in clients if not has_ended(client)]
        # One of them may have made room for the last request.
        assert len(open_clients) in ((30,) if more else (9, 10))
        # The newest ones.
        assert open_clients == clients[-len(open_clients) :]


def keep_lost(self: connections.ConnectionPool, connection: connections.BoundedProtocol) -> None:
    """Note that a connection waits, even one that has ended."""
    self._waiting.pop(connection, None)
    self._waiting[connection] = None


def has_logged(site: Site, num_requests: int) -> bool:
    return len(site.log) >= num_requests


@pytest.mark.parametrize("wait", [connections.ConnectionPool.wait, keep_lost])
def test_connections_that_have_ended_are_forgotten(
    wait: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control keeps them: they take memory, and the place of those that wait longest."""
    monkeypatch.setattr(connections.ConnectionPool, "wait", wait)
    monkeypatch.setattr(run, "connection_limit", lambda: 10)
    monkeypatch.setattr(connections, "REQUEST_HEAD_SECONDS", 60.0)
    with served() as site, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", site.port)
        for k in range(40):
            with socket.create_connection(address, 60) as client:
                client.sendall(
                    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
                    b"Expect: 100-continue\r\n\r\n"
                )
                # Now the application waits for the body.
                assert client.recv(12) == b"HTTP/1.1 100"
            eventually(partial(has_logged, site, k + 1))
        eventually(lambda: not site.server.server_state.connections)
        clients = []
        for _ in range(20):
            client = stack.enter_context(socket.create_connection(address, 60))
            client.sendall(b"GET /he")
            clients.append(client)
            eventually(lambda: len(site.server.server_state.connections) > 0)
        assert site.ask("/healthz").status == 200
        num_open = sum(not has_ended(client) for client in clients)
        assert num_open == 20 if wait is keep_lost else num_open in (9, 10)


@pytest.mark.parametrize("seconds", [60.0, 0.0])
def test_requests_whose_bodies_do_not_come_are_not_started(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the control each is started, and logged when its client has gone."""
    monkeypatch.setattr(connections, "START_SECONDS", seconds)
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n"
    with served() as site:
        address = ("127.0.0.1", site.port)
        for _ in range(5):
            with socket.create_connection(address, 60) as client:
                client.sendall(head + b"Content-Length: 100000\r\n\r\n" + bytes(1000))
                eventually(lambda: site.server.server_state.tasks)
            eventually(lambda: not site.server.server_state.tasks)
        assert len(site.log) == (0 if seconds else 5)
        with socket.create_connection(address, 60) as client:
            client.sendall(head + b"Content-Length: 9\r\n\r\nx")
            eventually(lambda: site.server.server_state.tasks)
            client.sendall(b"yyyyyyyy")
            assert client.recv(12) == b"HTTP/1.1 400"
        # A body of which enough has come, and one that waits to be asked for.
        with socket.create_connection(address, 60) as client:
            client.sendall(head + b"Content-Length: 1000000\r\n\r\n" + bytes(65_536))
            assert client.recv(12) == b"HTTP/1.1 413"
        with socket.create_connection(address, 60) as client:
            client.sendall(head + b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 100"


def keep_references(self: connections.BoundedProtocol, exc: Exception | None) -> None:
    """End a connection, but leave its timer, and what refers to it, as they are."""
    self.is_lost = True
    self._pool.remove(self)
    H11Protocol.connection_lost(self, exc)


@pytest.mark.parametrize("lost", [connections.BoundedProtocol.connection_lost, keep_references])
def test_a_connection_that_has_ended_needs_no_garbage_collector(
    lost: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control keeps it: thousands of them make the collector stop the service for long."""
    begun: list[weakref.ref[connections.BoundedProtocol]] = []
    made = connections.BoundedProtocol.connection_made

    def note(self: connections.BoundedProtocol, transport: asyncio.Transport) -> None:
        begun.append(weakref.ref(self))
        made(self, transport)

    monkeypatch.setattr(connections.BoundedProtocol, "connection_made", note)
    monkeypatch.setattr(connections.BoundedProtocol, "connection_lost", lost)
    monkeypatch.setattr(connections, "REQUEST_HEAD_SECONDS", 60.0)
    parts = (b"", b"GET /he", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    unfinished = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx"
    gc.disable()
    try:
        with served() as site:
            for part in (*parts, unfinished):
                begun.clear()
                with socket.create_connection(("127.0.0.1", site.port), 60) as client:
                    client.sendall(part)
                    eventually(lambda: bool(begun))
                eventually(lambda: not site.server.server_state.connections)
                if lost is keep_references:
                    assert begun[0]() is not None
                else:
                    eventually(lambda: begun[0]() is None)
    finally:
        gc.enable()


def has_ended(connection: socket.socket) -> bool:
    connection.settimeout(0.05)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize(("parsed_bytes", "refused"), [(16_384, True), (1 << 40, False)])
def test_a_body_of_tiny_chunks_is_refused(
    site: Site, parsed_bytes: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsed without the check all of it is taken, as the control shows."""
    monkeypatch.setattr(connections, "PARSED_BYTES", parsed_bytes)
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", site.port), timeout=60) as connection:
        connection.sendall(head + 50_000 * b"1\r\nx\r\n" + b"0\r\n\r\n")
        answer = connection.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 400 ")
    is_refused = b'{"error": "the chunks of the body are too small; send larger ones"}' in answer
    assert is_refused == refused


def test_a_client_that_is_refused_reads_why_in_json(site: Site) -> None:
    with socket.create_connection(("127.0.0.1", site.port), timeout=60) as connection:
        connection.sendall(b"nonsense\r\n\r\n" + bytes(1_000_000))
        answer = connection.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b'{"error": "this is not a valid HTTP/1.1 request"}')


@pytest.mark.parametrize(
    ("version", "lengths", "statuses"),
    [
        (b"1.1", b"Transfer-Encoding: chunked", [b"200", b"200"]),
        (b"1.1", b"Content-Length: 4\r\nTransfer-Encoding: chunked", [b"400"]),
        (b"1.1", b"Transfer-Encoding: chunked\r\nContent-Length: 4", [b"400"]),
        (b"1.0", b"Transfer-Encoding: chunked", [b"400"]),
        (b"1.1", b"Content-Length: 4\r\nContent-Length: 40", [b"400"]),
        (b"1.1", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", [b"400"]),
    ],
)
def test_a_body_whose_end_is_in_doubt_is_refused(
    site: Site, version: bytes, lengths: bytes, statuses: list[bytes]
) -> None:
    """Otherwise what follows it could be taken for a request of somebody else."""
    image = encoded(picture())
    content = b"POST /predict HTTP/" + version + b"\r\nHost: localhost\r\n" + lengths + b"\r\n\r\n"
    content += b"%x\r\n" % len(image) + image + b"\r\n0\r\n\r\n"
    content += b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", site.port), timeout=60) as connection:
        connection.sendall(content)
        answer = b""
        while part := connection.recv(65_536):
            answer += part
    assert re.findall(rb"HTTP/1.1 (\d+) ", answer) == statuses


def test_thousands_of_requests_on_one_connection(site: Site) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", site.port), timeout=60) as connection:
        connection.sendall(500 * request)
        answer = b""
        while answer.count(b"HTTP/1.1 200") < 500:
            part = connection.recv(65_536)
            assert part
            answer += part
    assert b"HTTP/1.1 4" not in answer


def most_beginnings_in_a_turn(take_turn: Callable[[], Awaitable[None]]) -> int:
    """How many of 100 requests begin in one turn of the event loop, at most."""
    begun: list[int] = []

    async def begin(k: int) -> None:
        await take_turn()
        begun.append(k)

    async def count() -> int:
        tasks = [asyncio.create_task(begin(k)) for k in range(100)]
        counts = [0]
        while len(begun) < len(tasks):
            await asyncio.sleep(0)
            counts.append(len(begun))
        return max(after - before for before, after in pairwise(counts))

    most = asyncio.run(count())
    assert begun == sorted(begun)
    return most


def test_hundreds_of_requests_that_are_not_complete_leave_others_their_turn() -> None:
    assert most_beginnings_in_a_turn(connections.ConnectionPool(9).take_turn) == 1
    assert most_beginnings_in_a_turn(lambda: asyncio.sleep(0)) == 100, "the control"


async def take_no_turn(self: connections.ConnectionPool) -> None:
    """Let all bodies go on at the same time."""


@pytest.mark.parametrize("is_bounded", [True, False])
def test_large_bodies_take_turns_so_that_others_wait_for_one_piece(
    is_bounded: bool, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the control all bodies go on in the same turn of the event loop."""
    parse, counts = connections.BoundedProtocol._parse, [0]
    if not is_bounded:
        monkeypatch.setattr(connections.ConnectionPool, "take_turn", take_no_turn)

    def count(self: connections.BoundedProtocol, data: bytes) -> None:
        if not counts[-1]:
            self.loop.call_soon(counts.append, 0)
        counts[-1] += len(data)
        parse(self, data)

    monkeypatch.setattr(connections.BoundedProtocol, "_parse", count)
    body, num_clients = bytes(1_900_000), 6
    with ThreadPoolExecutor(num_clients) as pool:
        replies = list(pool.map(lambda _: site.ask("/predict", body), range(num_clients)))
    assert [reply.status for reply in replies] == num_clients * [400]
    # Bodies may begin and end in the same turn, so a few turns may read more.
    most = sorted(counts)[-len(counts) // 10]
    assert (most <= 2 * connections.READ_BYTES) == is_bounded, sorted(counts)


def test_of_large_bodies_that_grow_together_only_the_newest_are_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "START_SECONDS", 0.0)
    size, step, num_clients = 1_900_000, 100_000, 12
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n"
    uploads = site.service.uploads
    # An eighth of the room is for small bodies.
    num_fitting = uploads.limits.buffered_bytes * 7 // 8 // size
    assert 0 < num_fitting < num_clients - 1
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(num_clients):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", site.port), 60))
            clients.append(client)
            client.sendall(head.encode() + b"x")
            eventually(lambda: uploads.buffered_bytes == len(clients))
        # The last one stops in the middle, and is refused all the same.
        stopped = clients.pop()
        stopped.sendall(bytes(1_200_000))
        for sent in range(1, size, step):
            for client in clients:
                with contextlib.suppress(OSError):
                    client.sendall(bytes(min(step, size - sent)))
        statuses = [client.recv(12) for client in (*clients, stopped)]
    refused = num_clients - num_fitting
    assert statuses == num_fitting * [b"HTTP/1.1 400"] + refused * [b"HTTP/1.1 503"]
    eventually(lambda: uploads.buffered_bytes == 0)


def test_the_objects_of_the_libraries_are_not_looked_at_again() -> None:
    threshold = gc.get_threshold()
    try:
        run.shorten_collections()
        assert gc.get_freeze_count() > 50_000
        assert len(gc.get_objects()) < 5000
    finally:
        gc.unfreeze()
        gc.set_threshold(*threshold)


def test_a_connection_needs_few_file_descriptors_of_those_that_are_allowed() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(300, soft), hard))
    try:
        assert 1 <= connections.connection_limit() < 300 - connections.SPARE_FILES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
