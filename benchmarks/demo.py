"""Run `useg demo` while nothing else runs, and again with both cores busy for its first minute.

    python benchmarks/demo.py [--busy-seconds 60]

The number of training steps follows the speed of the machine. A run that is disturbed at first must
still use its time, and score as an undisturbed one does. The results are written to
``results/demo.json``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import record

from useg.machine import describe_machine


def compute_until(end: float) -> None:
    """Keep one core busy."""
    while time.monotonic() < end:
        sum(range(10_000))


def run_demo(busy_seconds: float) -> dict[str, Any]:
    """Return the scores and times of a demo that starts beside one busy process for each core."""
    end = time.monotonic() + busy_seconds
    others = [
        multiprocessing.Process(target=compute_until, args=(end,))
        for _ in range(os.cpu_count() or 1)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for other in others:
            other.start()
        command = [sys.executable, "-m", "useg", "demo", "--out", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for other in others:
            other.join()
        scores = json.loads((Path(folder) / "scores.json").read_text())
        log = (Path(folder) / "run" / "log.jsonl").read_text().splitlines()
    kept = ("mean_iou", "pixel_accuracy", "num_images", "seconds", "seed")
    return {
        "busy_seconds": busy_seconds,
        **{key: scores[key] for key in kept},
        "steps": json.loads(log[-1])["step"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--busy-seconds", type=float, default=60)
    given = parser.parse_args()
    found = {
        name: run_demo(seconds)
        for name, seconds in (("quiet", 0), ("disturbed", given.busy_seconds))
    }
    record("demo", {"machine": describe_machine(), **found})
    for name, each in found.items():
        print(f"{name}: mean IoU {each['mean_iou']:.1%} in {each['seconds']:.0f} s")


if __name__ == "__main__":
    main()
