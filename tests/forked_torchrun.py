"""Runs torchrun's agent with ``useg`` in processes forked from this one, which has loaded torch.

torchrun starts each process anew, and every one of them loads torch for seconds. Jobs are read from
standard input, a JSON list per line: the number of processes, how often they may be started again,
the file for standard output, the file for standard error, and the arguments of ``useg``. The
answers are the id of the agent's process, and its exit status when it has ended.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

from forked import LOADED
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from useg.cli import main


def useg(*arguments: str) -> None:
    """Run a command as a process of its own: what it does not catch is shown as Python shows it."""
    try:
        main(list(arguments))
    except SystemExit as end:
        if end.code:
            raise
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)


def launch(processes: int, restarts: int, out: str, errors: str, arguments: list[str]) -> int:
    """Do a job; return the exit status."""
    for path, number in ((out, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        start_method="fork",
    )
    try:
        elastic_launch(config, useg)(*arguments)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    for name in LOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            os._exit(launch(*json.loads(line)))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
