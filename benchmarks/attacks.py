"""Measure how long good clients wait for a service that is attacked in fourteen ways at once.

    python benchmarks/attacks.py [--network tiny] [--seconds 20] [--rounds 3] [--seed 0]
        [--pause 0.25]

Four good clients send small images to a service with its default limits, and compare each label map
with the first one. The service has the default network at 256x192, or a tiny one at 96x64, which
takes a millisecond, so that everything else decides.

In turns, the clients do that while nothing else happens ("quiet"), while one process of each kind
of attack works on another server, which only reads and refuses ("beside"), and while these
processes attack the service itself ("attacked"). Attackers and clients run on the same cores as the
service, but attackers get only what nobody else uses (on Linux; elsewhere they have the lowest
priority); "beside" tells what their own work costs.

Each attack begins at most once in ``--pause`` seconds, against either server. The highest memory of
the service is compared with what it promises: that of the model at rest, ``limits.memory`` of
``GET /model``, and 300 MB. The exit status is 1 if it takes more.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import io
import json
import multiprocessing
import os
import random
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from record import record

from useg.machine import describe_machine

CLIENTS = 4
CLIENT_PAUSE_SECONDS = 0.05
PROMISED_SPARE_BYTES = 300_000_000
FORM = "multipart/form-data; boundary=edge"
INFER = "/v2/models/model/infer"


NETWORKS = {
    "default": ({"encoder": "lite0", "depth": 5, "width": 16, "extra_conv": False}, (256, 192)),
    "tiny": ({"encoder": "plain", "depth": 4, "width": 4, "extra_conv": True}, (96, 64)),
}


def make_model(folder: Path, name: str) -> Path:
    """Save an untrained model with one of the ``NETWORKS``."""
    import torch

    from useg.classes import CARLA
    from useg.models.geometry import WorkingSize
    from useg.models.segmenter import Segmenter, save_model

    torch.manual_seed(0)
    network, frame = NETWORKS[name]
    network = network | {"padding": "same", "up_kernel": 2, "normalize": True}
    network |= {"skips": True, "dropout": 0.0, "channels": 3, "classes": 13}
    model = Segmenter(network, CARLA, [110.0] * 3, [60.0] * 3, WorkingSize(frame), "uint8", {})
    (folder / "model").mkdir()
    save_model(model.eval(), folder / "model" / "model.safetensors")
    return folder / "model"


def encoded(image: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    """Return an image file."""
    target = io.BytesIO()
    Image.fromarray(image).save(target, form, **options)
    return target.getvalue()


def flat(side: int) -> bytes:
    """Return a small file of a large image."""
    return encoded(np.full((side, side, 3), 9, np.uint8))


def form(*files: bytes) -> bytes:
    """Return a multipart body."""
    head = b'--edge\r\nContent-Disposition: form-data; name="f"; filename="a.png"\r\n\r\n'
    return b"".join(head + file + b"\r\n" for file in files) + b"--edge--\r\n"


def png_of_chunks(count: int) -> bytes:
    """Return a PNG of so many empty chunks."""

    def chunk(name: bytes, content: bytes = b"") -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(72))) + chunk(b"IEND")
    return b"\x89PNG\r\n\x1a\n" + head + count * chunk(b"prVt") + data


def tiff_of_planes(count: int) -> bytes:
    """Return a TIFF of one pixel whose OME description declares so many planes."""
    text = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        '<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="1" SizeY="1" SizeZ="1" '
        f'SizeC="1" SizeT="{count}"><TiffData IFD="0" PlaneCount="{count}"/></Pixels></Image></OME>'
    ).encode() + b"\0"
    entries = [(256, 4, 1, 1), (257, 4, 1, 1), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    at = 8 + 2 + 12 * 9 + 4
    entries += [
        (270, 2, len(text), at),
        (273, 4, 1, at + len(text)),
        (278, 4, 1, 1),
        (279, 4, 1, 1),
    ]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return (
        b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + bytes(4) + text + b"\7"
    )


class Attacker:
    """The attacks on the server at ``port``, by name."""

    def __init__(self, port: int, seed: int) -> None:
        self.port, self.draw = port, random.Random(seed)
        rng = np.random.default_rng(seed)
        million = flat(1000)
        noise = encoded(rng.integers(0, 256, (3000, 3000, 3), np.uint8), "JPEG", quality=30)
        lists = b'{"inputs":[{"name":"image","datatype":"UINT8","shape":[1,8,8,3],"data":['
        height, width = 2500, 4000
        size = height * width * 3
        tensor = {"name": "image", "datatype": "UINT8", "shape": [1, height, width, 3]}
        names = ("label_map", "probabilities")
        outputs = [{"name": name, "parameters": {"binary_data": True}} for name in names]
        inputs = [{**tensor, "parameters": {"binary_data_size": size}}]
        head = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
        self._million = million
        self.kinds: dict[str, Callable[[], object]] = {
            "a response that is not read": self.do_not_read,
            "a body without end": self.send_without_end,
            "200 connections": self.hoard,
            "a body that stops": self.stop_sending,
            "polygons of noise": lambda: self.ask("/predict?format=polygons", noise),
            "probabilities of 32 images": lambda: self.ask(
                "/predict/batch?format=probabilities", form(*[million] * 32), FORM
            ),
            "overlays of 32 images": lambda: self.ask(
                "/predict/batch?format=overlay", form(*[million] * 32), FORM
            ),
            "the largest image": lambda: self.ask("/predict", flat(5000)),
            "large probabilities": lambda: self.ask("/predict?format=probabilities", flat(2700)),
            "lists in JSON": lambda: self.ask(INFER, lists + b"[]," * 600_000 + b"0]}]}"),
            "a large tensor": lambda: self.ask(INFER, head + bytes(size), json_length=len(head)),
            "carriage returns": lambda: self.ask("/predict", form(b"\r" * 30_000_000), FORM),
            "chunks of a PNG": lambda: self.ask("/predict", png_of_chunks(2_600_000)),
            "planes of a TIFF": lambda: self.ask("/predict", tiff_of_planes(3_000_000)),
        }

    def run(self, kind: str, ends: float, pause: float) -> Counter[str]:
        """Attack until the time is over; returns what came of it."""
        outcomes: Counter[str] = Counter()
        while (began := time.monotonic()) < ends:
            try:
                outcomes[str(self.kinds[kind]())] += 1
            except (OSError, http.client.HTTPException) as error:
                outcomes[type(error).__name__] += 1
            time.sleep(max(0.0, began + pause - time.monotonic()))
        return outcomes

    def ask(self, path: str, body: bytes, kind: str = "image/png", json_length: int = 0) -> int:
        headers = {"content-type": kind}
        if json_length:
            headers["inference-header-content-length"] = str(json_length)
        address = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(address) as connection:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            answer.read()
            return answer.status

    def open(self, path: str, framing: str, body: bytes = b"") -> socket.socket:
        connection = socket.socket()
        connection.settimeout(10)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", self.port))
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection

    def do_not_read(self) -> None:
        size = len(self._million)
        path = "/predict?format=probabilities"
        with self.open(path, f"Content-Length: {size}", self._million):
            time.sleep(self.draw.choice((1, 15)))

    def send_without_end(self) -> None:
        with self.open("/nothing", "Transfer-Encoding: chunked") as connection:
            for _ in range(1000):
                connection.sendall(b"10000\r\n" + bytes(65_536) + b"\r\n")

    def hoard(self) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                size = self.draw.choice((10, 30_000_000))
                stack.enter_context(self.open("/predict", f"Content-Length: {size}", b"x"))
            time.sleep(3)

    def stop_sending(self) -> None:
        with self.open("/predict", "Content-Length: 30000000", bytes(29_000_000)):
            time.sleep(10)


@contextlib.contextmanager
def server(*command: str) -> Iterator[tuple[int, int]]:
    """Yield the port and the process id of a server that prints its port."""
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        found = re.search(r":(\d+)$", process.stdout.readline().strip())
        assert found
        try:
            yield int(found[1]), process.pid
        finally:
            process.terminate()


def refuse_all() -> None:
    """Run the other server: it reads bodies of up to 32 MB and refuses them."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            async with asyncio.timeout(25):
                head = await reader.readuntil(b"\r\n\r\n")
                found = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                left = min(int(found[1]) if found else 0, 32_000_000)
                while left > 0 and (part := await reader.read(65_536)):
                    left -= len(part)
                writer.write(b"HTTP/1.1 400 \r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                await writer.drain()
        writer.close()

    async def run() -> None:
        listening = await asyncio.start_server(respond, "127.0.0.1", 0)
        print(f":{listening.sockets[0].getsockname()[1]}", flush=True)
        await listening.serve_forever()

    asyncio.run(run())


def good_clients(port: int, seconds: float, seed: int) -> dict[str, Any]:
    """Let the good clients work; returns their waiting times and outcomes."""
    rng = np.random.default_rng(seed)
    image = encoded(rng.integers(0, 256, (64, 96, 3), np.uint8))
    took: list[float] = []
    outcomes: Counter[str] = Counter()
    expected: list[tuple[int, bytes]] = []
    ends = time.monotonic() + seconds

    def ask() -> tuple[int, bytes]:
        address = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(address) as connection:
            connection.request("POST", "/predict?format=labels", image)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def work() -> None:
        while time.monotonic() < ends:
            began = time.perf_counter()
            answer = ask()
            took.append(time.perf_counter() - began)
            right = answer == expected[0] and answer[0] == 200
            outcomes["right" if right else f"wrong, status {answer[0]}"] += 1
            time.sleep(CLIENT_PAUSE_SECONDS)

    expected.append(ask())
    clients = [threading.Thread(target=work) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return {
        "answers": dict(outcomes),
        "median_ms": 1000 * float(np.median(took)),
        "p99_ms": 1000 * float(np.quantile(took, 0.99)),
        "max_ms": 1000 * max(took),
    }


def _attack(port: int, kind: str, seed: int, ends: float, pause: float) -> None:
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(19)
    outcomes = Attacker(port, seed).run(kind, ends, pause)
    print(f"    {kind}: {dict(outcomes)}", flush=True)


def _work_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _memory_limit(port: int) -> int:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as client:
        client.request("GET", "/model")
        return int(json.loads(client.getresponse().read())["limits"]["memory"])


def measure(
    port: int, pid: int, attacked: int | None, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure the good clients of the service at ``port`` while a server is attacked, if any."""
    fork = multiprocessing.get_context("fork")
    ends = time.monotonic() + options.seconds + 3
    attackers = [
        fork.Process(target=_attack, args=(attacked, kind, options.seed, ends, options.pause))
        for kind in (Attacker(attacked, options.seed).kinds if attacked else ())
    ]
    for attacker in attackers:
        attacker.start()
    time.sleep(2)
    worked = _work_seconds(pid)
    found = good_clients(port, options.seconds, options.seed)
    found["service_work_seconds"] = _work_seconds(pid) - worked
    found["load"] = os.getloadavg()[0]
    for attacker in attackers:
        attacker.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="default")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.25)
    parser.add_argument("--refuse", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.refuse:
        refuse_all()
        return
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_model(Path(folder), options.network))
        command = ("-m", "useg", "serve", model, "--port", "0", "--quiet")
        with server(*command) as (port, pid), server(__file__, "--refuse") as (other, _):
            good_clients(port, 2, options.seed)
            at_rest = _peak_bytes(pid)
            most = at_rest + _memory_limit(port) + PROMISED_SPARE_BYTES
            for _ in range(options.rounds):
                found = {
                    name: measure(port, pid, target, options)
                    for name, target in (("quiet", None), ("beside", other), ("attacked", port))
                }
                print(json.dumps(found), flush=True)
                rounds.append(found)
            peak = _peak_bytes(pid)
    medians = {
        name: {
            key: statistics.median(each[name][key] for each in rounds)
            for key in ("median_ms", "p99_ms", "max_ms", "service_work_seconds")
        }
        for name in rounds[0]
    }
    content = {
        "machine": describe_machine(),
        "network": options.network,
        "seed": options.seed,
        "seconds": options.seconds,
        "pause": options.pause,
        "clients": CLIENTS,
        "attacks": list(Attacker(0, 0).kinds),
        **medians,
        "p99_attacked_by_quiet": medians["attacked"]["p99_ms"] / medians["quiet"]["p99_ms"],
        "p99_attacked_by_beside": medians["attacked"]["p99_ms"] / medians["beside"]["p99_ms"],
        "at_rest_bytes": at_rest,
        "peak_bytes": peak,
        "promised_bytes": most,
        "rounds": rounds,
    }
    print(record("attacks" if options.network == "default" else "attacks_tiny", content))
    if peak > most:
        sys.exit(f"the service took {peak:,} bytes, more than the promised {most:,}")


if __name__ == "__main__":
    main()
