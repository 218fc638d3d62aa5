"""HTTP connections: how many there are, how long they may wait, and how each of them ends.

uvicorn alone has no such limits: it waits forever for a client that sends or reads nothing, goes on
reading a body that it has refused, and accepts connections until the process has no file
descriptors left.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h11
from starlette.types import ASGIApp
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

# A connection is closed if the head of a request is not complete within this time.
REQUEST_HEAD_SECONDS = 10.0

# Largest head of a request: all headers together.
MAX_HEAD_BYTES = 32_768

MAX_CONNECTIONS = 1000

# asyncio accepts this many connections in one turn, before their number is checked.
ACCEPTED_AT_ONCE = 16

# File descriptors kept free for everything but connections.
SPARE_FILES = 64

# After the last response, a client has this long to read it, and may send this much, which is
# discarded; then the connection is reset.
LINGER_SECONDS = 2.0
MAX_DISCARDED_BYTES = 4_000_000

# Bytes of a connection that are read at a time, while all others wait.
READ_BYTES = 65_536

# A request starts when its body is complete, when this many bytes have arrived, or after this time.
START_BYTES = READ_BYTES
START_SECONDS = 1.0

# Bytes that are parsed at a time, before the result is checked.
PARSED_BYTES = 16_384

# The key of a request's connection among the extensions of its scope.
CONNECTION = "useg.connection"


def connection_limit() -> int:
    """Return how many connections leave the process enough file descriptors."""
    try:
        import resource
    except ImportError:
        # Windows has no such limit.
        return MAX_CONNECTIONS
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    open_files = Path("/proc/self/fd")
    used = len(os.listdir(open_files)) if open_files.is_dir() else SPARE_FILES
    return max(1, min(MAX_CONNECTIONS, allowed - used - SPARE_FILES))


class ConnectionPool:
    """Limits the number of connections: a new one replaces the one that has been idle longest.

    Args:
        limit: maximum number of connections at a time.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        # Ordered by the time of their last activity.
        self._waiting: dict[BoundedProtocol, None] = {}
        self._turn = asyncio.Lock()

    def add(self, connection: BoundedProtocol) -> None:
        """Count a new connection, and end another one, or this one, if there are too many."""
        self.count += 1
        self.wait(connection)
        if self.count > self.limit:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.abort()

    def wait(self, connection: BoundedProtocol) -> None:
        """Note that a connection is idle: it waits for its client from now on."""
        self._waiting.pop(connection, None)
        # The application may still respond to a client that has disconnected.
        if not connection.is_lost:
            self._waiting[connection] = None

    def work(self, connection: BoundedProtocol) -> None:
        """Note that a connection is busy: its client waits for a response."""
        self._waiting.pop(connection, None)

    async def take_turn(self) -> None:
        """Wait until all that came before had its turn, each in a turn of the event loop."""
        async with self._turn:
            await asyncio.sleep(0)

    def remove(self, connection: BoundedProtocol) -> None:
        """Remove a connection from the count."""
        self._waiting.pop(connection, None)
        self.count -= 1


class ClosingTransport(asyncio.Transport):
    """A transport whose ``close`` always ends the connection, after the client could read why.

    asyncio's own transport waits forever for a client that does not read. And a socket that is
    closed while its client still sends is reset at once, so the client never sees the response.
    """

    def __init__(self, transport: asyncio.Transport, client_is_sending: Callable[[], bool]) -> None:
        super().__init__()
        self.is_lingering = False
        self._client_is_sending = client_is_sending
        self._transport = transport
        self._ends = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return asyncio's information about the socket."""
        return self._transport.get_extra_info(name, default)

    def is_closing(self) -> bool:
        """Whether the connection is closing."""
        return self._ends or self._transport.is_closing()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes, later if the client does not read them now."""
        if not self._ends:
            self._transport.write(data)

    def get_write_buffer_size(self) -> int:
        """Return how many bytes are buffered for the client."""
        return self._transport.get_write_buffer_size()

    def pause_reading(self) -> None:
        """Stop reading from the client."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on reading from the client."""
        self._transport.resume_reading()

    def abort(self) -> None:
        """Reset the connection: the system forgets what the client has not read."""
        self._ends = True
        if not self._transport.is_closing() or self.get_write_buffer_size():
            # struct linger {on, 0 seconds}
            linger = struct.pack("ii", 1, 0)
            with contextlib.suppress(OSError):
                self.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, linger
                )
        self._transport.abort()

    def close(self) -> None:
        """Close the connection once the buffer is sent, and after a short time in any case."""
        if self._ends:
            return
        self._ends = True
        asyncio.get_running_loop().call_later(LINGER_SECONDS, self.abort)
        if self._client_is_sending() and self._transport.can_write_eof():
            self.is_lingering = True
            try:
                self._transport.write_eof()
            except OSError:
                # The client has reset the connection.
                self._transport.abort()
            self._transport.resume_reading()
        else:
            self._transport.close()


