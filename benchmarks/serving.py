"""Measure what a service costs and gains: throughput, the gain from batching, and latency.

    python benchmarks/serving.py MODEL PICTURES [--runtime NAME] [--clients 16] [--seconds 20]
        [--rounds 3]

Run it on a machine that does nothing else. PICTURES is a folder; every client sends its files
repeatedly and receives label maps. The reference is the same work in one process, in the threads of
``useg predict``: decode the file, predict, encode the label map. The runtime is by default the one
that ``useg serve`` chooses. Results are medians of the rounds, in which the variants take turns.
The service runs in a process of its own, first with the batch size that it chooses, then with one
image at a time. The clients run on the same cores.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from record import record

from useg.images.files import decode_image, encode_label
from useg.inference.files import find_images
from useg.inference.predictor import Predictor
from useg.machine import describe_machine, in_parallel


@contextlib.contextmanager
def service(model: Path, runtime: str, batch: int | None) -> Iterator[tuple[int, int]]:
    """Yield the port of a service and its batch size."""
    command = [
        sys.executable,
        __file__,
        str(model),
        "-",
        "--serve",
        *(["--batch", str(batch)] if batch else []),
        *("--runtime", runtime),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        found = re.search(r"port (\d+) batch (\d+)", running.stdout.readline())
        assert found
        yield int(found[1]), int(found[2])
        running.terminate()


def serve(model: Path, runtime: str, batch: int | None) -> None:
    """Run that service in this process."""
    from useg.serving.middleware import Limits
    from useg.serving.run import listen, run
    from useg.serving.service import find_batch_size, make_service

    predictor = Predictor.load(model, runtime)
    batch = batch or find_batch_size(predictor.runtime.run, predictor.runtime.description)
    listener = listen("127.0.0.1", 0)
    print("port", listener.getsockname()[1], "batch", batch, flush=True)
    run(make_service(predictor, Limits(), batch), listener)


def clients_of(
    port: int, count: int, contents: list[bytes], seconds: float
) -> tuple[float, list[float]]:
    """Return images per second of concurrent clients, and the seconds that each answer took.

    Each client waits for an answer before it sends the next image.
    """
    took: list[float] = []
    began = time.perf_counter()

    def client(first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for content in itertools.islice(itertools.cycle(contents), first, None):
            if time.perf_counter() - began > seconds:
                return
            sent = time.perf_counter()
            connection.request("POST", "/predict", content, {"accept": "image/png"})
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            answer.read()
            took.append(time.perf_counter() - sent)

    threads = [threading.Thread(target=client, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(took) / (time.perf_counter() - began), took


def rate(work: Callable[[Any], Any], contents: Sequence[Any], seconds: float) -> float:
    """Return how many images per second ``work`` handles, in the threads of ``useg predict``."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    # One round that does not count.
    list(in_parallel(work, contents[: 2 * cores], cores + 2))
    began = time.perf_counter()
    given = itertools.takewhile(
        lambda _: time.perf_counter() - began < seconds, itertools.cycle(contents)
    )
    done = sum(1 for _ in in_parallel(work, given, cores + 2))
    took = time.perf_counter() - began
    torch.set_num_threads(cores)
    return done / took


def one_round(
    model: Path, runtime: str, contents: list[bytes], clients: int, seconds: float
) -> dict[str, float]:
    predictor = Predictor.load(model, runtime)
    row = {
        "offline": rate(
            lambda content: encode_label(predictor(decode_image(content)), predictor.classes),
            contents,
            seconds,
        )
    }
    for name, batch in (("served", None), ("served_one_by_one", 1)):
        with service(model, runtime, batch) as (port, chosen):
            clients_of(port, clients, contents, min(2.0, seconds))
            row[name], took = clients_of(port, clients, contents, seconds)
            if name == "served":
                row |= {
                    "batch": chosen,
                    "milliseconds": 1000 * statistics.median(took),
                    "milliseconds_p99": 1000 * statistics.quantiles(took, n=100)[-1],
                }
                _, took = clients_of(port, 1, contents, seconds)
                row |= {
                    "milliseconds_alone": 1000 * statistics.median(took),
                    "milliseconds_alone_p95": 1000 * statistics.quantiles(took, n=20)[-1],
                }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("pictures")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.model, arguments.runtime, arguments.batch)
    contents = [path.read_bytes() for path in find_images([arguments.pictures])[:64]]
    rounds = []
    for _ in range(arguments.rounds):
        rounds.append(
            one_round(
                arguments.model, arguments.runtime, contents, arguments.clients, arguments.seconds
            )
        )
        print({key: round(value, 3) for key, value in rounds[-1].items()}, flush=True)
    row = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
    shares = {
        "share_of_offline": row["served"] / row["offline"],
        "gain_of_batches": row["served"] / row["served_one_by_one"],
    }
    content = {
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "clients": arguments.clients,
        "pictures": len(contents),
    }
    runtime = Predictor.load(arguments.model, arguments.runtime).runtime
    content |= {
        "runtime": runtime.name,
        "network": runtime.description.network,
        "working": runtime.description.working.frame,
        **row,
        **shares,
        "rounds": rounds,
    }
    print(record(f"serving_{runtime.description.network['encoder']}", content))


if __name__ == "__main__":
    from useg.machine import tune

    tune()
    main()
