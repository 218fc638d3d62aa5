"""Check and measure useg on one NVIDIA GPU; the result is a JSON file.

    scripts/gpu-check [--out gpu.json] [--limit 480] [--only PART ...] [--commit HASH]
    scripts/gpu-check --simulate

Every part runs in a process of its own with a time limit, so that a part that fails, hangs or
crashes does not end the others. The exit status is 0 if every check passed, and 1 if one failed.
``--simulate`` runs tiny forms of all parts on the CPU, where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from gpu_cases import NO_GPU, PLAN_DATA, Options, check, make_data
from gpu_checks import equality, repeat, tiled
from gpu_speed import inference, machine, plan, precisions, runtimes, start, training
from record import ROOT, commit

from useg.machine import describe_machine

# What a part has found is written so often.
WRITE_SECONDS = 2.0

# Files of tests that compute on the GPU where there is one, the most telling first.
GPU_TESTS = (
    "tests/test_device.py",
    "tests/training/test_augment.py",
    "tests/training/test_batches.py",
    "tests/inference/test_runtimes_gpu.py",
    "tests/inference/test_tiles.py",
    "tests/training/test_devices.py",
    "tests/training/test_trainer.py",
    "tests/inference/test_runtimes.py",
    "tests/models/test_segmenter.py",
    "tests/training/test_loop.py",
    "tests/training/test_checkpoint.py",
    "tests/test_distributed.py",
)


def data(options: Options, content: dict[str, Any]) -> None:
    """Make the images that the other parts use."""
    for case in options.cases.values():
        make_data(options, case.size, options.choose(40, 6), case.grey)
    make_data(options, *options.choose(*PLAN_DATA))


def tests(options: Options, content: dict[str, Any]) -> None:
    """Run the tests that compute on the GPU where there is one, as many as there is time for."""
    if options.simulate:
        content["tests"] = NO_GPU
        return
    # Other plugins that are installed may warn, and warnings are errors here.
    plugins = ["-p", "no:benchmark", "-p", "no:cacheprovider", "-W", "default"]
    command = [sys.executable, "-m", "pytest", "-vv", "--tb=short", *plugins, *GPU_TESTS]
    log = options.folder / "tests.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    ended = False
    while not ended:
        ended = process.poll() is not None
        lines = log.read_text().splitlines()
        failures = [line for line in lines if re.search(r" (FAILED|ERROR) +\[", line)]
        content |= {
            "ended": ended,
            "passed": sum(" PASSED " in line for line in lines),
            "failures": failures,
            "output": "\n".join(lines)[-20000:],
            "checks": [check("the tests pass", not failures and not process.returncode)],
        }
        time.sleep(1)


# Name -> the part, and its time limit in seconds. What is new comes first.
PARTS: dict[str, tuple[Callable[[Options, dict[str, Any]], None], float]] = {
    "data": (data, 60),
    "machine": (machine, 40),
    "start-cudnn": (partial(start, "cudnn"), 90),
    "start-native": (partial(start, "native"), 30),
    "start-mixed": (partial(start, "mixed"), 30),
    "start-contiguous": (partial(start, "contiguous"), 30),
    "plan": (plan, 170),
    "tests": (tests, 120),
    "training": (training, 120),
    "equality": (equality, 60),
    "repeat": (repeat, 60),
    "tiled": (tiled, 40),
    "runtimes": (runtimes, 40),
    "inference": (inference, 60),
    "precisions": (precisions, 50),
}


def run_part(name: str, options: Options, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own; a part that fails or hangs says so."""
    began = time.perf_counter()
    result = options.folder / f"{name}.json"
    process = multiprocessing.get_context("fork").Process(
        target=_run_here, args=(name, options, result)
    )
    with warnings.catch_warnings():
        # Nothing was computed in this process: no thread of its own is lost.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    process.join(max(1.0, seconds))
    stopped = process.is_alive()
    if stopped:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    content: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
    if stopped:
        content["failed"] = f"stopped after {max(1.0, seconds):.0f} seconds"
    elif process.exitcode:
        content["failed"] = f"the process ended with status {process.exitcode}"
    return {"wall_seconds": round(time.perf_counter() - began, 1), **content}


def _run_here(name: str, options: Options, result: Path) -> None:
    os.setpgid(0, 0)
    content: dict[str, Any] = {}
    threading.Thread(target=write_now_and_then, args=(result, content), daemon=True).start()
    try:
        PARTS[name][0](options, content)
    except BaseException as error:
        traceback.print_exc()
        content["failed"] = f"{type(error).__name__}: {error}"[:1000]
        content["traceback"] = traceback.format_exc()[-3000:]
    write_whole(result, content)


def write_now_and_then(result: Path, content: dict[str, Any]) -> None:
    """Write what a part has found so far, again and again: it may have to be killed."""
    while True:
        time.sleep(WRITE_SECONDS)
        # The part may be changing the content at this moment.
        with suppress(RuntimeError):
            write_whole(result, content)


def write_whole(result: Path, content: dict[str, Any]) -> None:
    draft = result.with_suffix(f".draft{threading.get_ident()}")
    draft.write_text(json.dumps(content, default=str))
    draft.rename(result)


def has_gpu() -> bool:
    """Ask in a process of its own: a process that has asked CUDA cannot fork."""
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def known_commit() -> str:
    try:
        return commit()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def failed_checks(parts: dict[str, dict[str, Any]]) -> list[str]:
    """Return what did not pass: failed parts, and failed checks of the others."""
    failed = [f"{name}: {part['failed']}" for name, part in parts.items() if "failed" in part]
    return failed + [
        f"{name}: {each['what']}"
        for name, part in parts.items()
        for each in part.get("checks", ())
        if not each["passed"]
    ]


def without_nan(value: Any) -> Any:
    """Return content that every JSON reader reads: NaN and infinity as text."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_nan(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="file of the result")
    parser.add_argument("--limit", type=float, default=480, help="seconds for everything")
    parser.add_argument("--minutes", type=float, default=2, help="minutes of the timed run")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[],
        metavar="NAME",
        help="networks, by the start of their names",
    )
    parser.add_argument("--commit", help="the commit, where there is no git")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--simulate", action="store_true", help="tiny forms on the CPU")
    options = parser.parse_args()
    began = time.perf_counter()
    if not options.simulate and not has_gpu():
        print("PyTorch finds no GPU here; --simulate tries the script without one", file=sys.stderr)
        return 2
    parts: dict[str, dict[str, Any]] = {}
    content = {
        "commit": options.commit or known_commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "seed": options.seed,
        "simulated": options.simulate,
        "parts": parts,
    }
    with tempfile.TemporaryDirectory() as folder:
        chosen = Options(
            options.simulate, Path(folder), options.minutes, options.seed, tuple(options.cases)
        )
        for name in ["data", *(name for name in options.only if name != "data")]:
            left = options.limit - (time.perf_counter() - began)
            parts[name] = run_part(name, chosen, min(PARTS[name][1], left))
            state = parts[name].get("failed") or ("tiny form" if options.simulate else "done")
            print(f"{name}: {state} ({parts[name]['wall_seconds']} s)", flush=True)
            content["seconds"] = round(time.perf_counter() - began, 1)
            content["failed"] = failed_checks(parts)
            # After every part: what is known outlives this process.
            options.out.write_text(json.dumps(without_nan(content), indent=2) + "\n")
    print(f"{options.out}: " + ("; ".join(content["failed"]) or "every check passed"))
    return 1 if content["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
