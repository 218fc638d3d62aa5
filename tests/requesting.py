"""Send plain HTTP requests to a server of a test, each on its own connection."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Reply:
    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


def request(
    port: int, path: str, body: Any, method: str | None, headers: Mapping[str, str]
) -> Reply:
    """Send one request: GET or, with a body, POST, unless told otherwise.

    Underscores in header names mean hyphens.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method or ("GET" if body is None else "POST"), path, body, named)
    answer = connection.getresponse()
    reply = Reply(
        answer.status,
        {name.lower(): value for name, value in answer.getheaders()},
        answer.read(),
    )
    connection.close()
    return reply
