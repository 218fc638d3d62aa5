"""What this machine is, for the record, and the two settings of its libraries that matter."""

from __future__ import annotations

import ctypes
import os
import platform
from importlib import metadata
from pathlib import Path


def tune() -> None:
    """Prepare this process for computing on the CPU; call before torch is imported. The command line does.

    Threads that wait for each other sleep instead of spinning: on an idle machine that costs nothing measurable, and beside
    one other busy process on two cores training is 3.5 times as fast (2.0 against 7.0 images/s).

    glibc keeps large blocks instead of giving each back to the system: by default every tensor above 32 MB is mapped anew and
    each of its pages faults again, which costs training 13 % and inference 20 to 30 %. (The names and numbers are those of
    mallopt(3); other C libraries are left alone.)
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        libc.mallopt(parameter, value)


def describe() -> dict[str, str]:
    """Return processor, cores, system and the versions of what computes, as text."""
    versions = {package: metadata.version(package) for package in ("useg", "torch", "numpy", "pillow")}
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
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
