"""Run and kill ``useg predict`` for inference/test_predict_files.py.

Every run is forked from this process, because importing torch again takes seconds.

One line of JSON comes in for every job: the arguments of its processes, and the number of label
maps in a folder at which they are killed (null: never). One line goes out: their exit codes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from useg import cli
from useg.inference import predictor  # noqa: F401 - what takes the time


def start(arguments: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        cli.main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        children, codes = {start(arguments) for arguments in job["processes"]}, []
        while children:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended:
                children.remove(ended)
                codes.append(os.waitstatus_to_exitcode(status))
            elif (
                job["kill_at"] is not None
                and len(list(Path(job["out"]).glob("[!.]*.png"))) >= job["kill_at"]
            ):
                for child in children:
                    os.kill(child, signal.SIGKILL)
                job["kill_at"] = None
            else:
                time.sleep(0.001)
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
