"""Reads the damaged files of a range of numbers, watched by ``test_decode_fuzz.py``: ``python
fuzz_child.py FIRST LAST FOLDER``.

The number under way stands in FOLDER/number, so that it is known even when the process is killed by
a fault in a decoder or by its own clock.
"""

from __future__ import annotations

import mmap
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mutations import MUTATIONS, mutated, mutated_zarr, seeds

from useg.errors import UsageError
from useg.images import image_files
from useg.images.ome_zarr import open_zarr
from useg.images.stacks import read_stack

SECONDS, WAIT_SECONDS, MEGABYTES = 2.0, 20.0, 512
# Files that give no picture as they are: stacks, and formats that useg does not read.
STACKS = ("stack.tif", "ome.tif", "pages.tif", "pixels.npz")
# Every so many files a Zarr folder is read, and a video where the fuzzer has time for it.
ZARR_EVERY, VIDEO_EVERY = 100, 1000 if os.environ.get("USEG_SOAK") == "1" else 0
LEAKED: list[str] = []
FAULT = os.environ.get("USEG_FUZZ_FAULT", "")  # to see the watch at work


def read_all(path: Path, turn: int) -> bool:
    """Read a file's picture and, in turn, something else; all but a clear error or a sound answer
    is an exception.
    """
    image = _answer(image_files.read_image, path)
    if image is not None:
        size = image_files.read_size(path)
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
    return image_files.decode_image(path.read_bytes())


def _first_page(path: Path) -> Any:
    return image_files.read_image(path, page=0)


OTHERS = (
    image_files.read_size,
    image_files.read_mask,
    image_files.read_palette,
    read_stack,
    image_files.read_colors,
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
    peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
    assert peak
    return int(peak[1]) // 1024


def read_zarr(number: int, folder: Path) -> None:
    """Read a damaged OME-Zarr folder."""
    path = folder / "case.zarr"
    shutil.rmtree(path, ignore_errors=True)
    for name, content in mutated_zarr(number).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    _answer(lambda place: open_zarr(place)[0:16, 0:24], path)


def make_videos(folder: Path) -> dict[str, bytes]:
    """Whole videos of five frames, by their names."""
    import av

    made = {}
    for name in ("a.mp4", "a.avi", "a.mkv"):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for k in range(5):
                pixels = np.full((48, 64, 3), 40 * k, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        made[name] = (folder / name).read_bytes()
    return made


def read_video(number: int, folder: Path, videos: dict[str, bytes]) -> None:
    """Read a damaged video."""
    from useg.inference.video import read_frames

    rng = random.Random(number)
    name = rng.choice(list(videos))
    content = bytearray(videos[name])
    for _ in range(rng.choice((1, 2, 5))):
        rng.choice(MUTATIONS)(content, rng)
    (folder / name).write_bytes(content)
    _answer(lambda path: sum(1 for _ in read_frames(path, 3)), folder / name)


def read_case(number: int, folder: Path, videos: dict[str, bytes]) -> bool:
    """Read the files of a number; return whether the picture gave pixels."""
    exec(FAULT)
    if number % ZARR_EVERY == 0:
        read_zarr(number, folder)
    if videos and number % VIDEO_EVERY == 0:
        read_video(number, folder, videos)
    return read_all(folder / "case", number)


def watched(number: int, folder: Path, videos: dict[str, bytes], base: int) -> tuple[bool, int]:
    """Read the files of a number; return whether there were pixels, and megabytes grown by.

    What goes wrong is added to ``LEAKED``.
    """
    is_read, started = False, time.process_time()
    # These kill the process, in C code too: the second one also where it only waits.
    signal.setitimer(signal.ITIMER_PROF, SECONDS + 1)
    signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS)
    try:
        is_read = read_case(number, folder, videos)
    except Exception as error:
        LEAKED.append(f"{type(error).__name__}: {error}")
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if (seconds := time.process_time() - started) > SECONDS:
        LEAKED.append(f"{seconds:.1f} s")
    grown = peak() - base
    if grown > MEGABYTES:
        LEAKED.append(f"{grown} MB")
    return is_read, grown


def main() -> None:
    first, last, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    (folder / "number").write_bytes(bytes(16))
    with (folder / "number").open("r+b") as file:
        state = mmap.mmap(file.fileno(), 16)
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, *_, **__: LEAKED.append(f"warning: {message}")
    # This also loads what is imported late, before memory is measured.
    for turn, (name, content) in enumerate(seeds().items()):
        (folder / "case").write_bytes(content)
        assert read_all(folder / "case", turn) or name in STACKS, name
    read_zarr(0, folder)
    videos = make_videos(folder) if VIDEO_EVERY else {}
    if videos:
        read_video(0, folder, videos)
    LEAKED.clear()
    base, read = peak(), 0
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in range(first, last):
        struct.pack_into("qq", state, 0, number, read)
        (folder / "case").write_bytes(mutated(number)[1])
        is_read, grown = watched(number, folder, videos, base)
        read += is_read
        if LEAKED:
            print(f"{number}\t{'; '.join(LEAKED)}", flush=True)
            LEAKED.clear()
        # The peak cannot be forgotten: go on in a new process.
        if grown > MEGABYTES:
            struct.pack_into("qq", state, 0, number + 1, read)
            sys.exit(3)
    struct.pack_into("qq", state, 0, last, read)


if __name__ == "__main__":
    main()
