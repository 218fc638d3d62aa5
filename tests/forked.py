"""Runs ``useg train`` in processes forked from this one, which has loaded everything: to start and
kill one costs milliseconds, not seconds.

Reads commands, a JSON list a line; answers with the id of the process, and with its exit status
when it has ended. Its runs save their state after every step, onto a slow disk. With the word
``plain`` they save it in the plain way, straight onto the file: what the test must find fault with.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from useg import pictures
from useg.cli import main
from useg.training import checkpoint

LOADED = (
    "useg.training.loop",
    "useg.inference.video",
    "useg.serving.export",
    "useg.console",
    "PIL.JpegImagePlugin",
    "jinja2",
    "tomli_w",
    "torch._dynamo",
)
PIECES, PAUSE = 10, 0.004  # seconds after each piece of a file


def write_slowly(path: Path, content: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        for k in range(PIECES):
            file.write(content[k * len(content) // PIECES : (k + 1) * len(content) // PIECES])
            time.sleep(PAUSE)


@contextmanager
def straight_onto(path: Path) -> Iterator[Path]:
    yield path


def run(arguments: list[str]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        main(arguments)
    except SystemExit as end:
        os._exit(int(end.code or 0))


if __name__ == "__main__":
    for name in LOADED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    checkpoint.MIN_SAVE_INTERVAL_SECONDS, checkpoint.MAX_SAVE_SHARE = 0.0, 1e9
    Path.write_bytes = write_slowly
    pictures._render = lambda figure, form, transparent: (
        b"<svg></svg>"
    )  # half of a run's time otherwise
    if "plain" in sys.argv:
        checkpoint.replacing = straight_onto
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            run(json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
