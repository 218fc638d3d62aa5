"""What holds for every request, around the routes: safe headers, the token, the deadline, one line of log, the counts."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from useg.serving.limits import RefusalError, busy
from useg.serving.metrics import Metrics

OPEN = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")  # besides the page's files: what needs no token
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

Log = Callable[[dict[str, Any]], None]


class FrontDoor:
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
        self, app: ASGIApp, metrics: Metrics, log: Log, seconds: float, token: str, public: frozenset[str], draining: Callable[[], bool]
    ) -> None:
        self._app, self._metrics, self._log, self._seconds, self._public, self._draining = app, metrics, log, seconds, public, draining
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
            self._log(line | {"seconds": round(seconds, 4), "bytes": sent.bytes, **scope["state"].get("notes", {})})

    async def _answered(self, scope: Scope, receive: Receive, sent: _Sent) -> None:
        try:
            if not self._may_enter(scope):
                raise RefusalError(401, "this service wants a token; send the header 'Authorization: Bearer TOKEN'")
            async with asyncio.timeout(self._seconds):
                await self._app(scope, receive, sent)
        except (RefusalError, TimeoutError) as error:
            if sent.status:
                raise
            await refused(error if isinstance(error, RefusalError) else self._late(scope))(scope, receive, sent)

    def _late(self, scope: Scope) -> RefusalError:
        if not Request(scope).headers.get("content-length", "0").strip("0") or scope["state"].get("received"):
            return busy(f"the answer was not ready after {self._seconds:g} seconds")
        return RefusalError(408, f"the request's body was not complete after {self._seconds:g} seconds; send it faster, or less at a time")

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
            headers = HEADERS | {"x-request-id": self.request} | ({"connection": "close"} if self._last() else {})
            more = [(name.encode(), value.encode()) for name, value in headers.items()]
            message = {**message, "headers": [*message["headers"], *((name, value) for name, value in more if name not in given)]}
        else:
            self.bytes += len(message.get("body", b""))
        await self._send(message)


def json_lines(write: Callable[[str], object]) -> Log:
    """Return a log that writes one JSON object a line, each with its time."""

    def log(entry: dict[str, Any]) -> None:
        write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **entry}) + "\n")

    return log
