"""What every request has in common: limits, errors, uploads, metrics, safe headers, token, log.

An upload is kept in memory only, and never more of it than the limits allow. Whatever the service
does not accept, it refuses at once with one sentence of JSON, so that it finishes what it accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import io
import json
import os
import secrets
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from useg.errors import SettingsError
from useg.images.decode import stored_size
from useg.images.limits import clear_errors

RETRY_AFTER_SECONDS = 2

# Bounds of the histogram of response times.
HISTOGRAM_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

# Of a form, beside its files.
MAX_FORM_FIELDS = 16
MAX_FORM_FIELD_BYTES = 1000

MAX_SHOWN_NAME_LENGTH = 60

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

RequestLog = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Limits:
    """How much the service accepts.

    Args:
        upload_bytes: largest body of a request.
        pixels: largest image. All images in progress together have at most as many, so that large
            ones take turns.
        images: most images in one request.
        waiting: most images in the request queue.
        seconds: from a request's first byte to its response's last.
        response_bytes: largest response; only class probabilities reach it.
    """

    upload_bytes: int = 32_000_000
    pixels: int = 25_000_000
    images: int = 32
    waiting: int = 64
    seconds: float = 25.0
    response_bytes: int = 400_000_000

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) <= 0:
                raise SettingsError(
                    f"the limit '{field.name}' is {value:g}, so the service would refuse every "
                    "request; give a number above 0"
                )

    @property
    def buffered_bytes(self) -> int:
        """Most bytes of all requests' bodies that are in memory at one time."""
        return 8 * self.upload_bytes


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
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


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


@dataclass(frozen=True)
class Upload:
    """An uploaded file; errors call it by its ``name``."""

    name: str
    content: bytes


class UploadReader:
    """Reads the bodies of requests and bounds them, each one and all together.

    Starlette's ``RequestBodyLimitMiddleware`` bounds each body as strictly, but not all of them
    together, and it replaces our sentence by the plain text "Content Too Large".
    """

    def __init__(self, limits: Limits) -> None:
        self.buffered_bytes = 0
        self._limits = limits

    @contextlib.asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[list[Upload]]:
        """Read the files of a form, or any other body as one file; buffered until the block ends.

        Raises:
            HTTPException: the body is too large, empty, damaged or compressed, or has too many
                files; 503 when all uploads together are too large.
        """
        body = _Body(self)
        try:
            if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
                yield await self._read_form(request, body)
            else:
                yield [Upload("the image", await self._read_whole(request, body))]
        finally:
            self.buffered_bytes -= body.size
        assert self.buffered_bytes >= 0

    async def read_body(self, request: Request) -> bytes:
        """Read the whole body, buffered only meanwhile; raises what :meth:`receive` raises."""
        body = _Body(self)
        try:
            return await self._read_whole(request, body)
        finally:
            self.buffered_bytes -= body.size

    async def _read_whole(self, request: Request, body: _Body) -> bytes:
        content = b"".join([chunk async for chunk in self._read_chunks(request, body)])
        if not content:
            raise HTTPException(
                400,
                "the request has no body; send an image file as the body, or as a file of a form",
            )
        return content

    async def _read_form(self, request: Request, body: _Body) -> list[Upload]:
        most = self._limits.images
        parser = _StrictMultiPartParser(
            request.headers,
            self._read_chunks(request, body),
            max_files=most,
            max_fields=MAX_FORM_FIELDS,
            max_part_size=MAX_FORM_FIELD_BYTES,
        )
        # Never reached, so nothing is written to disk.
        parser.spool_max_size = self._limits.upload_bytes + 1
        try:
            form = await parser.parse()
        except MultiPartException as error:
            reason = error.message.rstrip(".")
            raise HTTPException(
                400,
                f"the form cannot be read ({reason}); send a complete form of 1 to {most} files",
            ) from error
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        uploads = [
            Upload(f"image {k} ({_shown_name(file.filename)})", await file.read())
            for k, file in enumerate(files, 1)
        ]
        await form.close()
        if not uploads:
            raise HTTPException(
                400, "the form has no file; send each image as a file with a file name"
            )
        return uploads

    async def _read_chunks(self, request: Request, body: _Body) -> AsyncGenerator[bytes, None]:
        """Yield the body as it arrives; a declared size is checked before anything is read."""
        if request.headers.get("content-encoding", "identity") != "identity":
            raise HTTPException(415, "the body is compressed; send it uncompressed")
        declared = request.headers.get("content-length", "0")
        self._check_size(int(declared) if declared.isascii() and declared.isdigit() else 0)
        async for chunk in request.stream():
            body.grow(len(chunk))
            self._check_size(body.size)
            if self.buffered_bytes > self._limits.buffered_bytes:
                raise service_unavailable("too many uploads are in memory")
            if chunk:
                yield chunk
        request.state.received = True

    def _check_size(self, size: int) -> None:
        if size > self._limits.upload_bytes:
            raise HTTPException(
                413,
                f"the body has more than the allowed {self._limits.upload_bytes:,} bytes; send "
                "less at a time",
            )


