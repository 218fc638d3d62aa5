"""Runs labelling servers in processes forked from this one, which has loaded everything.

For each line of standard input, a folder of pictures, it starts a server. The answers are the id
of its process, its address, and its exit status when it has ended.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from useg.labelling.run import LabelOptions, label_pictures


def answer(text: object) -> None:
    print(text, flush=True)


for line in sys.stdin:
    pid = os.fork()
    if not pid:
        options = LabelOptions(Path(line.rstrip("\n")), ("ground", "square"))
        label_pictures(options, answer, answer, browse=False)
        os._exit(0)
    answer(pid)
    answer(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
