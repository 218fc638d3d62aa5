"""The memory of the service, measured in a process of its own; each measure has a control.

``USEG_SOAK=1`` mixes good and hostile clients for an hour.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from served import encoded, form, picture

SOAK = os.environ.get("USEG_SOAK") == "1"
SECONDS = float(os.environ.get("USEG_SOAK_SECONDS", 3600))
REQUESTS = 5_000 if SOAK else 150
# A leak of 60 kB a request is three times as much.
MAX_GROWTH_BYTES = 20_000
MAX_BOMB_BYTES = 100_000_000


class Child:
    """The service of serving_child.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        self.process, self.port = process, int(process.stdout.readline())

    def tell(self, command: str) -> int:
        """Send a command; returns the resident bytes after it."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def ask(self, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=100)
        ) as connection:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request("POST", path, body, named)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def peak(self) -> int:
        """The highest resident bytes since :meth:`forget_peak`."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    if sys.platform != "linux":
        pytest.skip("this system does not report the memory of a process")
    command = [sys.executable, Path(__file__).parent.parent / "serving_child.py"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Child(process)
        finally:
            process.kill()


def growth(child: Child) -> float:
    """How many bytes each of many requests leaves behind."""
    image = encoded(picture())
    body, kind = form(image, image)

    def send(count: int) -> int:
        for k in range(count):
            if k % 4:
                path = ("/predict", "/predict?format=planes", "/predict?format=polygons")[k % 3]
                assert child.ask(path, image)[0] == 200
            else:
                assert child.ask("/predict/batch", body, content_type=kind)[0] == 200
        return child.tell("memory")

    first = send(60)
    return (send(REQUESTS) - first) / REQUESTS


def test_requests_leave_no_memory_behind_and_a_leak_is_seen(child: Child) -> None:
    assert growth(child) < MAX_GROWTH_BYTES
    child.tell("plant leak")
    assert growth(child) > MAX_GROWTH_BYTES
    child.tell("mend")


def bomb(side: int) -> bytes:
    """A small PNG that declares so many rows and columns."""
    content = bytearray(encoded(picture(8, 8)))
    struct.pack_into(">II", content, 16, side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def test_declared_sizes_are_not_believed_and_one_that_is_would_be_seen(child: Child) -> None:
    def cost() -> int:
        before = child.tell("memory")
        child.forget_peak()
        for side, status in ((20_000, 413), (1000, 400)):
            assert child.ask("/predict", bomb(side))[0] == status
        return child.peak() - before

    assert cost() < MAX_BOMB_BYTES
    child.tell("plant waste")
    assert cost() > MAX_BOMB_BYTES
    child.tell("mend")


def test_hostile_clients_neither_fill_the_memory_nor_keep_good_ones_waiting(child: Child) -> None:
    """In the suite for some seconds; in the soak for an hour, with memory sampled."""
    image = encoded(picture())
    expected = child.ask("/predict?format=labels", image)
    assert expected[0] == 200
    ends = time.monotonic() + (SECONDS if SOAK else 3)
    outcomes, seconds, samples = Counter[str](), list[float](), list[int]()

    def good(seed: int) -> None:
        while time.monotonic() < ends:
            began = time.perf_counter()
            answer = child.ask("/predict?format=labels", image)
            seconds.append(time.perf_counter() - began)
            outcomes["right" if answer == expected else f"wrong {answer[0]}"] += 1
            time.sleep(0.02)

    def hostile(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < ends:
            with contextlib.suppress(OSError, http.client.HTTPException):
                draw.choice(HOSTILE)(child, draw)
            time.sleep(0.02)

    def sample() -> None:
        while time.monotonic() < ends:
            time.sleep(10 if SOAK else 1)
            statm = Path(f"/proc/{child.process.pid}/statm").read_text()
            samples.append(int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    before = child.tell("memory")
    child.forget_peak()
    with ThreadPoolExecutor(9) as pool:
        running = [pool.submit(good, k) for k in range(4)]
        running += [pool.submit(hostile, k) for k in range(4)]
        running.append(pool.submit(sample))
        for each in running:
            each.result()
    print(outcomes, f"p99 {np.quantile(seconds, 0.99):.3f} s", before, child.peak(), samples[::30])
    assert set(outcomes) == {"right"}, outcomes
    # Far below what the limits allow together.
    assert child.peak() - before < 300_000_000
    if SOAK:
        half = len(samples) // 2
        assert np.median(samples[half:]) - np.median(samples[half // 2 : half]) < 20_000_000


def send_bomb(child: Child, draw: random.Random) -> None:
    child.ask("/predict", bomb(draw.choice((999, 1000, 20_000, 2**31 - 1))))


def send_noise(child: Child, draw: random.Random) -> None:
    content = encoded(np.frombuffer(draw.randbytes(300 * 300 * 3), np.uint8).reshape(300, 300, 3))
    child.ask("/predict?format=" + draw.choice(("polygons", "probabilities", "overlay")), content)


def send_form(child: Child, draw: random.Random) -> None:
    unit = draw.choice((b"\r", b"\r\n--edg", b"\r\n--edge\r\n"))
    body, kind = form(unit * (1_500_000 // len(unit)))
    child.ask("/predict/batch", body, content_type=kind)


def send_json(child: Child, draw: random.Random) -> None:
    unit = draw.choice((b"[],", b'"",', b"{},", b"1,", b"["))
    body = b'{"inputs":[{"name":"image","data":[' + unit * (1_900_000 // len(unit))
    child.ask("/v2/models/street/infer", body)


def do_not_read(child: Child, draw: random.Random) -> None:
    image = encoded(picture(600, 400))
    head = "POST /predict?format=probabilities HTTP/1.1\r\nHost: localhost\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", child.port))
        connection.sendall(f"{head}Content-Length: {len(image)}\r\n\r\n".encode() + image)
        time.sleep(draw.choice((0, 0.1, 1)))


def do_not_send(child: Child, draw: random.Random) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            address = ("127.0.0.1", child.port)
            connection = stack.enter_context(socket.create_connection(address, 5))
            connection.sendall(
                b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\n\r\nx"
            )
        time.sleep(draw.choice((0, 0.3)))


def send_without_end(child: Child, draw: random.Random) -> None:
    path = draw.choice(("/predict", "/nothing", "/healthz"))
    with socket.create_connection(("127.0.0.1", child.port), 5) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        for _ in range(100):
            connection.sendall(b"10000\r\n" + bytes(65_536) + b"\r\n")


HOSTILE = (
    *(send_bomb, send_noise, send_form, send_json, do_not_read, do_not_send, send_without_end),
)
