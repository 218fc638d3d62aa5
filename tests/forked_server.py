"""Runs labelling servers in processes forked from this one, which has loaded everything.

For each line of standard input, a folder of images, it starts a server. The answers are the id
of its process, its address, and its exit status when it has ended. With the argument ``plain`` or
``late`` the servers save masks in a way that loses strokes, which the tests must find.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slow_disk import PIECES, write_slowly

from useg.labelling import folder
from useg.labelling.app import LabelOptions, serve_labelling_page

# A plain save pauses for so many seconds after each piece of the file; a late one begins after the
# pauses of all pieces.
PAUSE = 0.02


@contextmanager
def straight_onto(path: Path, is_own: object) -> Iterator[Path]:
    """Write onto the file itself."""
    draft = path.with_suffix(".draft")
    yield draft
    content = draft.read_bytes()
    draft.unlink()
    write_slowly(path, content, PAUSE)


@contextmanager
def later(path: Path, is_own: object) -> Iterator[Path]:
    """Write after the answer."""
    draft = path.with_name(f"{path.name}-{time.monotonic_ns()}.draft")
    yield draft
    threading.Timer(PIECES * PAUSE, shutil.move, (draft, path)).start()


def answer(text: object) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        folder.replacing = {"plain": straight_onto, "late": later}[sys.argv[1]]
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            options = LabelOptions(Path(line.rstrip("\n")), ("ground", "square"))
            serve_labelling_page(options, answer, answer, browse=False)
            os._exit(0)
        answer(pid)
        answer(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
