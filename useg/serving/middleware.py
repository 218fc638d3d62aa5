"""Middleware for every request: limits, errors, access, metrics, safe headers, deadline, log.

The service refuses what it cannot handle at once, with one sentence in JSON. So it can finish every
request that it accepted.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import math
import os
import re
import secrets
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from useg.errors import SettingsError
from useg.serving.connections import CONNECTION, BoundedProtocol

RETRY_AFTER_SECONDS = 2

# A response is sent in pieces. The client has this long to read each of them, and must read the
# whole response at this speed or faster.
SENT_BYTES = 65_536
READ_SECONDS = 10.0
MIN_BYTES_PER_SECOND = 500_000

MAX_ERROR_LENGTH = 1000

# Bounds of the histogram of response times.
HISTOGRAM_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "media-src 'self' blob:; connect-src 'self'; worker-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-resource-policy": "same-origin",
}

# A name, or an IPv6 address in brackets, and perhaps a port (RFC 3986, section 3.2).
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:@/]+))(?::[0-9]{0,5})?")

RequestLog = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Limits:
    """The limits of the service.

    Args:
        upload_bytes: maximum bytes of a request's body.
        pixels: maximum pixels of an image.
        images: maximum number of images in one request.
        waiting: maximum number of images in the request queue.
        seconds: from a request's first byte to its response's first.
        response_bytes: maximum bytes of a response, and of all responses in memory together.
        work_bytes: memory for the images in progress, so that large ones take turns.
    """

    upload_bytes: int = 32_000_000
    pixels: int = 25_000_000
    images: int = 32
    waiting: int = 64
    seconds: float = 25.0
    response_bytes: int = 400_000_000
    work_bytes: int = 2_500_000_000

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 < (value := getattr(self, field.name)) < math.inf:
                raise SettingsError(
                    f"the limit '{field.name}' is {value:g}, but it must be a finite number above 0"
                )

    @property
    def buffered_bytes(self) -> int:
        """Maximum bytes of the bodies of all requests in memory together."""
        return 8 * self.upload_bytes


def make_limits(
    upload: float, pixels: float, waiting: int, seconds: float, memory: float
) -> Limits:
    """Return the limits that the options of ``useg serve`` give, in MB, Mpixels and seconds.

    Raises:
        SettingsError: one is not a number above 0.
    """
    # A limit that is not finite is refused as it is.
    upload_bytes, num_pixels, work_bytes = (
        round(value * 1e6) if math.isfinite(value) else value for value in (upload, pixels, memory)
    )
    return Limits(
        upload_bytes,  # type: ignore[arg-type]
        num_pixels,  # type: ignore[arg-type]
        waiting=waiting,
        seconds=seconds,
        work_bytes=work_bytes,  # type: ignore[arg-type]
    )


def service_unavailable(reason: str) -> HTTPException:
    """Return status 503, the only error that is not the client's fault."""
    return HTTPException(
        503,
        f"{reason}; try again in {RETRY_AFTER_SECONDS} seconds",
        {"retry-after": str(RETRY_AFTER_SECONDS)},
    )


def client_disconnected() -> HTTPException:
    """Return status 499 (nginx's "client closed request"), which only the log shows."""
    return HTTPException(499, "the client has disconnected")


def unauthorized() -> HTTPException:
    """Return status 401."""
    return HTTPException(
        401,
        "this service requires a token; send the header 'Authorization: Bearer TOKEN'",
        {"www-authenticate": "Bearer"},
    )


def error_response(error: HTTPException) -> JSONResponse:
    """Return the response to a refused request: its sentence in JSON."""
    # A name or id from a client can be long, or contain half of a surrogate pair, which cannot be
    # encoded.
    sentence = error.detail[:MAX_ERROR_LENGTH].encode("utf-8", "backslashreplace").decode()
    return JSONResponse({"error": sentence}, error.status_code, error.headers)


