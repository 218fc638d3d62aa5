"""What this machine is, for the record, and the two settings of its libraries that matter."""

from __future__ import annotations

import ctypes
import os
import platform
from importlib import metadata
from pathlib import Path


def tune() -> None:
    """Prepare this process for computing on the CPU; call before torch is imported. The command line does.

    Threads that wait for each other soon sleep instead of spinning. Beside one other busy process on two cores a U-Net trains at 5.6
    images/s, against 2.0 of threads that spin for ever and 7.2 of threads that sleep at once; on an idle machine these need more time to
    wake up, which costs networks of many small operations much: 8.3 images/s against 10.6 (EfficientNet-Lite0).

    glibc keeps large blocks instead of giving each back to the system: by default every tensor above 32 MB is mapped anew and
    each of its pages faults again, which costs training 13 % and inference 20 to 30 %. (The names and numbers are those of
    mallopt(3); other C libraries are left alone.)
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # of GNU's OpenMP, which PyTorch's own builds have; it wins over the policy
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
