"""This machine: settings of its libraries that matter for speed, its description, and its cores.

:func:`in_parallel` maps a function over many items on all cores; :func:`prefetch` makes the next
item while the current one is used.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from useg import __version__

Item = TypeVar("Item")
Input = TypeVar("Input")
Result = TypeVar("Result")

# Called with the number of items done and the number of all items.
CountProgress = Callable[[int, int], None]

# Environment variable with the name of the device that computes; ``--device`` sets it, so that
# processes that useg starts use the same one.
DEVICE_VARIABLE = "USEG_DEVICE"

# Parameters of glibc's mallopt(3), by their numbers: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD.
_MALLOC_SETTINGS = ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20))


def tune() -> None:
    """Prepare this process for computing on the CPU; call it before torch is imported.

    The command line calls it. It sets three things:

    Threads that wait for each other spin for a millisecond by default. On a busy machine they are
    set to sleep almost at once: with one other busy process on two cores, a U-Net trains at 2.0
    images/s if threads spin and at 5.6 if they sleep. On an idle machine they keep spinning, which
    is a sixth faster (22.6 against 18.7 images/s, the course's network).

    glibc is set to keep large blocks of memory. By default it maps new memory for each tensor above
    32 MB, so each page of the tensor faults again, which costs training 13 % and inference 20 to 30
    %. Other C libraries are left alone.

    When Python ends, it looks for garbage among all objects that PyTorch has loaded, which takes
    almost half a second. They are left to the system.
    """
    atexit.register(gc.freeze)
    if is_machine_busy():
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # GNU's OpenMP, which PyTorch's own builds use, prefers this one to the policy.
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for parameter, value in _MALLOC_SETTINGS:
        libc.mallopt(parameter, value)


@contextmanager
def paused_garbage_collection(*, freeze: bool = False) -> Iterator[None]:
    """Collect no garbage within a block that makes many objects.

    Python would scan them again and again while their number grows: that takes a sixth of the
    time of importing, and a third of the time of reading a large file of annotations.

    Args:
        freeze: Whether what the block made stays in use, as modules do, so that later collections
            do not look at it. Each would take a tenth of a second for the objects of PyTorch.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if freeze:
            gc.freeze()
        if was_enabled:
            gc.enable()


def return_free_memory() -> None:
    """Give memory that this process does not use back to the system, which :func:`tune` keeps."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def is_machine_busy() -> bool:
    """Return whether other processes or threads use a core now; True where that is unknown."""
    running = []
    try:
        # The median of five counts, each including this process: what runs for a moment does not
        # matter.
        for _ in range(5):
            fields = Path("/proc/loadavg").read_text().split()
            running.append(int(fields[3].partition("/")[0]))
            time.sleep(0.002)
    except (OSError, ValueError, IndexError):
        return True
    return sorted(running)[len(running) // 2] > 1


def describe_machine() -> dict[str, str]:
    """Return processor, cores, system and versions of the libraries that compute, as text."""
    packages = ("torch", "numpy", "pillow")
    return {
        "processor": _processor_name(),
        "cores": str(count_cores()),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        # A checkout that is not installed has a version too.
        "useg": __version__,
        **{package: metadata.version(package) for package in packages},
    }


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        # Not Linux.
        pass
    return platform.processor() or platform.machine()


def count_cores() -> int | None:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None
) -> Iterator[Result]:
    """Yield ``function(item)`` for each item, in order, computed by several threads.

    Only a few items are computed ahead: ``ThreadPoolExecutor.map`` starts all at once, and its
    results pile up in memory if they are used more slowly than they are made.

    Args:
        function: Called in the threads.
        items: The items.
        threads: Number of threads; by default the number of cores.
    """
    threads = threads or count_cores() or 1
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # After an interruption, do not wait for what has not begun.
            for future in waiting:
                future.cancel()


def prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """Yield items; each is made in a thread while the one before it is used."""
    end = object()
    with ThreadPoolExecutor(1, initializer=_compute_alone) as pool:
        future = pool.submit(next, items, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


def _compute_alone() -> None:
    """Give this thread no further threads: they would wait for those of the main thread.

    Batches with changed colours slowed EfficientNet-Lite0 down from 18 to 12 steps/s on two cores.
    ``torch.set_num_threads`` would also change the number for all threads that start later. The
    service uses that, because each of its threads sets its own number
    (:func:`useg.serving.request_queue.set_own_threads`).
    """
    import torch
    from threadpoolctl import threadpool_limits

    torch.get_num_threads()  # Only after its first use in a thread, the number can change.
    threadpool_limits(1, user_api="openmp")


def measure_seconds(function: Callable[[Input], object], x: Input, times: int = 2) -> float:
    """Return the shortest time of a call, after a first call that does not count."""
    function(x)
    shortest = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        function(x)
        shortest = min(shortest, time.perf_counter() - began)
    return shortest