class _Body:
    """How many bytes of one request's body are buffered; its reader counts all bodies'."""

    def __init__(self, reader: UploadReader) -> None:
        self.size = 0
        self._reader = reader

    def grow(self, size: int) -> None:
        self.size += size
        self._reader.buffered_bytes += size


class _StrictMultiPartParser(MultiPartParser):
    """Refuses a truncated form, which Starlette's parser accepts; then closes its files, too."""

    complete = False

    def __init__(
        self, headers: Headers, stream: AsyncGenerator[bytes, None], **limits: int
    ) -> None:
        super().__init__(headers, self._until_complete(stream), **limits)

    def on_end(self) -> None:
        self.complete = True

    async def _until_complete(
        self, stream: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[bytes, None]:
        async for chunk in stream:
            yield chunk
        if not self.complete:
            raise MultiPartException("it ends in the middle of a part")


def declared_pixels(upload: Upload, limit: int) -> int:
    """Return how many pixels an image file declares, without decoding it.

    Raises:
        DataError: it is not an image.
        HTTPException: 413, it declares more than ``limit``.
    """
    with clear_errors(upload.name):
        width, height = stored_size(io.BytesIO(upload.content), page=None)
    if width * height > limit:
        raise HTTPException(
            413,
            f"{upload.name} has {width}x{height} pixels, more than the allowed {limit:,}; send a "
            "smaller one",
        )
    return width * height


def _shown_name(name: str | None) -> str:
    shown = "".join(letter if letter.isprintable() else "?" for letter in name or "no name")
    if len(shown) <= MAX_SHOWN_NAME_LENGTH:
        return shown
    return shown[: MAX_SHOWN_NAME_LENGTH - 3] + "..."


class RequestMiddleware:
    """The outermost layer: checks the token, sets the deadline, adds headers, counts and logs.

    Args:
        app: the application.
        metrics: counts the requests.
        log: takes one entry for each request.
        seconds: deadline of a request.
        token: clients must send ``Authorization: Bearer TOKEN``; empty: they need not.
        public: paths that need no token.
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
        token: str,
        public: frozenset[str],
        draining: Callable[[], bool],
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._log = log
        self._seconds = seconds
        self._authorization = f"Bearer {token}".encode() if token else b""
        self._public = public
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        response = _ResponseSender(send, secrets.token_hex(6), self._draining)
        scope.setdefault("state", {})
        try:
            await self._respond(scope, receive, response)
        finally:
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
                    **scope["state"].get("log_fields", {}),
                }
            )

    async def _respond(self, scope: Scope, receive: Receive, response: _ResponseSender) -> None:
        try:
            if not self._is_authorized(scope):
                raise unauthorized()
            async with asyncio.timeout(self._seconds):
                await self._app(scope, receive, response)
        except (HTTPException, TimeoutError) as error:
            if response.status:
                raise
            if isinstance(error, TimeoutError):
                error = self._deadline_error(scope)
            await error_response(error)(scope, receive, response)

    def _deadline_error(self, scope: Scope) -> HTTPException:
        """Return 408 where the client was too slow, 503 where the service was."""
        has_body = Request(scope).headers.get("content-length", "0").strip("0")
        if not has_body or scope["state"].get("received"):
            return service_unavailable(f"no response was ready after {self._seconds:g} seconds")
        return HTTPException(
            408,
            f"the body was not complete after {self._seconds:g} seconds; send it faster, or less "
            "at a time",
        )

    def _is_authorized(self, scope: Scope) -> bool:
        if not self._authorization or scope["path"] in self._public:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._authorization)


class _ResponseSender:
    """Sends a response with the headers that every response has; records status and size."""

    def __init__(self, send: Send, request_id: str, draining: Callable[[], bool]) -> None:
        self.request_id, self.status, self.bytes = request_id, 0, 0
        self._send, self._draining = send, draining

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = {**SECURITY_HEADERS, "x-request-id": self.request_id}
            if self._draining():
                headers["connection"] = "close"
            given = {name for name, _ in message["headers"]}
            added = [(name.encode(), value.encode()) for name, value in headers.items()]
            added = [(name, value) for name, value in added if name not in given]
            message = {**message, "headers": [*message["headers"], *added]}
        else:
            self.bytes += len(message.get("body", b""))
        await self._send(message)


def json_lines(write: Callable[[str], object]) -> RequestLog:
    """Return a log that writes each entry and its time as one line of JSON."""

    def log(entry: dict[str, Any]) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write(json.dumps({"time": now, **entry}) + "\n")

    return log
