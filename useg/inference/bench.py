"""Measure how fast every installed runtime computes a model, and how near it is to the peak.

The peak is what this machine reaches with a convolution that suits it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from useg.errors import UsageError
from useg.inference import runtimes
from useg.inference.runtimes import StoredModel, make_probe, probe_size
from useg.machine import measure_seconds
from useg.models.describe import describe
from useg.models.description import ModelDescription
from useg.models.segmenter import build_network, on_meta

# Time of each measurement.
MEASURE_SECONDS = 2.0

# Throughput is measured with batches of up to this number of pixels, and of images.
MAX_BENCH_BATCH_PIXELS = 400_000
MAX_BENCH_BATCH_IMAGES = 32


@dataclass(frozen=True)
class RuntimeSpeed:
    """Speed of one runtime.

    Args:
        name: The runtime, one of ``RUNTIMES``.
        precision: Of most of the work: ``"fp32"``, ``"bf16"`` or ``"int8"``.
        images_per_second: Throughput of the network only, with single images or batches, whichever
            is faster.
        share_of_peak: Share, 0 to 1, of the machine's peak in that precision, measured right
            before and after; None if it was not measured.
        seconds_per_image: Latency of a single image.
    """

    name: str
    precision: str
    images_per_second: float
    share_of_peak: float | None
    seconds_per_image: float


@dataclass(frozen=True)
class BenchResult:
    """Speeds of a model on this machine.

    Args:
        size: (width, height) of the network's input.
        batch: Images in a batch when throughput is measured.
        threads: Threads of every runtime.
        macs: Multiply-adds of the convolutions for one image; each is two floating-point
            operations.
        peaks: Floating-point operations per second that this machine reaches, by precision: the
            median of several measurements.
        speeds: One for each runtime that computes the model here.
        missing: Why each other runtime does not.
    """

    size: tuple[int, int]
    batch: int
    threads: int
    macs: int
    peaks: dict[str, float]
    speeds: tuple[RuntimeSpeed, ...]
    missing: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return the content, ready for JSON."""
        content = asdict(self)
        return {"runtimes": content.pop("speeds"), **content}


def bench(
    model: str | os.PathLike[str],
    size: tuple[int, int] | None = None,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> BenchResult:
    """Measure how fast every installed runtime computes a model.

    Args:
        model: A run folder or a model file of any kind.
        size: (width, height) of an image; by default the model's working size. The input of the
            network may be a little larger.
        say: Called with a message before each measurement.

    Raises:
        UsageError: There is no such model.
    """
    stored = runtimes.read_model(Path(model))
    description = stored.description
    width, height = size or probe_size(description)
    if size:
        width, height = (description.valid_size(side + 2 * description.margin) for side in size)
    batch = max(1, MAX_BENCH_BATCH_PIXELS // (width * height))
    workload = _Workload(
        (width, height),
        min(MAX_BENCH_BATCH_IMAGES, batch),
        count_macs(description, (width, height)),
    )
    speeds, missing, peaks = [], {}, [measure_peaks()]
    for name in runtimes.RUNTIMES:
        say(f"measuring {name}")
        try:
            speeds.append(_measure_speed(name, stored, workload, peaks))
        except UsageError as error:
            missing[name] = str(error)
    median_peaks = {
        precision: float(np.median([each[precision] for each in peaks])) for precision in peaks[0]
    }
    return BenchResult(
        workload.size,
        workload.batch,
        torch.get_num_threads(),
        workload.macs,
        median_peaks,
        tuple(speeds),
        missing,
    )


@dataclass(frozen=True)
class _Workload:
    """Input of every measurement; see :class:`BenchResult`."""

    size: tuple[int, int]
    batch: int
    macs: int


def _measure_speed(
    name: str, stored: StoredModel, workload: _Workload, peaks: list[dict[str, float]]
) -> RuntimeSpeed:
    """Measure one runtime, and the peak again right after it; the peak is appended to ``peaks``.

    On a machine that others use too, a peak measured minutes ago means little.
    """
    run = runtimes.start_runtime(stored, name).run
    precision = stored.description.precision
    if precision == "fp32" and (name == "gpu" or name.endswith("bf16")):
        precision = "bf16"
    x = make_probe(stored.description, workload.size, workload.batch)
    single = median_seconds(lambda: run(x[:1]))
    in_batch = median_seconds(lambda: run(x)) / workload.batch
    peaks.append(measure_peaks())
    speed = 1 / min(single, in_batch)
    peak = max(each[precision] for each in peaks[-2:])
    share = None if name == "gpu" else 2 * workload.macs * speed / peak
    return RuntimeSpeed(name, precision, speed, share, single)


def count_macs(description: ModelDescription, size: tuple[int, int]) -> int:
    """Return the multiply-adds of the convolutions for an input of (width, height)."""
    with on_meta("the model"):
        network = build_network(description.network)
    return describe(network, size).macs


def measure_peaks() -> dict[str, float]:
    """Measure floating-point operations per second of this processor, by precision.

    The best of several runs of a convolution that suits it. Integers of 8 bits are not measured:
    processors with instructions for them do four operations in the time of one in fp32, or two in
    that of one in bf16.
    """
    peaks = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        layer = nn.Conv2d(256, 256, 3, padding=1, bias=False)
        layer.to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = torch.randn(1, 256, 64, 64).to(dtype, memory_format=torch.channels_last)
        with torch.inference_mode():
            seconds = measure_seconds(layer, x, 20)
        peaks[precision] = 2 * layer.weight.numel() * 64 * 64 / seconds
    peaks["int8"] = max(4 * peaks["fp32"], 2 * peaks["bf16"])
    return peaks


def median_seconds(call: Callable[[], Any]) -> float:
    """Return the median time of a call.

    Measures for ``MEASURE_SECONDS``, at least three calls, after one that does not count.
    """
    call()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < MEASURE_SECONDS:
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))
