"""Run the application: a process that listens, and that shuts down gracefully.

On SIGTERM or SIGINT the service answers every request that it accepted, then exits with status 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import ipaddress
import json
import logging
import os
import queue
import secrets
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import uvicorn

from useg.errors import MachineError, SettingsError
from useg.machine import return_free_memory
from useg.serving.app import application
from useg.serving.connections import bounded_config, connection_limit
from useg.serving.middleware import RequestLog, json_lines
from useg.serving.service import Service

# From the signal until the service refuses new connections: load balancers see /readyz.
DRAIN_SECONDS = 1.0

# From then until it closes idle connections: clients that are connected may still send a request.
LAST_REQUESTS_SECONDS = 0.5

# Backlog: connections that the operating system holds until they are accepted.
LISTEN_BACKLOG = 1024

# Warnings of the libraries that have the same text are logged once in this time.
REPEATED_WARNING_SECONDS = 60.0

# Interval, in tenths of a second, at which free memory is returned to the operating system.
MEMORY_TICKS = 50

# Python's garbage collector stops all threads while it scans objects. It scans this many new
# objects, after ten such scans ten times as many, and after this many of those all objects of the
# service.
COLLECTED_OBJECTS, FULL_COLLECTIONS = 1000, 30

# Lines that are buffered while the reader of the log is slow; further ones are dropped.
MAX_WAITING_LINES = 10_000

# From asm-generic/socket.h; Python's socket module does not name it.
SO_ATTACH_FILTER = 26


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


def is_local(listener: socket.socket) -> bool:
    """Tell whether only programs on this machine can connect."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def choose_token(listener: socket.socket, token: str, without: bool) -> tuple[str, str]:
    """Return the token that clients must send, and what the user should know about it.

    Args:
        listener: where clients connect.
        token: the user's token; empty: useg generates one if other machines can connect.
        without: whether other machines may use the service without a token.

    Raises:
        SettingsError: a token, and none, were asked for.
    """
    if token and without:
        raise SettingsError("--no-token and a token are both given; give only one of them")
    if token or is_local(listener):
        return token, ""
    address = "{}:{}".format(*listener.getsockname()[:2])
    if without:
        return "", (
            f"useg: warning: everybody who can reach {address} can use this service; without "
            "--no-token, clients must send a token"
        )
    token = secrets.token_urlsafe(24)
    return token, (
        f"useg: other machines can reach {address}, so clients must send the token {token} "
        "(generated for this run; set USEG_TOKEN to choose one, or give --no-token)"
    )


