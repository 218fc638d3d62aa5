"""Runs the application: a process that listens, and that shuts down gracefully.

On SIGTERM or SIGINT the service answers every request that it accepted, then exits with status 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from useg.errors import MachineError
from useg.serving.app import application
from useg.serving.middleware import RequestLog
from useg.serving.service import Service

# A connection closes on which no request's head is complete within this time.
REQUEST_HEAD_SECONDS = 10.0

# From the signal until the service refuses new connections: load balancers see /readyz.
DRAIN_SECONDS = 1.0

# From then until it closes idle connections: accepted clients send their requests.
LAST_REQUESTS_SECONDS = 0.5

# Connections that the system holds until they are accepted.
LISTEN_BACKLOG = 1024

# From asm-generic/socket.h; Python's socket module does not name it.
SO_ATTACH_FILTER = 26


class TimeoutProtocol(H11Protocol):
    """Closes connections without a request, for which uvicorn alone would wait for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer."""
        super().connection_made(transport)
        # asyncio sets TCP_NODELAY only for sockets created with IPPROTO_TCP, which our listener
        # is not. Without it the body of a response, sent after its head, would wait 40 ms for the
        # client's acknowledgement.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.loop.call_later(REQUEST_HEAD_SECONDS, self._close_if_idle, None)

    def _close_if_idle(self, previous: object) -> None:
        """Close if no new request began since the ``previous`` one, which was answered."""
        if self.transport.is_closing():
            return
        if self.cycle is previous and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()
        else:
            self.loop.call_later(REQUEST_HEAD_SECONDS, self._close_if_idle, self.cycle)


def listen(host: str, port: int) -> socket.socket:
    """Bind and listen.

    Raises:
        MachineError: the address is in use, or does not belong to this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=LISTEN_BACKLOG)
    except (OSError, OverflowError) as error:
        raise MachineError(
            f"cannot listen on {host}:{port} ({error}); choose another --host or --port"
        ) from error


def listener_url(listener: socket.socket) -> str:
    """Return the URL for a browser."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """Shuts down gracefully on a signal.

    For a moment the service goes on as before, but ``/readyz`` returns 503 and each connection
    closes after its response. Then new connections are refused, and the server returns when every
    accepted request has its response. The system accepts connections on the server's behalf; they
    count, too.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the shutdown.

        uvicorn's own method would raise the signal again after it, so that the exit status would
        not be 0.
        """
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = self._service.draining = True

    async def main_loop(self) -> None:
        """Serve until a signal, and a little longer."""
        await super().main_loop()
        await asyncio.sleep(DRAIN_SECONDS)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Respond to what was accepted.

        uvicorn alone would cut off clients that wait to be accepted or are sending a request.
        """
        for listener in sockets or ():
            _ignore_new_connections(listener)
        await asyncio.sleep(LAST_REQUESTS_SECONDS)
        await super().shutdown(sockets)


def _ignore_new_connections(listener: socket.socket) -> None:
    """Make Linux drop new connections, while those in the listener's queue are still accepted.

    Closing a listening socket resets the connections in its queue, although their clients believe
    that they are connected. No option of uvicorn, asyncio or POSIX prevents it: ``listen(0)`` still
    lets one connection into the queue, ``shutdown`` resets the queue like ``close``. So the socket
    first gets a packet filter of one instruction, "accept 0 bytes" (``SO_ATTACH_FILTER``,
    documented in socket(7)). A dropped client tries again after a second and finds the port closed.
    Other systems have no such filter; there this does nothing.
    """
    # struct sock_filter {code = BPF_RET | BPF_K, jt, jf, k = 0}, in a struct sock_fprog.
    instruction = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
    program = struct.pack("HP", 1, ctypes.addressof(instruction))
    with contextlib.suppress(OSError):
        if sys.platform == "linux":
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def make_server(service: Service, log: RequestLog, token: str = "") -> Server:
    """Return the server; ``run(sockets=[...])`` returns after a graceful shutdown.

    A signal starts the shutdown, or setting ``should_exit``.
    """
    config = uvicorn.Config(
        application(service, log, token),
        http=TimeoutProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=LISTEN_BACKLOG,
        timeout_graceful_shutdown=round(service.limits.seconds) + 2,
    )
    return Server(config, service)


def run(
    service: Service,
    listener: socket.socket,
    log: RequestLog,
    token: str = "",
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, after which the process may end at once.

    ``ready`` is called before the first response, when either signal causes a graceful shutdown.
    """
    for name in ("uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.addHandler(_LogHandler(log))
        logger.setLevel(logging.WARNING)
    server = make_server(service, log, token)
    # uvicorn would install its handlers later, and remove them before the process has ended.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    ready()
    server.run(sockets=[listener])
    service.queue.pool.shutdown(wait=False, cancel_futures=True)
    if service.queue.running:
        # Threads still work for requests that were given up, and Python would wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class _LogHandler(logging.Handler):
    """Writes uvicorn's and asyncio's warnings into the service's log."""

    def __init__(self, log: RequestLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        entry = {"level": record.levelname.lower(), "message": record.getMessage().strip()}
        if record.exc_info:
            entry["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        self._log(entry)
