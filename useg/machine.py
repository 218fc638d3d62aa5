"""What this machine is, for the record, and the two settings of its libraries that matter."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TypeVar


def tune() -> None:
    """Prepare this process for computing on the CPU; call before torch is imported. The command line does.

    Threads that wait for each other spin for a millisecond, as they come, where nothing else runs; on a machine that is busy as this
    process starts they sleep almost at once. Beside one other busy process on two cores a U-Net trains at 2.0 images/s if they spin and at
    5.6 if they sleep, and on an idle machine a sixth faster if they spin (22.6 against 18.7, the course's network).

    glibc keeps large blocks instead of giving each back to the system: by default every tensor above 32 MB is mapped anew and
    each of its pages faults again, which costs training 13 % and inference 20 to 30 %. (The names and numbers are those of
    mallopt(3); other C libraries are left alone.)
    """
    if others_run():
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault(
            "GOMP_SPINCOUNT", "2000"
        )  # of GNU's OpenMP, which PyTorch's own builds have; it wins over the policy
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for parameter, value in (
        (-4, 0),
        (-1, 2**31 - 1),
        (-2, 64 << 20),
    ):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        libc.mallopt(parameter, value)


def others_run() -> bool:
    """Tell whether other processes or threads want a core just now; on systems that do not say, they may."""
    try:
        seen = []
        for _ in range(5):  # what runs for a moment does not count
            seen.append(
                int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
            )  # this one included
            time.sleep(0.002)
    except (OSError, ValueError, IndexError):
        return True
    return sorted(seen)[len(seen) // 2] > 1


def describe_machine() -> dict[str, str]:
    """Return processor, cores, system and the versions of what computes, as text."""
    versions = {
        package: metadata.version(package) for package in ("useg", "torch", "numpy", "pillow")
    }
    return {
        "processor": _processor(),
        "cores": str(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


Item = TypeVar("Item")
Input = TypeVar("Input")


Result = TypeVar("Result")


def in_parallel(
    function: Callable[[Item], Result], things: Iterable[Item], threads: int | None = None
) -> Iterator[Result]:
    """Yield ``function(thing)`` for each of them, computed by as many threads as there are cores, or as asked for.

    ``ThreadPoolExecutor.map`` starts them all at once: its results pile up in memory when they are taken more slowly than they are made.
    """
    threads = threads or (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for thing in things:
                waiting.append(pool.submit(function, thing))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # whoever was interrupted does not wait for what has not begun
            for future in waiting:
                future.cancel()


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield items, each of which was made while the one before it was used."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


def seconds_of(function: Callable[[Input], object], x: Input, times: int = 2) -> float:
    """Return the least time that one call takes, after a first call that does not count."""
    function(x)
    least = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        function(x)
        least = min(least, time.perf_counter() - began)
    return least


CountProgress = Callable[[int, int], None]
