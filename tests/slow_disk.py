"""Writes a file as a slow disk does, so that a process can be killed in the middle of it."""

from __future__ import annotations

import time
from pathlib import Path

# A file is written in so many pieces.
PIECES = 10


def write_slowly(path: Path, content: bytes, pause: float) -> None:
    """Write a file straight onto its place, with a pause of so many seconds after each piece."""
    with path.open("wb", buffering=0) as file:
        for k in range(PIECES):
            file.write(content[k * len(content) // PIECES : (k + 1) * len(content) // PIECES])
            time.sleep(pause)
