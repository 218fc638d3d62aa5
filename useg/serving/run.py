"""An application -> a process that listens, and that ends well: what was accepted is answered, then it exits."""

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

from useg.errors import UsageError
from useg.serving.app import application
from useg.serving.middleware import RequestLog
from useg.serving.service import Service

HEAD_SECONDS = 10.0  # within which a request's head has to arrive


LINGER_SECONDS = 1.0  # between a signal and the end of listening


SETTLE_SECONDS = 0.5  # within which accepted clients have sent their requests


_QUEUE = 1024  # connections that the system keeps until they are accepted


class PatientProtocol(H11Protocol):
    """Sends what it has at once, and hangs up on a client that does not begin a request; uvicorn alone would wait for it for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch."""
        super().connection_made(transport)
        # asyncio does so only for sockets that name their protocol, which a listener of Python's own does not: answers, whose head and body
        # are sent apart, would wait 40 ms for the client's acknowledgement
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.loop.call_later(HEAD_SECONDS, self._watch, None)

    def _watch(self, before: object) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is before and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()
        else:
            self.loop.call_later(HEAD_SECONDS, self._watch, self.cycle)


def listen(host: str, port: int) -> socket.socket:
    """Take an address.

    Raises:
        UsageError: it is taken, or is none of this machine's.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(place[:2], family=family, backlog=_QUEUE)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"{host}:{port} cannot be listened to ({error}); choose another --host or --port"
        ) from error


def listener_url(listener: socket.socket) -> str:
    """Return where a browser finds what listens."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """Ends by a signal as a service should.

    For a moment it goes on as before, but says on ``/readyz`` that it wants no more, and hangs up after every answer. Then it turns new
    clients away, and returns when what was accepted is answered, by the system on its behalf, too.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; uvicorn would raise the signal once more when all is done, and so exit with another status than 0."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = self._service.draining = True

    async def main_loop(self) -> None:
        """Serve until a signal."""
        await super().main_loop()
        await asyncio.sleep(LINGER_SECONDS)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what was accepted; uvicorn alone would cut off the clients that wait for being accepted, or whose request is on its way."""
        for listener in sockets or ():
            _turn_away(listener)
        await asyncio.sleep(SETTLE_SECONDS)
        await super().shutdown(sockets)


def _turn_away(listener: socket.socket) -> None:
    """Let Linux ignore whoever wants to connect from now on, while those in its queue are accepted; elsewhere nothing happens.

    A listening socket that is closed resets the connections in its queue, whose clients believe that they are served. So it is given a packet
    filter of one instruction first, "take 0 bytes" (socket(7), SO_ATTACH_FILTER). Ignored clients ask again after a second.
    """
    instruction = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
    with contextlib.suppress(OSError):
        if sys.platform == "linux":
            listener.setsockopt(
                socket.SOL_SOCKET, 26, struct.pack("HP", 1, ctypes.addressof(instruction))
            )


def make_server(service: Service, log: RequestLog, token: str = "") -> Server:
    """Return what serves: ``run(sockets=[...])`` returns when a signal has come, or ``should_exit`` is set, and all is answered."""
    config = uvicorn.Config(
        application(service, log, token),
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_QUEUE,
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
    """Serve until SIGTERM or SIGINT; then the process may end at once. ``ready`` is called when both end it well, before the first answer."""
    for name in ("uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.addHandler(_Handler(log))
        logger.setLevel(logging.WARNING)
    server = make_server(service, log, token)
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # uvicorn would take these later, and give them back before the process has ended
        signal.signal(number, server.handle_exit)
    ready()
    server.run(sockets=[listener])
    service.desk.pool.shutdown(wait=False, cancel_futures=True)
    if (
        service.desk.working
    ):  # on pictures whose requests were given up; Python would wait for their threads
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class _Handler(logging.Handler):
    """Writes what uvicorn complains of into our log."""

    def __init__(self, log: RequestLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        entry = {"level": record.levelname.lower(), "message": record.getMessage().strip()}
        self._log(
            entry
            | (
                {"traceback": "".join(traceback.format_exception(*record.exc_info))}
                if record.exc_info
                else {}
            )
        )