class BoundedProtocol(H11Protocol):
    """One connection."""

    transport: ClosingTransport

    def __init__(
        self,
        pool: ConnectionPool,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._pool = pool
        self._num_discarded = 0
        self.is_lost = False
        self._application = self.app
        self.app = self._respond

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer."""
        # asyncio's own number is 256 kB.
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]
        is_sending = functools.partial(_client_is_sending, self.conn)
        super().connection_made(ClosingTransport(transport, is_sending))
        # asyncio sets TCP_NODELAY only for sockets created with IPPROTO_TCP, which our listener
        # is not. Without it the body of a response, sent after its head, would wait 40 ms for the
        # client's acknowledgement.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._timer = self.loop.call_later(REQUEST_HEAD_SECONDS, self._close_if_idle, None)
        self._pool.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection from the count, and free its memory.

        If thousands of closed connections were left to a timer or the garbage collector, the
        collector would stop the service for a tenth of a second.
        """
        self.is_lost = True
        self._timer.cancel()
        self._pool.remove(self)
        self.transport.abort()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        # Each of these refers to the connection.
        self.app = self._application
        self.cycle = self.scope = None  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Handle what the client sent, or discard it if the connection is closing."""
        if self.transport.is_lingering:
            self._num_discarded += len(data)
            if self._num_discarded > MAX_DISCARDED_BYTES:
                self.transport.pause_reading()
            return
        for start in range(0, len(data), PARSED_BYTES):
            if self.transport.is_closing():
                return
            self._parse(data[start : start + PARSED_BYTES])
        self._note_progress()

    def _parse(self, data: bytes) -> None:
        """Parse what the client sent; refuse a body whose chunks are mostly their own sizes.

        h11 takes as long for a chunk of one byte as for one of 64 kB, and all other clients wait
        meanwhile.
        """
        cycle = self.cycle
        num_bytes = len(cycle.body) if cycle else 0
        super().data_received(data)
        if (
            cycle is not None
            and self.cycle is cycle
            and self.conn.their_state is h11.SEND_BODY
            and not cycle.response_complete
            and len(data) >= PARSED_BYTES // 4
            and len(cycle.body) - num_bytes < len(data) // 4
        ):
            self._refuse("the chunks of the body are too small; send larger ones")

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not HTTP. uvicorn's own method fails once a response has begun."""
        self._refuse("this is not a valid HTTP/1.1 request")

    def _refuse(self, sentence: str) -> None:
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            # The request is incomplete.
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self.abort()
                return
        content = json.dumps({"error": sentence}).encode()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + content)
        self.transport.close()

    def abort(self) -> None:
        """Reset the connection at once."""
        if self.cycle is not None:
            # Otherwise uvicorn logs that the response is not complete.
            self.cycle.disconnected = True
        self.transport.abort()

    @property
    def body_is_complete(self) -> bool:
        """Whether the client has sent all of its request."""
        return self.cycle is None or not self.cycle.more_body

    def _note_progress(self) -> None:
        is_working = self.cycle is not None and not self.cycle.response_started
        if is_working and self.body_is_complete:
            self._pool.work(self)
        else:
            self._pool.wait(self)

    async def _respond(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_message(message: Any) -> None:
            self._pool.wait(self)
            await send(message)

        async def receive_message() -> Any:
            message = await receive()
            # Bodies that arrive at the same time, and clients that leave at the same time, take
            # turns, so that complete requests need not wait for all of them.
            if message["type"] == "http.disconnect" or message.get("more_body"):
                await self._pool.take_turn()
            return message

        names = {name for name, _ in scope["headers"]}
        if b"transfer-encoding" in names and (
            b"content-length" in names or scope["http_version"] != "1.1"
        ):
            # A proxy before the service could take the end of this body for another request, or
            # the next request for its end (RFC 9112, section 6.1).
            self._refuse(
                "the request states the length of its body twice, or sends chunks in HTTP/1.0"
            )
            return
        scope["extensions"] = {CONNECTION: self}
        # Hundreds of connections can begin or end a request at once. Requests that are complete
        # need not wait until all of these are handled.
        if not self.body_is_complete:
            await self._wait_for_body(self.cycle)
            if self.is_lost:
                return
            await self._pool.take_turn()
        await self._application(scope, receive_message, send_message)

    async def _wait_for_body(self, cycle: RequestResponseCycle) -> None:
        """Wait for the body, or a part of it, for a limited time.

        To start a request takes three times as long as to read its head, and many clients that open
        hundreds of connections never send more.
        """
        if cycle.waiting_for_100_continue:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                while cycle.more_body and not cycle.disconnected and len(cycle.body) < START_BYTES:
                    cycle.message_event.clear()
                    await cycle.message_event.wait()
        # The application waits for this event before it looks at the body.
        cycle.message_event.set()

    def _close_if_idle(self, previous: object) -> None:
        """Close if no new request began since the ``previous`` one, which was answered."""
        if self.cycle is not previous or not (self.cycle is None or self.cycle.response_complete):
            self._timer = self.loop.call_later(
                REQUEST_HEAD_SECONDS, self._close_if_idle, self.cycle
            )
        elif self.transport.is_closing():
            self.abort()
        else:
            self.transport.close()


def _client_is_sending(connection: h11.Connection) -> bool:
    return connection.their_state in (h11.SEND_BODY, h11.ERROR)


def bounded_config(app: ASGIApp, num_connections: int, shutdown_seconds: int) -> Config:
    """Return uvicorn's configuration of a server whose connections are bounded.

    Args:
        app: The application.
        num_connections: How many connections it has at most.
        shutdown_seconds: How long a shutdown waits for requests.
    """
    protocol: Any = functools.partial(BoundedProtocol, ConnectionPool(num_connections))
    return Config(
        app,
        # uvicorn calls it with keywords, like the class that its type asks for.
        http=protocol,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=shutdown_seconds,
        backlog=ACCEPTED_AT_ONCE,
    )
