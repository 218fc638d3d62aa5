"""Reads the damaged files of a range of numbers, watched by ``test_fuzz.py``: ``python
fuzz_child.py FIRST LAST FOLDER``.

The number under way stands in FOLDER/number, so that it is known even when the process is killed by
a fault in a decoder or by its own clock.
"""

from __future__ import annotations

import mmap
import os
import re
import resource
import signal
import struct
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mutations import mutated, seeds

from useg.errors import UsageError
from useg.images import files

SECONDS, MEGABYTES = 2.0, 512
STACKS = ("stack.tif", "ome.tif", "pages.tif")
LEAKED: list[str] = []
FAULT = os.environ.get("USEG_FUZZ_FAULT", "")  # to see the watch at work


def read_all(path: Path, turn: int) -> bool:
    """Read a file's picture and, in turn, something else; all but a clear error or a sound answer
    is an exception.
    """
    image = _answer(files.read_image, path)
    if image is not None:
        size = files.read_size(path)
        assert image.dtype in (np.uint8, np.uint16, np.float32), image.dtype
        assert (image.shape[1], image.shape[0]) == size, (image.shape, size)
    _answer(OTHERS[turn % len(OTHERS)], path)
    return image is not None


def _answer(reader: Callable[[Path], Any], path: Path) -> Any:
    try:
        return reader(path)
    except UsageError:
        return None


def _upload(path: Path) -> Any:
    return files.decode_image(path.read_bytes())


def _first_page(path: Path) -> Any:
    return files.read_image(path, page=0)


OTHERS = (
    files.read_size,
    files.read_mask,
    files.read_palette,
    files.num_pages,
    files.read_colors,
    _upload,
    _first_page,
)


def peak() -> int:
    """Return the most memory that this process has had, in megabytes; ru_maxrss would count that of
    the process it was started from.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) // 1024  # type: ignore[index]


def main() -> None:
    first, last, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    (folder / "number").write_bytes(bytes(16))
    with (folder / "number").open("r+b") as file:
        state = mmap.mmap(file.fileno(), 16)
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, *_, **__: LEAKED.append(f"warning: {message}")
    for turn, (name, content) in enumerate(
        seeds().items()
    ):  # also loads what is imported late, before memory is measured
        (folder / "case").write_bytes(content)
        assert read_all(folder / "case", turn) or name in STACKS, name
    base = peak()
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    read = 0
    for number in range(first, last):
        struct.pack_into("qq", state, 0, number, read)
        (folder / "case").write_bytes(mutated(number)[1])
        signal.setitimer(signal.ITIMER_PROF, SECONDS + 1)  # kills the process, in C code too
        started = time.process_time()
        try:
            exec(FAULT)
            read += read_all(folder / "case", number)
        except Exception as error:
            LEAKED.append(f"{type(error).__name__}: {error}")
        signal.setitimer(signal.ITIMER_PROF, 0)
        if (seconds := time.process_time() - started) > SECONDS:
            LEAKED.append(f"{seconds:.1f} s")
        grown = peak() - base
        if grown > MEGABYTES:
            LEAKED.append(f"{grown} MB")
        if LEAKED:
            print(f"{number}\t{'; '.join(LEAKED)}", flush=True)
            LEAKED.clear()
        if grown > MEGABYTES:  # the peak cannot be forgotten: go on in a new process
            struct.pack_into("qq", state, 0, number + 1, read)
            sys.exit(3)
    struct.pack_into("qq", state, 0, last, read)


if __name__ == "__main__":
    main()