@dataclass(frozen=True)
class Access:
    """Access control: who may use the service.

    Pages of other sites that are open in the same browser can send requests to this machine, so a
    request from another site is refused. Such a site can also let a name of its own resolve to this
    machine (DNS rebinding); the header Host then has that name. Without a token, only IP addresses,
    localhost and known names are served.

    Args:
        token: clients must send ``Authorization: Bearer TOKEN``; empty: they need not.
        hosts: names by which clients may call the service.
        public: paths that can be requested without a token.
        health: paths that anyone may request, by any host name.
        cookie: name of a cookie in which browsers may send the token, too; they may also give it
            in the address, as ``?token=TOKEN``. Empty: they may not.
    """

    token: str = ""
    hosts: frozenset[str] = frozenset()
    public: frozenset[str] = frozenset()
    health: frozenset[str] = frozenset()
    cookie: str = ""

    def check(self, scope: Scope) -> None:
        """Refuse a request that may not use the service.

        Raises:
            HTTPException: 401 without the token, 403 from another site, 421 by an unknown name.
        """
        if scope["path"] in self.health:
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "localhost")
        if not self.token and not self._is_known(host):
            name = _shown(_host_name(host))
            raise HTTPException(
                421,
                f"this service does not accept the host name {name!r}; use its IP address, or "
                f"start it with --allow-host {name}",
            )
        if not self._is_same_site(headers, host, scope["method"]):
            raise HTTPException(
                403, "the request comes from a page of another site; use this service's own page"
            )
        if not self._is_authorized(headers, scope) and scope["path"] not in self.public:
            raise unauthorized()

    def _is_known(self, host: str) -> bool:
        name = _host_name(host)
        if name in self.hosts or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _is_same_site(self, headers: Headers, host: str, method: str) -> bool:
        """Tell whether a request comes from the service's page, or from no page at all."""
        if sites := headers.getlist("sec-fetch-site"):
            is_link = headers.get("sec-fetch-mode") == "navigate" and method == "GET"
            return set(sites) <= {"same-origin", "none"} or is_link
        try:
            sources = [urlsplit(origin.lower()) for origin in headers.getlist("origin")]
            return all(
                source.netloc == host.lower() or source.hostname in self.hosts for source in sources
            )
        except ValueError:
            return False

    def _is_authorized(self, headers: Headers, scope: Scope) -> bool:
        if not self.token:
            return True
        # The name of the scheme may have small letters (RFC 9110, section 11.1).
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        given = [credentials] if scheme.lower() == "bearer" else []
        if self.cookie:
            request = Request(scope)
            given += [request.cookies.get(self.cookie, ""), *request.query_params.getlist("token")]
        expected = hashlib.sha256(self.token.encode("utf-8", "replace")).digest()
        return any(
            hmac.compare_digest(hashlib.sha256(text.encode("utf-8", "replace")).digest(), expected)
            for text in given
        )


def _host_name(host: str) -> str:
    """Return a header Host without its port; the whole of it where it is no name and port.

    >>> _host_name("LocalHost:8000"), _host_name("[::1]:8000"), _host_name("10.0.0.2")
    ('localhost', '::1', '10.0.0.2')
    >>> _host_name("[::1].evil.example"), _host_name("localhost:80.evil.example")
    ('[::1].evil.example', 'localhost:80.evil.example')
    """
    name = host.lower()
    found = _HOST.fullmatch(name)
    return (found[1] or found[2]).removesuffix(".") if found else name


def _shown(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name[:80])