class LogWriter:
    """Writes lines to a file descriptor in a thread of its own: callers never wait.

    A log that nobody reads or a full disk must not stop the service: lines that cannot be written
    are dropped and counted.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_WAITING_LINES)
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._run_forever, name="log", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Queue a line to be written."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._num_dropped += 1

    def close(self, seconds: float = 1.0) -> None:
        """Wait until all lines are written, for a limited time."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=seconds)
            self._thread.join(seconds)

    def _run_forever(self) -> None:
        while (line := self._lines.get()) is not None:
            num_dropped, self._num_dropped = self._num_dropped, 0
            if num_dropped:
                message = f"{num_dropped} log entries were dropped: the log is read too slowly"
                line = json.dumps({"level": "warning", "message": message}) + "\n" + line
            content = line.encode()
            # A full disk or a closed pipe: the line is lost.
            with contextlib.suppress(OSError):
                while content:
                    content = content[os.write(self._descriptor, content) :]


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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections, a few per turn of the event loop."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(LISTEN_BACKLOG)

    async def on_tick(self, counter: int) -> bool:
        """Run periodic tasks, ten times a second; return whether to shut down."""
        if counter % MEMORY_TICKS == 0 and not self._service.is_working:
            await asyncio.to_thread(return_free_memory)
        return await super().on_tick(counter)

    async def main_loop(self) -> None:
        """Serve until a signal, and a little longer."""
        await super().main_loop()
        await asyncio.sleep(DRAIN_SECONDS)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Respond to all accepted requests.

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
    first gets a packet filter (``SO_ATTACH_FILTER``, documented in socket(7)) that drops packets
    with the flag SYN, by which clients open a connection. A dropped client tries again after a
    second and finds the port closed. The last packet of a handshake on its way is let in.
    Other systems have no such filter; there this does nothing.
    """
    # Each is a struct sock_filter {code, jump if true, jump if false, k}; see linux/filter.h.
    instructions = (
        # Load byte 13 of the TCP header, the flags.
        (0x30, 0, 0, 13),
        # If SYN, bit 2, is set, go on, else skip one.
        (0x45, 0, 1, 2),
        # Keep 0 bytes of the packet, or all.
        (0x06, 0, 0, 0),
        (0x06, 0, 0, 0xFFFFFFFF),
    )
    content = b"".join(struct.pack("HBBI", *each) for each in instructions)
    filters = ctypes.create_string_buffer(content)
    program = struct.pack("HP", len(instructions), ctypes.addressof(filters))
    with contextlib.suppress(OSError):
        if sys.platform == "linux":
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def make_server(
    service: Service, log: RequestLog, token: str = "", hosts: Iterable[str] = ()
) -> Server:
    """Return the server; ``run(sockets=[...])`` returns after a graceful shutdown.

    A signal starts the shutdown, or setting ``should_exit``. The arguments are those of
    :func:`useg.serving.app.application`.
    """
    app = application(service, log, token, hosts)
    seconds = round(service.limits.seconds) + 2
    return Server(bounded_config(app, connection_limit(), seconds), service)


def shorten_collections() -> None:
    """Keep Python's garbage collector from stopping the service; call it when all is loaded.

    The collector scans all objects now and then, while every thread waits: 0.3 s for the objects of
    the libraries. These never become garbage, so they are excluded from further scans.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECTED_OBJECTS, 10, FULL_COLLECTIONS)


def run(
    service: Service,
    listener: socket.socket,
    writer: LogWriter | None = None,
    token: str = "",
    hosts: Iterable[str] = (),
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, after which the process may end at once.

    Args:
        service: the service.
        listener: where clients connect.
        writer: of the log; None: there is none.
        token: the token that clients must send; empty: they need none.
        hosts: names by which clients may call the service.
        ready: called before the first response, when either signal causes a graceful shutdown.
    """
    log = json_lines(writer.write) if writer else lambda entry: None
    # Printing a warning would block while nobody reads standard error.
    logging.captureWarnings(True)
    for name in ("uvicorn", "asyncio", "py.warnings"):
        logger = logging.getLogger(name)
        logger.addHandler(_LogHandler(log))
        logger.setLevel(logging.WARNING)
    # Threads with long Python code yield to the event loop after one millisecond instead of five.
    sys.setswitchinterval(0.001)
    server = make_server(service, log, token, hosts)
    # uvicorn would install its handlers later, and remove them before the process has ended.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    ready()
    shorten_collections()
    server.run(sockets=[listener])
    queues = (service.queue, service.large_queue)
    for each in queues:
        each.pool.shutdown(wait=False, cancel_futures=True)
    if writer:
        writer.close()
    if service.is_working:
        # Threads may still work for cancelled requests, and Python would wait for them.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(0)


class _LogHandler(logging.Handler):
    """Writes uvicorn's and asyncio's warnings into the service's log, each once a minute."""

    def __init__(self, log: RequestLog) -> None:
        super().__init__()
        self._log = log
        self._logged: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        message, now = record.getMessage().strip(), time.monotonic()
        if now - self._logged.get(message, -REPEATED_WARNING_SECONDS) < REPEATED_WARNING_SECONDS:
            return
        if len(self._logged) > MAX_WAITING_LINES:
            self._logged.clear()
        self._logged[message] = now
        entry: dict[str, Any] = {"level": record.levelname.lower(), "message": message}
        if record.exc_info:
            entry["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        self._log(entry)
