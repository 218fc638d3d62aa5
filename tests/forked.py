"""Runs ``useg train`` in processes forked from this one, which has loaded everything.

To start and kill such a process costs milliseconds, not seconds. Standard input has a line for each
run: its command as a JSON list. The answers are the id of the process, and its exit status when it
has ended. The runs save their checkpoint after every step, onto a slow disk. After the word
``plain`` a run writes it straight onto the file, which is the fault that the test must find.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from blank_charts import render_nothing
from slow_disk import write_slowly

from useg import visualization
from useg.cli import main
from useg.training import checkpoint

# Everything that useg imports only when it is needed: loading it again in every process would take
# longer than the run itself.
LOADED = (
    "useg.api",
    "useg.doctor.survey",
    "useg.inference.video",
    "useg.serving.export",
    "useg.console",
    "PIL.JpegImagePlugin",
    "jinja2",
    "imagecodecs",
    "matplotlib.figure",
    "safetensors.torch",
    "tifffile",
    "tomli_w",
    "torch._dynamo",
)
# Seconds after each piece of a file. Runs with the fault write for longer, so that few kills find
# it on any machine.
PAUSE, PAUSE_OF_FAULT = 0.004, 0.016


@contextmanager
def straight_onto(path: Path, is_own: object) -> Iterator[Path]:
    yield path


def run(arguments: list[str]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    pause = PAUSE
    if arguments[0] == "plain":
        pause, checkpoint.replacing = PAUSE_OF_FAULT, straight_onto
        arguments = arguments[1:]
    Path.write_bytes = functools.partialmethod(write_slowly, pause=pause)
    try:
        main(arguments)
    except SystemExit as end:
        os._exit(int(end.code or 0))


if __name__ == "__main__":
    for name in LOADED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    checkpoint.MIN_SAVE_INTERVAL_SECONDS, checkpoint.MAX_SAVE_SHARE = 0.0, 1e9
    visualization._render = render_nothing
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            run(json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
