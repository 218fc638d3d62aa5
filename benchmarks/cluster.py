"""Measure what an image costs on a cluster: core time per runtime, listing, and memory for names.

    OMP_NUM_THREADS=1 python benchmarks/cluster.py RUN PICTURES [--images 48] [--names 50000]

Runs one worker as on a cluster, on one core, without Ray. Measures processor time, which other work
on the machine hardly disturbs: of labelling an image, and of finding that it is already labelled.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from useg.machine import describe_machine, tune

tune()

import numpy as np
import torch
from record import record

from useg.errors import UsageError
from useg.inference.cluster import ClusterJob, StorageFolder, Worker, list_images, read_model_files

RUNTIMES = ("torch", "torch-bf16", "openvino-bf16")


def make_batch(paths: list[str]) -> dict[str, Any]:
    return {
        "number": np.arange(len(paths)),
        "folder": np.zeros(len(paths), int),
        "path": np.array(paths, object),
    }


def core_milliseconds(
    model: dict[str, bytes], runtime: str, source: StorageFolder, paths: list[str], folder: Path
) -> dict[str, float]:
    """Read, decode, compute, encode and write each image; then again, which keeps all."""
    job = ClusterJob([source], StorageFolder(str(folder / runtime)), runtime, runtime)
    worker = Worker(model, job)
    worker.label(source, paths[0])
    spent = []
    for _ in range(2):
        began = time.process_time()
        reported = worker(make_batch(paths[1:]))
        spent.append(1000 * (time.process_time() - began) / len(reported["reason"]))
        assert not any(reported["reason"]), reported["reason"]
    return {"labelled": spent[0], "kept": spent[1]}


def measure_listing(count: int) -> dict[str, float]:
    """List a local folder; return peak memory per path in bytes, and paths listed per second."""
    with tempfile.TemporaryDirectory() as folder:
        for k in range(count):
            os.close(os.open(f"{folder}/camera-frame-{k:012d}.jpg", os.O_CREAT))
        # This loads Arrow.
        assert not StorageFolder(folder).has_mark("none", "mark")
        gc.collect()
        before, began = resident(), time.perf_counter()
        found = list_images([folder], StorageFolder(f"{folder}-labels"))
        seconds = time.perf_counter() - began
        return {
            "bytes_per_path": (resident("VmHWM") - before) / len(found[0][1]),
            "listed_per_second": count / seconds,
        }


def resident(key: str = "VmRSS") -> int:
    """Return the bytes of memory of this process now, or at its peak (VmHWM)."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)
    )
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("pictures")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--names", type=int, default=50_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    content: dict[str, Any] = {
        "machine": describe_machine(),
        "names": measure_listing(arguments.names),
        "core_milliseconds": {},
    }
    sys.modules["ray"] = SimpleNamespace(get=lambda files: files)  # type: ignore[assignment]
    source, model = StorageFolder(arguments.pictures), read_model_files(arguments.run)
    paths = source.images()[: arguments.images]
    with tempfile.TemporaryDirectory() as folder:
        for runtime in RUNTIMES:
            try:
                content["core_milliseconds"][runtime] = core_milliseconds(
                    model, runtime, source, paths, Path(folder)
                )
            except UsageError as error:
                print(error)
    print({key: value for key, value in content.items() if key != "machine"})
    print(record("cluster", content))


if __name__ == "__main__":
    main()
