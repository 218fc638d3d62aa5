"""What this machine is, for the record, and the one setting of its C library that matters."""

from __future__ import annotations

import ctypes
import os
import platform
from importlib import metadata
from pathlib import Path


def tune_allocator() -> None:
    """Let glibc keep large blocks instead of giving each back to the system; call before torch is imported.

    By default every tensor above 32 MB is mapped anew and each of its pages faults again, which costs training 13 % and
    inference 20 to 30 % on the CPU. Does nothing on other C libraries. (The names and numbers are those of mallopt(3).)
    """
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
