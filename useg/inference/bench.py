"""A model and a size -> images per second of every runtime that is installed, and the share of what
this machine could do at most.
"""

from __future__ import annotations

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
from useg.models.segmenter import ModelDescription, build_network

MEASURE_SECONDS = 2.0  # for each measurement


MAX_BENCH_BATCH_PIXELS = 400_000  # about so many pixels at a time when throughput is measured


@dataclass(frozen=True)
class RuntimeSpeed:
    """How fast one runtime is.

    Args:
        name: the runtime, one of ``RUNTIMES``.
        precision: in which most of the work is done: ``"fp32"``, ``"bf16"`` or ``"int8"``.
        images_per_second: of the network alone, one picture at a time or a batch at a time,
            whichever is faster.
        share_of_peak: of the machine's peak in that precision, measured right before and after, 0
            to 1; None where it was not measured.
        seconds_per_image: for one picture at a time.
    """

    name: str
    precision: str
    images_per_second: float
    share_of_peak: float | None
    seconds_per_image: float


@dataclass(frozen=True)
class BenchResult:
    """The speeds of a model on this machine.

    Args:
        size: (width, height) that the network is given.
        batch: pictures at a time when throughput is measured.
        threads: of every runtime.
        macs: multiply-adds of the convolutions for one picture; two floating-point operations each.
        peaks: floating-point operations per second that this machine reaches, by precision: the
            median over the measurements.
        speeds: of every runtime that runs the model here.
        missing: name of a runtime that does not -> why.
    """

    size: tuple[int, int]
    batch: int
    threads: int
    macs: int
    peaks: dict[str, float]
    speeds: tuple[RuntimeSpeed, ...]
    missing: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        content = asdict(self)
        return {"runtimes": content.pop("speeds"), **content}


def measure_runtimes(
    path: Path,
    size: tuple[int, int] | None = None,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> BenchResult:
    """Measure every runtime that can run a model here.

    Args:
        path: a run folder or a model file of any kind.
        size: (width, height) of the picture; by default the model's working size. What the network
            is given may be a little larger.
        say: told what is measured.

    Raises:
        UsageError: there is no such model.
    """
    stored = runtimes.read_model(path)
    width, height = size or probe_size(stored.description)
    if size:
        width, height = (
            stored.description.valid_size(side + 2 * stored.description.margin) for side in size
        )
    batch = min(32, max(1, MAX_BENCH_BATCH_PIXELS // (width * height)))
    macs = count_macs(stored.description, (width, height))
    speeds, missing, measured = [], {}, [measure_peaks()]
    for name in runtimes.RUNTIMES:
        say(f"measuring {name}")
        try:
            speeds.append(_measure_speed(name, stored, (width, height), batch, macs, measured))
        except UsageError as error:
            missing[name] = str(error)
    peaks = {
        precision: float(np.median([each[precision] for each in measured]))
        for precision in measured[0]
    }
    return BenchResult(
        (width, height), batch, torch.get_num_threads(), macs, peaks, tuple(speeds), missing
    )


def count_macs(description: ModelDescription, size: tuple[int, int]) -> int:
    """Return the multiply-adds of the convolutions for a picture of (width, height) as the network
    is given it.
    """
    with torch.device("meta"):
        network = build_network(description.network)
    return describe(network, size).macs


def measure_peaks() -> dict[str, float]:
    """Measure floating-point operations per second of this processor, by precision: a convolution
    that suits it, the best of several.

    8-bit integers are not measured: processors that have instructions for them do four operations
    in the time of one in fp32, or two in that of one in bf16.
    """
    peaks = {}
    for precision, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        layer = nn.Conv2d(256, 256, 3, padding=1, bias=False).to(
            kind, memory_format=torch.channels_last
        )  # type: ignore[call-overload]
        x = torch.randn(1, 256, 64, 64).to(kind, memory_format=torch.channels_last)
        with torch.inference_mode():
            seconds = measure_seconds(layer, x, 20)
        peaks[precision] = 2 * layer.weight.numel() * 64 * 64 / seconds
    peaks["int8"] = max(4 * peaks["fp32"], 2 * peaks["bf16"])
    return peaks


def _measure_speed(
    name: str,
    stored: StoredModel,
    size: tuple[int, int],
    batch: int,
    macs: int,
    measured: list[dict[str, float]],
) -> RuntimeSpeed:
    """Measure one runtime, and the peak again right after it: on a machine that others use too, a
    peak of some minutes ago says little.
    """
    run = runtimes.start_runtime(stored, name).run
    precision = (
        stored.description.precision
        if stored.description.precision != "fp32"
        else "bf16"
        if name == "gpu" or name.endswith("bf16")
        else "fp32"
    )
    x = make_probe(stored.description, size, batch)
    single = median_seconds(lambda: run(x[:1]))
    together = median_seconds(lambda: run(x)) / batch
    measured.append(measure_peaks())
    speed, peak = 1 / min(single, together), max(each[precision] for each in measured[-2:])
    return RuntimeSpeed(
        name, precision, speed, None if name == "gpu" else 2 * macs * speed / peak, single
    )


def median_seconds(call: Callable[[], Any]) -> float:
    """Return the median time of a call, over ``SECONDS`` and at least three calls, after one that
    does not count.
    """
    call()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < MEASURE_SECONDS:
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def bench(
    model: str | Path,
    size: tuple[int, int] | None = None,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> BenchResult:
    """Measure every runtime that can run a model here; arguments and errors as for
    :func:`useg.inference.bench.measure_runtimes`.
    """
    return measure_runtimes(Path(model), size, say=say)
