"""Damaged, huge, slow and malformed requests get an error and never break the service.

``USEG_SOAK=1`` sends 100,000 of each kind.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import random
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from requesting import Reply
from served import SMALL, Site, Slow, encoded, form, picture, served
from waiting import eventually

from useg.errors import SettingsError
from useg.serving import connections
from useg.serving.middleware import Limits, Metrics, make_limits
from useg.serving.shared_network import LoadPlan

SOAK = os.environ.get("USEG_SOAK") == "1"
REQUESTS = 100_000 if SOAK else 1_000
HOSTILE_REQUESTS = 100_000 if SOAK else 400
ALLOWED_STATUSES = {200, 400, 404, 405, 406, 413, 415, 422, 503}


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with served(limits=replace(SMALL, upload_bytes=1_500_000, seconds=60)) as running:
        yield running
        # A client has its response a moment before its request ends.
        eventually(lambda: running.service.uploads.buffered_bytes == 0)
        assert running.service.uploads.response_bytes == 0
        eventually(lambda: not running.service.is_working)
        assert running.service.queue.waiting == running.service.large_queue.waiting == 0


def still_serves(site: Site) -> bool:
    return site.ask("/predict", encoded(picture()), accept="image/png").status == 200


def valid_uploads() -> list[bytes]:
    image = picture(40, 30)
    pages = io.BytesIO()
    first, *others = [Image.fromarray(picture(20, 20, k)) for k in range(3)]
    first.save(pages, "TIFF", save_all=True, append_images=others, compression="tiff_lzw")
    files = [encoded(image, kind) for kind in ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")]
    return [
        *files,
        encoded(image[..., 0]),
        encoded(np.zeros((9, 9), np.uint16)),
        pages.getvalue(),
        form(files[0], files[1])[0],
    ]


def damaged(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((0, 1, 1, 2, 8))):
        at = draw.randrange(len(changed) + 1)
        match draw.randrange(4):
            case 0:
                changed[at : at + 1] = draw.randbytes(1)
            case 1:
                del changed[at : at + draw.randrange(1, 40)]
            case 2:
                changed[at:at] = draw.randbytes(draw.randrange(1, 40))
            case 3:
                changed[at : at + 4] = draw.choice(
                    (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\xff\xff")
                )
        changed = changed or bytearray(b"x")
    return bytes(changed)


def test_damaged_uploads_are_refused(site: Site) -> None:
    uploads, start = valid_uploads(), len(site.log)

    def send(seed: int) -> Reply:
        draw = random.Random(seed)
        headers = draw.choice(
            (
                {},
                {"accept": "image/png"},
                {"content-type": form()[1]},
                {"content-type": "image/png"},
                {"accept": "*/*;q=x,,;"},
            )
        )
        path = draw.choice(
            (
                "/predict",
                "/predict",
                "/predict?format=planes",
                "/predict?format=polygons",
                "/predict/batch",
                "/v2/models/street/infer",
            )
        )
        return site.ask(path, damaged(draw.choice(uploads), draw), **headers)

    with ThreadPoolExecutor(4) as clients:
        statuses = Counter(answer.status for answer in clients.map(send, range(REQUESTS)))
    assert set(statuses) <= ALLOWED_STATUSES, statuses
    assert statuses[200] > REQUESTS / 20
    assert statuses[400] > REQUESTS / 4
    assert {entry["level"] for entry in site.log[start:] if "level" in entry} == set()
    assert still_serves(site)


METHODS = (b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"TRACE", b"G\xffT", b"")
PATHS = (
    *(b"/predict", b"/predict?format=%ff", b"/predict/batch?format=planes", b"/", b"/model"),
    *(b"/v2/models/street/infer", b"/v2/models/%00%ed%a0%80/infer", b"/../../etc/passwd", b"//"),
    *(b"*", b"http://evil.example/model", b"/" + 3000 * b"%41", b"/healthz?" + 500 * b"a=b&"),
)
HEADERS = (
    *(b"accept", b"content-type", b"content-length", b"transfer-encoding", b"expect", b"upgrade"),
    *(b"connection", b"host", b"origin", b"sec-fetch-site", b"inference-header-content-length"),
    *(b"content-encoding", b"accept-encoding", b"authorization", b"x y", b"", b"\xff"),
)
VALUES = (
    *(b"multipart/form-data; boundary=edge", b"image/png", b"gzip", b"chunked", b"100-continue"),
    *(b"keep-alive, upgrade", b"websocket", b"evil.example", b"null", b"cross-site", b"-1", b"0"),
    *(5000 * b"9", b"\xff\xfe", b"a\0b", b"*/*;q=9e999", b"", b" ", 400 * b"a,b;"),
)


def hostile_request(draw: random.Random, uploads: list[bytes]) -> bytes:
    """A request whose line, headers, framing and body are more or less wrong."""
    body = damaged(draw.choice(uploads), draw)[: draw.choice((50, 100_000))]
    lines = [draw.choice(METHODS) + b" " + draw.choice(PATHS) + b" HTTP/1.1", b"Host: localhost"]
    lines += [
        draw.choice(HEADERS) + b": " + draw.choice(VALUES)
        for _ in range(draw.choice((0, 0, 1, 1, 2, 5, 200)))
    ]
    match draw.randrange(4):
        case 0:
            lines.append(b"Content-Length: %d" % (len(body) + draw.choice((0, 0, 0, -1, 1, 10**9))))
        case 1:
            lines.append(b"Transfer-Encoding: chunked")
            size = draw.choice((b"%x" % len(body), b"0", b"-1", b"ffffffffffffffff", b"zz"))
            body = size + b"\r\n" + body + draw.choice((b"\r\n0\r\n\r\n", b"", b"\r\n0\r\n"))
        case 2:
            lines.append(b"Content-Length: %d\r\nConnection: close" % len(body))
    newline = draw.choice((b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r"))
    return newline.join([*lines, b"", body])


def test_hostile_requests_on_varied_connections_break_nothing(site: Site) -> None:
    uploads, start, first_lines = valid_uploads(), len(site.log), Counter[bytes]()

    def send(seed: int) -> None:
        draw = random.Random(seed)
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", site.port), timeout=60) as connection,
        ):
            for _ in range(draw.choice((1, 1, 1, 3))):
                content = hostile_request(draw, uploads)
                cut = draw.choice((len(content), len(content), draw.randrange(len(content))))
                connection.sendall(content[:cut])
            if draw.randrange(4):
                connection.settimeout(draw.choice((0.02, 0.2)))
                first_lines[connection.recv(65_536)[:12]] += 1

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(send, range(HOSTILE_REQUESTS)))
    statuses = {int(line.split()[1]) for line in first_lines if line.startswith(b"HTTP/1.1 ")}
    assert {200, 400, 404} <= statuses <= ALLOWED_STATUSES | {100, 401, 403, 408, 421}
    assert not [entry for entry in site.log[start:] if "traceback" in entry]
    assert {entry["status"] for entry in site.log[start:] if "status" in entry} <= (
        ALLOWED_STATUSES | {401, 403, 408, 421, 499}
    )
    eventually(lambda: site.service.uploads.buffered_bytes == 0)
    assert still_serves(site)


def bomb(kind: str) -> bytes:
    """A small file that declares 20,000 x 20,000 pixels."""
    content = bytearray(encoded(picture(8, 8), kind))
    wide = {"PNG": ">II", "BMP": "<ii", "GIF": "<HH", "JPEG": ">HH"}.get(kind, "<H")
    if kind == "TIFF":
        # The entries of width and height in its directory.
        (start,) = struct.unpack_from("<I", content, 4)
        for entry in range(start + 2, start + 26, 12):
            struct.pack_into(wide, content, entry + 8, 20_000)
        return bytes(content)
    at = {"PNG": 16, "BMP": 18, "GIF": 6, "JPEG": content.find(b"\xff\xc0") + 5}[kind]
    struct.pack_into(wide, content, at, 20_000, 20_000)
    if kind == "PNG":
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "JPEG", "TIFF"])
def test_decompression_bombs_are_refused(site: Site, kind: str) -> None:
    answer = site.ask("/predict", bomb(kind))
    assert (answer.status, answer.json["error"]) == (
        413,
        "the image has 20000x20000 pixels, more than the allowed 40,000; send a smaller one",
    )


def raw(site: Site, *pieces: bytes, wait: float = 0.0) -> bytes:
    """Send pieces with pauses, and return all that comes back until the connection ends."""
    with socket.create_connection(("127.0.0.1", site.port), timeout=60) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(wait)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
        return answer


HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"


def test_a_declared_gigabyte_is_refused_before_it_is_sent(site: Site) -> None:
    answer = raw(site, HEAD + b"Content-Length: 1000000000\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"the body has more than the allowed 1,500,000 bytes" in answer


def test_expect_100_continue_is_refused_without_reading_the_body(site: Site) -> None:
    answer = raw(site, HEAD + b"Expect: 100-continue\r\nContent-Length: 1000000000\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_chunked_image_is_accepted(site: Site) -> None:
    content = encoded(picture())
    answer = site.ask("/predict", iter([content[:100], content[100:]]))
    assert answer.status == 200


@pytest.mark.parametrize("pieces", [10_000 * [b""], [b"x" * 100_000]])
def test_forms_with_too_many_or_too_long_fields_are_refused(
    site: Site, pieces: list[bytes]
) -> None:
    parts = b"".join(
        b'--edge\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + piece + b"\r\n"
        for piece in pieces
    )
    answer = site.ask("/predict", parts + b"--edge--\r\n", content_type=form()[1])
    reason = "it has more than 4 files" if len(pieces) > 1 else "a field has more than 1000 bytes"
    assert answer.status == 400
    assert answer.json["error"].startswith(f"the form cannot be read ({reason}")


@pytest.mark.parametrize(
    "head",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        bytes(1000),
    ],
)
def test_malformed_http_is_refused(site: Site, head: bytes) -> None:
    with socket.create_connection(("127.0.0.1", site.port), timeout=60) as connection:
        connection.sendall(head)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(65536)
    assert not answer.startswith(b"HTTP/1.1 2")
    assert not answer.startswith(b"HTTP/1.1 5")
    assert still_serves(site)


def test_slow_clients_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(limits=replace(SMALL, seconds=1)) as site:
        with monkeypatch.context() as patch:
            patch.setattr(connections, "REQUEST_HEAD_SECONDS", 0.3)
            # A request head that never ends.
            assert raw(site, b"GET /heal") == b""
        # The client may be slow to send the last pieces.
        monkeypatch.setattr(connections, "LINGER_SECONDS", 60.0)
        answer = raw(
            site, HEAD + b"Content-Length: 1000\r\n\r\n", *(b"x" for _ in range(8)), wait=0.1
        )
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert (
            b"the body was not complete after 1 seconds; send it faster, or less at a time"
            in answer
        )
        eventually(lambda: site.service.uploads.buffered_bytes == 0)
        assert still_serves(site)


def test_a_client_that_disconnects_while_sending_leaves_nothing_behind(site: Site) -> None:
    for cut in (10, 60, 200):
        with socket.create_connection(("127.0.0.1", site.port)) as connection:
            connection.sendall((HEAD + b"Content-Length: 1000\r\n\r\n" + bytes(100))[:cut])
    assert still_serves(site)
    eventually(lambda: site.service.uploads.buffered_bytes == 0)


def post(site: Site, answers: list[Reply]) -> threading.Thread:
    thread = threading.Thread(
        target=lambda: answers.append(site.ask("/predict", encoded(picture())))
    )
    thread.start()
    return thread


def test_a_client_that_disconnects_while_waiting_leaves_the_queue() -> None:
    slow = Slow()
    with served(slow.predictor, SMALL, plan=LoadPlan()) as site:
        answers: list[Reply] = []
        # One for each thread of the queue.
        threads = [post(site, answers) for _ in range(3)]
        eventually(lambda: site.service.queue.running == 3)
        connection = http.client.HTTPConnection("127.0.0.1", site.port)
        connection.request("POST", "/predict", encoded(picture()))
        eventually(lambda: site.service.queue.waiting == 1)
        connection.close()
        eventually(lambda: site.service.queue.waiting == 0)
        eventually(lambda: site.log)
        slow.may_run.set()
        for thread in threads:
            thread.join()
        assert [answer.status for answer in answers] == [200, 200, 200]
        assert slow.calls == 3
        assert site.log[0]["status"] == 499


def test_a_full_queue_is_refused_at_once() -> None:
    slow = Slow()
    with served(slow.predictor, plan=LoadPlan()) as site:
        answers: list[Reply] = []
        # Three run, three wait.
        threads = [post(site, answers) for _ in range(6)]
        eventually(lambda: site.service.queue.waiting == 3)
        refused = [
            site.ask("/predict", encoded(picture())),
            site.ask("/readyz"),
            site.ask("/predict/batch", form(b"x")[0], content_type=form()[1]),
        ]
        for answer in refused:
            assert (answer.status, answer.headers["retry-after"]) == (503, "2")
            assert answer.json == {
                "error": "the request queue is full (3 images wait); try again in 2 seconds"
            }
        slow.may_run.set()
        for thread in threads:
            thread.join()
        assert {answer.status for answer in answers} == {200}


def test_a_late_response_is_refused_at_the_deadline() -> None:
    slow = Slow()
    with served(slow.predictor, replace(SMALL, seconds=3), plan=LoadPlan()) as site:
        answer = site.ask("/predict", encoded(picture()))
        assert (answer.status, answer.json["error"]) == (
            503,
            "no response was ready after 3 seconds; try again in 2 seconds",
        )
        slow.may_run.set()
        eventually(lambda: site.service.queue.running == 0)
        assert still_serves(site)


def test_uploads_in_memory_are_bounded() -> None:
    with served(limits=replace(SMALL, upload_bytes=10_000)) as site:
        connections = [socket.create_connection(("127.0.0.1", site.port)) for _ in range(8)]
        for connection in connections:
            connection.sendall(HEAD + b"Content-Length: 10000\r\n\r\n" + bytes(9_990))
        eventually(lambda: site.service.uploads.buffered_bytes == 8 * 9_990)
        answer = site.ask("/predict", bytes(9_000))
        assert (answer.status, answer.json["error"]) == (
            503,
            "too many uploads are in memory; try again in 2 seconds",
        )
        for connection in connections:
            connection.close()
        eventually(lambda: site.service.uploads.buffered_bytes == 0)
        assert still_serves(site)


def test_running_out_of_memory_is_a_503(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("useg.serving.responses.predict_upload", full)
    answer = site.ask("/predict", encoded(picture()))
    assert (answer.status, answer.json) == (
        503,
        {"error": "there is currently not enough memory for this image; try again in 2 seconds"},
    )


def test_histogram_buckets_are_cumulative() -> None:
    metrics = Metrics()
    for seconds in (0.01, 0.02, 99):
        metrics.observe("/predict", 200, seconds)
    lines = metrics.text({"x_total": ("What.", 3)}).splitlines()
    for line in (
        'useg_request_seconds_bucket{route="/predict",le="0.01"} 1',
        'useg_request_seconds_bucket{route="/predict",le="30.0"} 2',
        'useg_request_seconds_bucket{route="/predict",le="+Inf"} 3',
        'useg_request_seconds_sum{route="/predict"} 99.030000',
        "# TYPE x_total counter",
        "x_total 3",
    ):
        assert line in lines


def test_a_limit_of_0_is_refused() -> None:
    with pytest.raises(
        SettingsError,
        match="the limit 'waiting' is 0, but it must be a finite number above 0",
    ):
        Limits(waiting=0)


OWN = {"host": "localhost:8000"}


@pytest.fixture(scope="module")
def named() -> Iterator[Site]:
    with served(hosts=("Known.example",)) as running:
        yield running


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("street.localhost:80", 200),
        ("127.0.0.1:8000", 200),
        ("192.168.7.8", 200),
        ("[::1]:8000", 200),
        ("known.example", 200),
        ("Known.Example.:443", 200),
        ("evil.example:8000", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost@evil.example", 421),
        ("[::1].evil.example", 421),
        ("localhost:80.evil.example", 421),
        ("2130706433", 421),
        ("[::1", 421),
        ("", 421),
        (" ", 421),
        ("\u00e9", 421),
    ],
)
def test_a_service_without_a_token_has_the_names_that_it_was_given(
    named: Site, host: str, status: int
) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", named.port)) as connection:
        connection.putrequest("GET", "/model", skip_host=True)
        connection.putheader("Host", host.encode("latin-1"))
        connection.endheaders()
        answer = connection.getresponse()
        content = answer.read()
    assert answer.status == status
    if status == 421:
        assert b"this service does not accept the host name" in content
        assert b"classes" not in content


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/predict", {}, 200),
        ("/predict", OWN | {"sec-fetch-site": "same-origin", "origin": "https://any"}, 200),
        ("/predict", {"sec-fetch-site": "none"}, 200),
        ("/predict", OWN | {"origin": "http://localhost:8000"}, 200),
        ("/predict", OWN | {"origin": "https://known.example"}, 200),
        ("/predict", {"sec-fetch-site": "cross-site"}, 403),
        ("/predict", {"sec-fetch-site": "same-site"}, 403),
        ("/predict", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 403),
        ("/predict", OWN | {"origin": "http://localhost:3000"}, 403),
        ("/predict", {"origin": "http://evil.example"}, 403),
        ("/predict", {"origin": "null"}, 403),
        # Sent twice: each of them counts.
        ("/predict", {"sec-fetch-site": "none", "Sec-Fetch-Site": "cross-site"}, 403),
        ("/predict", {"origin": "https://known.example", "Origin": "http://evil.example"}, 403),
        ("/predict", {"origin": "http://[evil"}, 403),
        ("/model", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        # A link on another page.
        ("/", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
        ("/healthz", OWN | {"host": "evil.example", "sec-fetch-site": "cross-site"}, 200),
    ],
)
def test_a_page_of_another_site_is_refused(
    named: Site, path: str, headers: dict[str, str], status: int
) -> None:
    body = encoded(picture()) if path == "/predict" else None
    answer = named.ask(path, body, **headers)
    assert answer.status == status
    assert not [name for name in answer.headers if name.startswith("access-control")]
    if status == 403:
        assert answer.json["error"].startswith("the request comes from a page of another site;")


def test_with_a_token_a_service_has_any_name_but_no_page_of_another_site() -> None:
    with served(token="secret") as site:
        good = {"authorization": "Bearer secret", "host": "any.example"}
        assert site.ask("/model", **good).status == 200
        assert site.ask("/model", host="any.example").status == 401
        assert site.ask("/model", **good, origin="http://evil.example").status == 403
        assert site.ask("/model", authorization="Bearer secre\u00e9").status == 401
        assert site.ask("/model", authorization="Bearer " + "x" * 9000).status == 401


def test_hostile_headers_never_cause_an_internal_error(site: Site) -> None:
    """Values that lead astray, in every header that the service reads."""
    names = (
        *("accept", "accept-encoding", "content-type", "content-encoding", "authorization"),
        *("origin", "sec-fetch-site", "inference-header-content-length", "host", "connection"),
    )
    values = (
        *("9" * 5000, "\u00b2", "\x7f", ",;=" * 900, '"' * 999, "*/*;q=" + "9" * 5000, "a/b;q=nan"),
        *("multipart/form-data; boundary=a; charset=idna", "multipart/form-data; boundary"),
        *("multipart/form-data;" + "a=b;" * 999, "Bearer \u00ff", "gzip, br;q=inf", "-1", ""),
    )
    start = len(site.log)
    for path in ("/predict", "/predict/batch", "/v2/models/street/infer"):
        for name in names:
            for value in values:
                answer = site.ask(path, b"--a\r\n\r\n", **{name: value.encode("latin-1")})
                assert answer.status in ALLOWED_STATUSES | {401, 403, 421}, (name, value)
                assert len(answer.content) < 2000
    assert not [entry for entry in site.log[start:] if "traceback" in entry]


def test_an_error_with_half_a_character_is_sent(site: Site) -> None:
    name = b"\\ud800" + b"x" * 5000
    body = b'{"inputs": [{"name": "' + name + b'", "datatype": "UINT8", "shape": [1]}]}'
    answer = site.ask("/v2/models/street/infer", body)
    assert answer.status == 400
    assert "\\ud800" in answer.json["error"]
    assert len(answer.content) < 2000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_limit_that_is_no_number_is_refused(value: float) -> None:
    for name in ("upload", "pixels", "seconds", "memory"):
        given = {"upload": 1, "pixels": 1, "waiting": 1, "seconds": 1, "memory": 1} | {name: value}
        with pytest.raises(SettingsError, match="must be a finite number above 0"):
            make_limits(**given)