class Metrics:
    """Counts requests by route and status, and their seconds, in Prometheus's text format 0.0.4.

    The package prometheus-client does the same: an observation takes it 6.3 us instead of 0.7, a
    scrape of nine routes 1.8 ms instead of 0.07, and it adds ``_created`` series of its own.
    """

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._buckets: defaultdict[str, list[int]] = defaultdict(
            lambda: [0] * (len(HISTOGRAM_SECONDS) + 1)
        )
        self._total_seconds: defaultdict[str, float] = defaultdict(float)

    def observe(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests[route, status] += 1
        self._buckets[route][bisect_left(HISTOGRAM_SECONDS, seconds)] += 1
        self._total_seconds[route] += seconds

    def text(self, values: Mapping[str, tuple[str, float]]) -> str:
        """Return all metrics as text.

        Args:
            values: further ones, name -> (help, value); a name that ends in ``_total`` is a
                counter, any other a gauge.
        """
        name = "useg_requests_total"
        lines = _metric_head(name, "counter", "Requests answered, by route and status.")
        lines += [
            f'{name}{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self._requests.items())
        ]
        name = "useg_request_seconds"
        lines += _metric_head(name, "histogram", "Seconds from request to end of response.")
        for route, counts in sorted(self._buckets.items()):
            lines += _histogram(name, f'route="{route}"', counts, self._total_seconds[route])
        for name, (text, value) in values.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [*_metric_head(name, kind, text), f"{name} {value:.10g}"]
        return "\n".join(lines) + "\n"


def _metric_head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _histogram(name: str, label: str, counts: Iterable[int], total: float) -> list[str]:
    lines, cumulative = [], 0
    for bound, count in zip((*map(str, HISTOGRAM_SECONDS), "+Inf"), counts, strict=True):
        cumulative += count
        lines.append(f'{name}_bucket{{{label},le="{bound}"}} {cumulative}')
    return [
        *lines,
        f"{name}_sum{{{label}}} {total:.6f}",
        f"{name}_count{{{label}}} {cumulative}",
    ]


def resident_bytes() -> int:
    """Return the resident memory of this process; 0 where the system does not report it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


class RequestMiddleware:
    """The outermost layer: checks access, sets deadlines, adds headers, counts and logs.

    Args:
        app: the application.
        metrics: counts the requests.
        log: takes one entry for each request.
        seconds: deadline of a request until its response starts.
        access: who may use the service.
        draining: whether the service shuts down, so that each connection closes after its
            response.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        log: RequestLog,
        *,
        seconds: float,
        access: Access,
        draining: Callable[[], bool],
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._log = log
        self._seconds = seconds
        self._access = access
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        connection = scope.get("extensions", {}).get(CONNECTION)
        response = _ResponseSender(send, secrets.token_hex(6), connection, self._draining)
        state = scope.setdefault("state", {})
        try:
            await self._respond(scope, receive, response)
        finally:
            if "reservation" in state:
                state["reservation"].release()
            seconds = time.perf_counter() - start
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.observe(route, response.status, seconds)
            self._log(
                {
                    "request": response.request_id,
                    "client": (scope.get("client") or ["unknown"])[0],
                    "method": scope["method"],
                    "path": scope["path"][:200],
                    "status": response.status,
                    "seconds": round(seconds, 4),
                    "bytes": response.bytes,
                    **state.get("log_fields", {}),
                }
            )

    async def _respond(self, scope: Scope, receive: Receive, response: _ResponseSender) -> None:
        try:
            async with asyncio.timeout(self._seconds) as response.deadline:
                try:
                    self._access.check(scope)
                except HTTPException as error:
                    await error_response(error)(scope, receive, response)
                else:
                    await self._app(scope, receive, response)
        except asyncio.CancelledError:
            # The time for the shutdown is over. uvicorn would answer with its own 500.
            if not response.status:
                reason = "the service is shutting down"
                await error_response(service_unavailable(reason))(scope, receive, response)
        except TimeoutError:
            if response.status:
                _cut_off(scope, response)
                return
            try:
                async with asyncio.timeout(READ_SECONDS) as response.deadline:
                    await error_response(self._deadline_error(scope))(scope, receive, response)
            except TimeoutError:
                _cut_off(scope, response)

    def _deadline_error(self, scope: Scope) -> HTTPException:
        """Return status 408 if the client was too slow, 503 if the service was."""
        has_body = Request(scope).headers.get("content-length", "0").strip("0")
        if not has_body or scope["state"].get("received"):
            return service_unavailable(f"no response was ready after {self._seconds:g} seconds")
        return HTTPException(
            408,
            f"the body was not complete after {self._seconds:g} seconds; send it faster, or less "
            "at a time",
        )


def _cut_off(scope: Scope, response: _ResponseSender) -> None:
    """Close the connection of a client that does not read its response."""
    fields = scope["state"].setdefault("log_fields", {})
    fields["error"] = "the client did not read the response in time"
    if response.connection:
        response.connection.abort()


class _ResponseSender:
    """Sends a response in pieces, with the headers that every response has; records its status.

    A piece waits until the client has read most of those before it, for a limited time.
    """

    def __init__(
        self,
        send: Send,
        request_id: str,
        connection: BoundedProtocol | None,
        draining: Callable[[], bool],
    ) -> None:
        self.request_id, self.status, self.bytes = request_id, 0, 0
        self.connection = connection
        self.deadline: asyncio.Timeout | None = None
        self._send, self._draining = send, draining
        self._start = 0.0
        self._size = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = asyncio.get_running_loop().time()
            self.status = message["status"]
            await self._send({**message, "headers": self._headers(message["headers"])})
            return
        body = memoryview(message.get("body", b""))
        for at in range(0, max(1, len(body)), SENT_BYTES):
            piece = body[at : at + SENT_BYTES]
            more_body = at + SENT_BYTES < len(body) or message.get("more_body", False)
            self._extend_deadline()
            await self._send({"type": message["type"], "body": piece, "more_body": more_body})
            self.bytes += len(piece)
            if more_body:
                # Let other requests run: with a client that reads fast, the line above never waits.
                await asyncio.sleep(0)

    def _headers(self, given: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        given = list(given)
        headers = {**SECURITY_HEADERS, "x-request-id": self.request_id}
        # The rest of a request that is answered already will not be read.
        if self._draining() or not (self.connection is None or self.connection.body_is_complete):
            headers["connection"] = "close"
        names = {name for name, _ in given}
        added = [(name.encode(), value.encode()) for name, value in headers.items()]
        self._size = next((int(value) for name, value in given if name == b"content-length"), 0)
        return [*given, *((name, value) for name, value in added if name not in names)]

    def _extend_deadline(self) -> None:
        if self.deadline is not None:
            now = asyncio.get_running_loop().time()
            last = self._start + READ_SECONDS + self._size / MIN_BYTES_PER_SECOND
            self.deadline.reschedule(min(now + READ_SECONDS, last))


def json_lines(write: Callable[[str], object]) -> RequestLog:
    """Return a log that writes each entry and its time as one line of JSON."""

    def log(entry: dict[str, Any]) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write(json.dumps({"time": now, **entry}) + "\n")

    return log
