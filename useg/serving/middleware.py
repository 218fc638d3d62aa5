"""What the service takes and how long it tries -> refusals that say so in one sentence."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from useg.errors import UsageError
from useg.images.decode import stored_size
from useg.images.limits import clear_errors

RETRY_SECONDS = 2  # what a refused client is told to wait


@dataclass(frozen=True)
class Limits:
    """How much the service takes on; whatever is above is refused at once, so that what was taken on is done.

    Args:
        upload: bytes of one request's body.
        pixels: of one picture; also of all pictures that are worked on at one time, so that large ones take turns.
        pictures: of one request.
        waiting: pictures that wait for their turn.
        seconds: from a request's first byte to its answer's last.
        answer: bytes of one answer; only class probabilities reach it.
    """

    upload: int = 32_000_000
    pixels: int = 25_000_000
    pictures: int = 32
    waiting: int = 64
    seconds: float = 25.0
    answer: int = 400_000_000

    def __post_init__(self) -> None:
        for name in ("upload", "pixels", "pictures", "waiting", "seconds", "answer"):
            if getattr(self, name) <= 0:
                raise UsageError(
                    f"the limit '{name}' is {getattr(self, name):g}, but nothing could be served below 1; give a number above 0"
                )

    @property
    def held(self) -> int:
        """Bytes of all requests' bodies that are in memory at one time."""
        return 8 * self.upload


class RefusalError(Exception):
    """A request that is not served.

    Args:
        status: of HTTP.
        sentence: what was wrong, what is allowed, what to do.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(status, sentence)
        self.status, self.sentence = status, sentence

    @property
    def headers(self) -> dict[str, str]:
        """When to come again, or how to prove who one is."""
        return {503: {"retry-after": str(RETRY_SECONDS)}, 401: {"www-authenticate": "Bearer"}}.get(
            self.status, {}
        )


def busy(why: str) -> RefusalError:
    """Return the one refusal that is not the client's doing."""
    return RefusalError(503, f"{why}; try again in {RETRY_SECONDS} seconds")


def gone() -> RefusalError:
    """Return the refusal that nobody reads but the log."""
    return RefusalError(499, "the client has gone")


HISTOGRAM_SECONDS = (
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
)  # bounds of the histogram


class Metrics:
    """Counts requests by route and status, and how long they took."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.seconds: defaultdict[str, list[int]] = defaultdict(
            lambda: [0] * (len(HISTOGRAM_SECONDS) + 1)
        )
        self.total: defaultdict[str, float] = defaultdict(float)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self.requests[route, status] += 1
        self.seconds[route][bisect_left(HISTOGRAM_SECONDS, seconds)] += 1
        self.total[route] += seconds

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Return all of it, and ``gauges``: name -> (what it is, its value); a name that ends in ``_total`` only grows."""
        lines = _family("useg_requests_total", "counter", "Requests answered, by route and status.")
        lines += [
            f'useg_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.requests.items())
        ]
        lines += _family(
            "useg_request_seconds",
            "histogram",
            "Seconds from a request's head to its answer's end.",
        )
        for route, counts in sorted(self.seconds.items()):
            lines += _histogram(
                "useg_request_seconds", f'route="{route}"', counts, self.total[route]
            )
        for name, (text, value) in gauges.items():
            lines += [
                *_family(name, "counter" if name.endswith("_total") else "gauge", text),
                f"{name} {value:.10g}",
            ]
        return "\n".join(lines) + "\n"


