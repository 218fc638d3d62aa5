"""Many clients at once, memory, graceful shutdown. ``USEG_SOAK=1`` takes more than an hour."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_inference import make_model
from served import SMALL, Site, encoded, labels, picture, served, tiny
from waiting import eventually

from useg.errors import MachineError, SettingsError
from useg.models.geometry import WorkingSize
from useg.models.segmenter import save_model
from useg.serving import run
from useg.serving.run import LogWriter, choose_token, listen
from useg.serving.shared_network import LoadPlan

SOAK = os.environ.get("USEG_SOAK") == "1"
SECONDS = 3600 if SOAK else 1
MIN_RESPONSES = 100
STOPS = 50 if SOAK else 1
SIZES = [(60, 40), (60, 40), (40, 60), (64, 48), (31, 17), (150, 150)]


@pytest.mark.parametrize("plan", [LoadPlan(4), LoadPlan(threads=2)])
def test_twenty_clients_some_of_which_disconnect_get_right_responses(
    plan: LoadPlan, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny()
    kinds = [
        (encoded(image), model(image))
        for image in (picture(*size, seed) for seed, size in enumerate(SIZES))
    ]
    ends, outcomes = time.monotonic() + SECONDS, Counter[str]()
    with served(model, replace(SMALL, waiting=30), plan=plan) as site:

        def client(seed: int) -> None:
            draw = random.Random(seed)
            while time.monotonic() < ends or outcomes["good 200"] <= MIN_RESPONSES:
                content, expected = draw.choice(kinds)
                match draw.randrange(6):
                    case 0:
                        outcomes[f"bad {site.ask('/predict', draw.randbytes(300)).status}"] += 1
                    case 1:
                        disconnect(site, content, draw)
                        outcomes["disconnected"] += 1
                    case _:
                        answer = site.ask("/predict", content, accept="image/png")
                        right = answer.status == 503 or (
                            answer.status == 200
                            and np.array_equal(labels(answer.content), expected)
                        )
                        outcomes[f"good {answer.status}" if right else "wrong"] += 1

        with ThreadPoolExecutor(20) as pool:
            list(pool.map(client, range(20)))
        network = site.service.network
        # Some were computed in one batch, or by a thread each.
        assert (network.counts.calls < network.counts.images) == (plan.threads == 1)
        assert bool(network._counts.images) == (plan.threads > 1)
        assert {entry["status"] for entry in site.log} <= {200, 400, 499, 503}
    assert set(outcomes) <= {"good 200", "good 503", "bad 400", "disconnected"}, outcomes
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


def disconnect(site: Site, content: bytes, draw: random.Random) -> None:
    """Disconnect at any moment: while sending, while waiting, while reading."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", site.port)) as connection:
        connection.putrequest("POST", "/predict?format=planes")
        connection.putheader("content-length", str(len(content)))
        connection.endheaders()
        connection.send(content[: draw.choice((0, 10, len(content)))])
        time.sleep(draw.choice((0, 0.001, 0.01)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("street") / "model.safetensors"
    save_model(make_model(working=WorkingSize((64, 48))), path)
    return path.parent


# A client that has connected may take long to send its request.
PATIENT = (
    "from useg.serving import run; run.LAST_REQUESTS_SECONDS = 2; from useg.cli import main; main()"
)


@contextlib.contextmanager
def process(model: Path, *options: str) -> Any:
    command = [sys.executable, "-c", PATIENT, "serve", str(model), "--port", "0"]
    command += ["--runtime", "torch", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            assert running.stdout
            first = running.stdout.readline()
            found = re.fullmatch(r"street\d* at http://127\.0\.0\.1:(\d+)\n", first)
            assert found, first
            yield running, int(found[1])
        finally:
            running.kill()


@pytest.mark.parametrize("stop", range(STOPS))
def test_a_graceful_shutdown_answers_every_accepted_request(model: Path, stop: int) -> None:
    outcomes, lost = Counter[int](), []
    with process(model) as (running, port):
        ended = threading.Event()

        def client(seed: int) -> None:
            content = encoded(picture(seed=seed))
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            while not ended.is_set():
                try:
                    if connection.sock is None:
                        connection.connect()
                except OSError:
                    # The port is closed.
                    return
                try:
                    connection.request("POST", "/predict", content, {"accept": "image/png"})
                    answer = connection.getresponse()
                    answer.read()
                    outcomes[answer.status] += 1
                    if seed % 2:
                        connection.close()
                except (OSError, http.client.HTTPException) as error:
                    lost.append(repr(error))
                    connection.close()

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        eventually(lambda: outcomes[200] > 10)
        time.sleep(0.1 * (stop % 10))
        running.send_signal(signal.SIGTERM)
        errors = running.stderr.read()
        assert running.wait(60) == 0
        ended.set()
        for thread in threads:
            thread.join()
    logged = Counter(json.loads(line)["status"] for line in errors.splitlines())
    assert lost == []
    assert set(outcomes) == {200}
    assert logged == outcomes


def test_a_signal_right_after_start_is_a_graceful_shutdown(model: Path) -> None:
    with process(model) as (running, port):
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        ) as connection:
            connection.request("POST", "/predict", encoded(picture()), {"accept": "image/png"})
            running.send_signal(signal.SIGTERM)
            assert connection.getresponse().status == 200
        assert running.wait(60) == 0


def test_quiet_writes_no_log_and_an_interrupt_is_a_graceful_shutdown(model: Path) -> None:
    with process(model, "--quiet") as (running, port):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
        connection.close()
        running.send_signal(signal.SIGINT)
        assert (running.stdout.read(), running.stderr.read(), running.wait(60)) == ("", "", 0)


def test_a_port_in_use_is_refused() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            MachineError,
            match=f"cannot listen on 127.0.0.1:{port} .*; choose another --host or --port",
        ):
            listen("127.0.0.1", port)


def test_a_log_that_nobody_reads_does_not_stop_the_service() -> None:
    reading, writing = os.pipe()
    writer = LogWriter(writing)
    began = time.monotonic()
    for k in range(30_000):
        writer.write(json.dumps({"line": k, "filler": 100 * "x"}) + "\n")
    writer.close(0.1)
    assert time.monotonic() - began < 30
    with ThreadPoolExecutor(1) as pool, open(reading) as log:
        lines = pool.submit(log.readlines)
        writer.close(60)
        # Whatever is written later could end up in another file with this number.
        assert not writer._thread.is_alive()
        os.close(writing)
        found = [json.loads(line) for line in lines.result(60)]
    numbers = [entry["line"] for entry in found if "line" in entry]
    assert numbers[:100] == list(range(100))
    assert len(numbers) < 30_000
    assert "log entries were dropped: the log is read too slowly" in str(found)


def test_a_full_disk_and_a_closed_pipe_do_not_stop_the_log() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    for descriptor in (writing, os.open("/dev/full", os.O_WRONLY)):
        writer = LogWriter(descriptor)
        for _ in range(10):
            writer.write("line\n")
        writer.close()
        assert not writer._thread.is_alive()
        os.close(descriptor)


def test_the_same_warning_is_logged_once() -> None:
    log: list[dict[str, Any]] = []
    handler = run._LogHandler(log.append)
    for k in range(1000):
        record = logging.LogRecord("uvicorn", logging.WARNING, "", 0, f"no {k % 2}", (), None)
        handler.emit(record)
    assert log == [{"level": "warning", "message": f"no {k}"} for k in range(2)]


def test_other_machines_need_a_token_unless_none_is_wanted() -> None:
    with listen("127.0.0.1", 0) as local, listen("0.0.0.0", 0) as public:
        port = public.getsockname()[1]
        assert choose_token(local, "", False) == ("", "")
        assert choose_token(local, "own", False) == ("own", "")
        assert choose_token(public, "own", False) == ("own", "")
        token, notice = choose_token(public, "", False)
        assert len(token) >= 32
        assert token != choose_token(public, "", False)[0]
        assert f"0.0.0.0:{port}, so clients must send the token {token} (generated" in notice
        assert choose_token(public, "", True) == (
            "",
            f"useg: warning: everybody who can reach 0.0.0.0:{port} can use this service; without "
            "--no-token, clients must send a token",
        )
        with pytest.raises(SettingsError, match="--no-token and a token are both given"):
            choose_token(public, "own", True)
