"""Measure what a service costs and gains: throughput, the gain from batching, and latency.

    python benchmarks/serving.py MODEL PICTURES [--runtime NAME] [--clients 16] [--seconds 20]
        [--rounds 3]

Run it on a machine that does nothing else. PICTURES is a folder; every client sends its files
repeatedly and receives label maps. The reference is the same work in one process, in the threads of
``useg predict``: decode the file, predict, encode the label map. The bound is what all cores would
do if each image took no more than the processor time of this work in one thread. The runtime is by
default the one that ``useg serve`` chooses. Results are medians of the rounds, in which the
variants take turns. The service runs in a process of its own, first as it chooses to compute
several images, then with one image at a time. The clients run on the same cores.
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

from useg.images.image_files import decode_image, encode_label
from useg.inference.predict_files import find_images
from useg.inference.predictor import Predictor
from useg.machine import describe_machine, in_parallel


@contextlib.contextmanager
def service(model: Path, runtime: str, one_by_one: bool) -> Iterator[tuple[int, int, int]]:
    """Yield the port of a service, its batch size, and how many threads compute an image each."""
    command = [
        sys.executable,
        __file__,
        str(model),
        "-",
        "--serve",
        *(["--one-by-one"] if one_by_one else []),
        *("--runtime", runtime),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        found = re.search(r"port (\d+) batch (\d+) threads (\d+)", running.stdout.readline())
        assert found
        yield int(found[1]), int(found[2]), int(found[3])
        running.terminate()


def serve(model: Path, runtime_name: str, one_by_one: bool) -> None:
    """Run that service in this process."""
    from useg.serving.middleware import Limits
    from useg.serving.run import listen, run
    from useg.serving.service import make_service
    from useg.serving.shared_network import LoadPlan, find_plan

    predictor = Predictor.load(model, runtime_name)
    runtime = predictor.runtime
    plan = LoadPlan() if one_by_one else find_plan(runtime.run, runtime.description)
    listener = listen("127.0.0.1", 0)
    chosen = f"batch {plan.batch_size} threads {plan.threads}"
    print("port", listener.getsockname()[1], chosen, flush=True)
    run(make_service(predictor, Limits(), plan), listener)


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


def bound(work: Callable[[Any], Any], contents: Sequence[Any]) -> float:
    """Return how many images per second all cores would do at the processor time of one thread."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    work(contents[0])
    began = time.process_time()
    for content in contents:
        work(content)
    seconds = (time.process_time() - began) / len(contents)
    torch.set_num_threads(cores)
    return cores / seconds


def one_round(
    model: Path, runtime: str, contents: list[bytes], clients: int, seconds: float
) -> dict[str, float]:
    predictor = Predictor.load(model, runtime)

    def work(content: bytes) -> bytes:
        return encode_label(predictor(decode_image(content)), predictor.classes)

    row = {"bound": bound(work, contents), "offline": rate(work, contents, seconds)}
    for name, one_by_one in (("served", False), ("served_one_by_one", True)):
        with service(model, runtime, one_by_one) as (port, batch, threads):
            clients_of(port, clients, contents, min(2.0, seconds))
            row[name], took = clients_of(port, clients, contents, seconds)
            if name == "served":
                row |= {
                    "batch": batch,
                    "threads_with_an_image": threads,
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
    parser.add_argument("--one-by-one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.model, arguments.runtime, arguments.one_by_one)
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
        "share_of_bound": row["served"] / row["bound"],
        "gain_of_several": row["served"] / row["served_one_by_one"],
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