def _family(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _histogram(name: str, label: str, counts: Iterable[int], total: float) -> list[str]:
    lines, below = [], 0
    for bound, count in zip((*map(str, HISTOGRAM_SECONDS), "+Inf"), counts, strict=True):
        below += count
        lines.append(f'{name}_bucket{{{label},le="{bound}"}} {below}')
    return [*lines, f"{name}_sum{{{label}}} {total:.6f}", f"{name}_count{{{label}}} {below}"]


def resident_bytes() -> int:
    """Return the memory that this process has in use; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


_FIELDS = 16  # of a form, beside its files


_FIELD_BYTES = 1000


@dataclass(frozen=True)
class Upload:
    """One file that was sent: ``name`` is for error messages."""

    name: str
    content: bytes


class Uploads:
    """Receives bodies; knows how many bytes of them are in memory."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.held = 0

    @contextlib.asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[list[Upload]]:
        """Read the body: the files of a form (multipart/form-data), or else the body itself as one file; held until the block ends.

        Raises:
            RefusalError: too large, empty, damaged, compressed, or too many files; 503 when the service holds too much already.
        """
        before = self.held
        held = _Held(self)
        try:
            if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
                yield await self._form(request, held)
            else:
                yield [Upload("the picture", await self._body(request, held))]
        finally:
            self.held -= held.bytes
        assert self.held >= 0, before

    async def body(self, request: Request) -> bytes:
        """Read the whole body; errors as for :meth:`receive`. It counts as held only while it is read."""
        held = _Held(self)
        try:
            return await self._body(request, held)
        finally:
            self.held -= held.bytes

    async def _body(self, request: Request, held: _Held) -> bytes:
        content = b"".join([chunk async for chunk in self._chunks(request, held)])
        if not content:
            raise RefusalError(
                400,
                "the request has no body; send a picture file as the body, or as a file of a form",
            )
        return content

    async def _form(self, request: Request, held: _Held) -> list[Upload]:
        parser = _Parser(
            request.headers,
            self._chunks(request, held),
            max_files=self.limits.pictures,
            max_fields=_FIELDS,
            max_part_size=_FIELD_BYTES,
        )
        parser.stream = parser.whole(parser.stream)
        parser.spool_max_size = self.limits.upload + 1  # nothing is ever written to disk
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise RefusalError(
                400,
                f"the form cannot be read ({error.message.rstrip('.')}); send at most {self.limits.pictures} files",
            ) from error
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        uploads = [
            Upload(f"picture {k + 1} ({_short(file.filename)})", await file.read())
            for k, file in enumerate(files)
        ]
        await form.close()
        if not uploads:
            raise RefusalError(400, "the form has no file; send each picture as a file with a name")
        return uploads

    async def _chunks(self, request: Request, held: _Held) -> AsyncGenerator[bytes, None]:
        """Yield the body as it arrives; a declared size is refused before anything is read."""
        if request.headers.get("content-encoding", "identity") != "identity":
            raise RefusalError(415, "the body is compressed, which is not taken; send it as it is")
        declared = request.headers.get("content-length", "0")
        self._check(int(declared) if declared.isascii() and declared.isdigit() else 0)
        async for chunk in request.stream():
            held.add(len(chunk))
            self._check(held.bytes)
            if chunk:
                yield chunk
        request.state.received = True

    def _check(self, size: int) -> None:
        if size > self.limits.upload:
            raise RefusalError(
                413,
                f"the body has more than {self.limits.upload:,} bytes, which is the most that is taken; send less at a time",
            )


class _Parser(MultiPartParser):
    """Refuses a form that ends before its end; the files that it began are closed then, too."""

    ended = False

    def on_end(self) -> None:
        self.ended = True

    async def whole(self, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """Yield what arrives, and see to it that this was all."""
        async for chunk in stream:
            yield chunk
        if not self.ended:
            raise MultiPartException("it ends in the middle of a part")


class _Held:
    """The bytes of one request."""

    def __init__(self, uploads: Uploads) -> None:
        self.bytes, self._uploads = 0, uploads

    def add(self, size: int) -> None:
        self.bytes += size
        self._uploads.held += size
        if self._uploads.held > self._uploads.limits.held:
            raise busy("too many uploads are in memory")


def upload_declared_pixels(upload: Upload, most: int) -> int:
    """Return how many pixels a picture file declares; nothing is decoded.

    Raises:
        UsageError: it is no picture.
        RefusalError: it declares more than ``most``.
    """
    with clear_errors(upload.name):
        width, height = stored_size(io.BytesIO(upload.content), page=None)
    if width * height > most:
        raise RefusalError(
            413,
            f"{upload.name} has {width}x{height} pixels, but at most {most:,} are taken; send a smaller one",
        )
    return width * height


def _short(name: str | None) -> str:
    shown = "".join(letter if letter.isprintable() else "?" for letter in name or "no name")
    return shown if len(shown) <= 60 else shown[:57] + "..."


OPEN = (
    "/healthz",
    "/readyz",
    "/v2/health/live",
    "/v2/health/ready",
)  # besides the page's files: what needs no token


HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:; "
    "connect-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-resource-policy": "same-origin",
}


RequestLog = Callable[[dict[str, Any]], None]


class RequestMiddleware:
    """The outermost layer of the application.

    Args:
        app: what answers.
        metrics: where requests are counted.
        log: takes what is to be written down of a request.
        seconds: after which an unanswered request is given up.
        token: what clients have to show as ``Authorization: Bearer TOKEN``; empty: nothing.
        public: paths that need no token.
        draining: whether the service is about to end, so that every answer is its connection's last.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        log: RequestLog,
        seconds: float,
        token: str,
        public: frozenset[str],
        draining: Callable[[], bool],
    ) -> None:
        self._app, self._metrics, self._log, self._seconds, self._public, self._draining = (
            app,
            metrics,
            log,
            seconds,
            public,
            draining,
        )
        self._token = f"Bearer {token}".encode() if token else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, sent = time.perf_counter(), _Sent(send, secrets.token_hex(6), self._draining)
        scope.setdefault("state", {})
        try:
            await self._answered(scope, receive, sent)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, sent.status, seconds)
            line = {
                "request": sent.request,
                "client": (scope.get("client") or ["unknown"])[0],
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": sent.status,
            }
            self._log(
                line
                | {
                    "seconds": round(seconds, 4),
                    "bytes": sent.bytes,
                    **scope["state"].get("notes", {}),
                }
            )

    async def _answered(self, scope: Scope, receive: Receive, sent: _Sent) -> None:
        try:
            if not self._may_enter(scope):
                raise RefusalError(
                    401, "this service wants a token; send the header 'Authorization: Bearer TOKEN'"
                )
            async with asyncio.timeout(self._seconds):
                await self._app(scope, receive, sent)
        except (RefusalError, TimeoutError) as error:
            if sent.status:
                raise
            await refused(error if isinstance(error, RefusalError) else self._late(scope))(
                scope, receive, sent
            )

    def _late(self, scope: Scope) -> RefusalError:
        if not Request(scope).headers.get("content-length", "0").strip("0") or scope["state"].get(
            "received"
        ):
            return busy(f"the answer was not ready after {self._seconds:g} seconds")
        return RefusalError(
            408,
            f"the request's body was not complete after {self._seconds:g} seconds; send it faster, or less at a time",
        )

    def _may_enter(self, scope: Scope) -> bool:
        if not self._token or scope["path"] in self._public:
            return True
        return hmac.compare_digest(dict(scope["headers"]).get(b"authorization", b""), self._token)


def refused(refusal: RefusalError) -> JSONResponse:
    """Return the answer to a refused request."""
    return JSONResponse({"error": refusal.sentence}, refusal.status, refusal.headers)


class _Sent:
    """Sends an answer with the headers that every one has, and remembers its status and size."""

    def __init__(self, send: Send, request: str, last: Callable[[], bool]) -> None:
        self.request, self.status, self.bytes = request, 0, 0
        self._send, self._last = send, last

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = {name for name, _ in message["headers"]}
            headers = (
                HEADERS
                | {"x-request-id": self.request}
                | ({"connection": "close"} if self._last() else {})
            )
            more = [(name.encode(), value.encode()) for name, value in headers.items()]
            message = {
                **message,
                "headers": [
                    *message["headers"],
                    *((name, value) for name, value in more if name not in given),
                ],
            }
        else:
            self.bytes += len(message.get("body", b""))
        await self._send(message)


def json_lines(write: Callable[[str], object]) -> RequestLog:
    """Return a log that writes one JSON object a line, each with its time."""

    def log(entry: dict[str, Any]) -> None:
        write(
            json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **entry}) + "\n"
        )

    return log
