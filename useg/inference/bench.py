"""Measure how fast the installed runtimes compute a model: for a table, and to choose the fastest.

The table (``useg bench``) says how near each is to the peak, which is what this machine reaches
with a convolution that suits it.

The choice is the fastest runtime that labels images as the model's own does: the GPU, if there is
one. Otherwise it is measured once for each model and machine and kept in the user's cache folder,
so that later commands neither measure again nor change their labels. A few images are labelled by
the model's own runtime, which starts at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from useg.errors import UsageError
from useg.files import find_cache_folder, replacing
from useg.inference import runtimes
from useg.inference.runtimes import (
    Runtime,
    StoredModel,
    label_agreement,
    make_probe,
    probe_size,
    read_model,
    start_default,
    start_runtime,
)
from useg.machine import describe_machine, measure_seconds
from useg.models.describe import describe
from useg.models.description import ModelDescription
from useg.models.segmenter import build_network, model_file, on_meta

# Time of each measurement of the table.
MEASURE_SECONDS = 2.0

# Throughput is measured with batches of up to this number of pixels, and of images.
MAX_BENCH_BATCH_PIXELS = 400_000
MAX_BENCH_BATCH_IMAGES = 32

# Runtimes that may replace the one that a file was made for.
CANDIDATES = ("torch-bf16", "openvino-bf16", "openvino")

# Share of the probe's labels that must agree for a faster runtime to count as the same.
MIN_LABEL_AGREEMENT = 0.999

# A runtime replaces another one that needs at least this many times as long. Smaller differences
# are noise.
MIN_SPEED_RATIO = 1.05

# A choice takes about this long, most of it for importing PyTorch and OpenVINO and for converting
# the network. For less work it cannot pay. Longer than the other one it never takes.
MIN_SECONDS_OF_WORK = 5.0
MAX_SECONDS = 300.0

# Fewer images are labelled by the model's own runtime in less time than another one needs to start.
MIN_IMAGES = 4

# Kept choices; the oldest are dropped.
CHOICES_NAME = "runtimes.json"
MAX_CHOICES = 200


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

    Returns:
        The speed of each runtime, in images per second, and why the others cannot compute it.

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


def fastest_runtime(stored: StoredModel, num_images: float = math.inf) -> Runtime:
    """Start the fastest runtime for a model: the one that was measured before, or a new choice.

    Args:
        stored: The model.
        num_images: How many images will be labelled. If they take less time than a choice, the
            model's own runtime computes them.
    """
    own = start_default(stored)
    if own.name == "gpu" or num_images < MIN_IMAGES:
        return own
    key = _choice_key(stored)
    if kept := _read_choices().get(key):
        return own if kept == own.name else _try_start(stored, str(kept)) or own
    if not key:
        return own
    x = make_probe(stored.description, probe_size(stored.description))
    if num_images * measure_seconds(own.run, x) < MIN_SECONDS_OF_WORK:
        return own
    name = _measure_apart(stored.source)
    if name:
        _keep_choice(key, name)
    return own if name in ("", own.name) else _try_start(stored, name) or own


def _measure_apart(source: Path) -> str:
    """Return the name of the fastest runtime, measured in a process of its own; "" if it fails.

    A process that has used OpenVINO and given it up sometimes crashes when it ends.
    """
    command = [sys.executable, "-m", __spec__.name, str(source)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=MAX_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def find_fastest(stored: StoredModel) -> str:
    """Try all runtimes; return the name of the fastest one with the labels of the model's own."""
    best = start_runtime(stored, stored.native)
    x = make_probe(stored.description, probe_size(stored.description))
    expected, least_seconds = best.class_logits(x), measure_seconds(best.run, x)
    for name in CANDIDATES:
        if name == stored.native:
            continue
        candidate = _try_start(stored, name)
        if (
            not candidate
            or label_agreement(candidate.class_logits(x), expected) < MIN_LABEL_AGREEMENT
        ):
            continue
        seconds = measure_seconds(candidate.run, x)
        if seconds * MIN_SPEED_RATIO < least_seconds:
            best, least_seconds = candidate, seconds
    return best.name


def _try_start(stored: StoredModel, name: str) -> Runtime | None:
    """Start a runtime; None if it is not installed, or cannot compute this model here."""
    with suppress(UsageError):
        return start_runtime(stored, name)
    return None


def _choice_key(stored: StoredModel) -> str:
    """Identify a model file, the machine and the installed runtimes; "" without such a file."""
    try:
        content = model_file(stored.source).read_bytes()
    except OSError:
        return ""
    facts = [
        *describe_machine().values(),
        f"{torch.get_num_threads()} threads",
        *map(_find_version, ("openvino", "nncf")),
    ]
    return hashlib.sha256("\n".join(facts).encode() + content).hexdigest()


def _find_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _choices_path() -> Path | None:
    folder = find_cache_folder()
    return folder and folder / CHOICES_NAME


def _read_choices() -> dict[str, Any]:
    path = _choices_path()
    return (path and _read_own_choices(path)) or {}


def _read_own_choices(path: Path) -> dict[str, Any] | None:
    """Read kept choices; None if there are none in a file."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    choices = content.get("choices") if isinstance(content, dict) else None
    return choices if isinstance(choices, dict) else None


def _keep_choice(key: str, name: str) -> None:
    """Keep a choice; where that is impossible, the next command measures again."""
    path = _choices_path()
    if path is None:
        return
    choices = dict([*_read_choices().items(), (key, name)][-MAX_CHOICES:])
    with suppress(OSError, UsageError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, lambda old: _read_own_choices(old) is not None) as draft:
            draft.write_text(json.dumps({"choices": choices}), "utf-8")


if __name__ == "__main__":
    print(find_fastest(read_model(Path(sys.argv[1]))), flush=True)
    # Ending as usual might crash.
    os._exit(0)
