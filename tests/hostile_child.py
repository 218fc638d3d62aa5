"""Reads hostile files, each in a process forked from this one: ``python hostile_child.py BYTES``.

Names of files come from standard input, one a line, with the name of a reader before each. The
answers are JSON: what came out, seconds of work, and megabytes that the process grew by.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import hostile
import imagecodecs
import numpy as np
import PIL.Image
import pydicom.pixels
import tifffile
from mutations import seeds

from useg.errors import UsageError
from useg.images import image_files
from useg.images.stacks import read_stack

CASE = Path(tempfile.mkdtemp()) / "case"
SECONDS, ADDRESS_SPACE = 20, 12 << 30


def of_useg(path: Path) -> Any:
    results = [str(image_files.read_size(path, page)) for page in (0,)]
    read_stack(path)
    image_files.read_palette(path)
    return results, image_files.decode_image(path.read_bytes(), page=0).shape


def of_tifffile(path: Path) -> Any:
    return tifffile.TiffFile(path).series


def of_pillow(path: Path) -> Any:
    PIL.Image.MAX_IMAGE_PIXELS = None
    opened = PIL.Image.open(path)
    opened.load()
    return opened.size


def of_believed_size(path: Path) -> Any:
    width, height = image_files.read_size(path)
    return np.ones((height, width, 3), np.uint8).shape


def of_openjpeg(path: Path) -> Any:
    return imagecodecs.jpeg2k_decode(path.read_bytes()).shape


def of_pydicom(path: Path) -> Any:
    return pydicom.pixels.pixel_array(path).shape


READERS = {
    "OpenJPEG": of_openjpeg,
    "pydicom": of_pydicom,
    "useg": of_useg,
    "tifffile": of_tifffile,
    "Pillow": of_pillow,
    "a believed size": of_believed_size,
}


def megabytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) // 1024  # type: ignore[index]


def measured(reader: str, path: Path) -> str:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    # Kills a process that hangs, in C code too.
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    base, started, began = megabytes(), time.process_time(), time.perf_counter()
    try:
        outcome = repr(READERS[reader](path))
    except UsageError as error:
        outcome = f"refused: {error}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    seconds, waited = time.process_time() - started, time.perf_counter() - began
    return json.dumps([outcome[:300], max(seconds, min(waited, SECONDS) / 8), megabytes() - base])


def main() -> None:
    num_bytes = int(sys.argv[1])
    warnings.simplefilter("ignore")
    # Loads what is imported late, before memory is measured.
    for content in seeds().values():
        with contextlib.suppress(UsageError):
            image_files.decode_image(content, page=0)
    PIL.Image.init()
    tifffile.TiffFile(io.BytesIO(seeds()["ome.tif"])).series  # noqa: B018
    for line in sys.stdin:
        reader, _, name = line.rstrip("\n").partition("\t")
        CASE.write_bytes(hostile.ATTACKS[name](num_bytes))
        receive, send = os.pipe()
        child = os.fork()
        if not child:
            os.close(receive)
            os.write(send, measured(reader, CASE).encode())
            os._exit(0)
        os.close(send)
        with open(receive, "rb") as answers:
            answer = answers.read().decode()
        os.waitpid(child, 0)
        print(answer or json.dumps(["killed", SECONDS, 0]), flush=True)


if __name__ == "__main__":
    main()
