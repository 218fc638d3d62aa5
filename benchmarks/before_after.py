"""Measure two commits in turns: `useg --help`, M1 training and M1 inference.

    python benchmarks/before_after.py BEFORE AFTER [--rounds 5] [--seconds 20] [--data FOLDER]

BEFORE and AFTER are commits. Each is checked out into a temporary git worktree and measured with
this Python. In every round both take turns, and the second round swaps their order, so that a
machine that slows down favours neither. A ratio is the median over the rounds. The script uses the
command line and the public functions alone, because modules move between commits. Use a machine
that does nothing else. Without --data both train on the same made street scenes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipes import RECIPES
from record import ROOT, record

SEED = 0
SCENES, SIZE = 160, "128x96"
PICTURES, PICTURE_SIZE = 24, "800x600"
# Calls of `useg --help` in a round.
NUM_HELP_CALLS = 5
# Training steps that do not count, and the fewest that do.
WARMUP_STEPS, MIN_STEPS = 2, 3
HELP_LIMIT_SECONDS = 0.3
M1 = {
    **RECIPES["course"],
    "train.augment": "true",
    "train.seed": SEED,
    "train.steps": 10**6,
    "train.validate_every": 10**6,
}
UNITS = {
    "help": "s",
    "train": "images/s",
    "network": "images/s",
    "predict": "images/s",
}
CALLS = """
import json, os, sys, time
# Threads sleep while they wait, whatever else runs; the command line decides that for itself.
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
import numpy as np
from PIL import Image
import useg

model, folder, seconds = useg.load(sys.argv[1]), sys.argv[2], float(sys.argv[3])
image = np.array(Image.open(folder).convert("RGB"))
model(image)
times = []
while len(times) < 5 or sum(times) < seconds:
    began = time.perf_counter()
    model(image)
    times.append(time.perf_counter() - began)
print(json.dumps(sorted(times)[len(times) // 2]))
"""


class Checkout:
    """A commit in a folder of its own.

    Args:
        commit: its full hash.
        root: the folder.
    """

    def __init__(self, commit: str, root: Path) -> None:
        self.commit = commit
        package = root / "src" if (root / "src" / "useg").is_dir() else root
        self.environment = {**os.environ, "PYTHONPATH": str(package), "USEG_CACHE": "off"}
        place = self.run("-c", "import useg; print(useg.__file__)")
        assert Path(place.strip()).is_relative_to(root), f"{place} is not in the checkout"

    def run(self, *words: object) -> str:
        """Run this Python on the checkout's useg; returns its standard output."""
        command = [sys.executable, *map(str, words)]
        ran = subprocess.run(
            command, env=self.environment, cwd=ROOT.parent, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{' '.join(command)} failed: {ran.stderr}"
        return ran.stdout

    def useg(self, *words: object) -> str:
        """Run the command line."""
        return self.run("-m", "useg", *words)

    def help(self) -> float:
        """Return the median seconds of `useg --help`."""
        return statistics.median(
            seconds_of(lambda: self.useg("--help")) for _ in range(NUM_HELP_CALLS)
        )

    def train(self, data: Path, out: Path, seconds: float) -> float:
        """Train M1 until the time is up and interrupt it; returns images per second."""
        command = [sys.executable, "-m", "useg", "--quiet", "train", str(data), "--out", str(out)]
        for key, value in M1.items():
            command += ["--set", f"{key}={value}"]
        with subprocess.Popen(
            command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as running:
            rows: list[dict[str, Any]] = []
            # The time when the first step was logged.
            began = 0.0
            while (
                not began
                or time.perf_counter() < began + seconds
                or len(rows) < WARMUP_STEPS + MIN_STEPS
            ):
                assert running.poll() is None, f"training ended with {running.returncode}"
                time.sleep(0.05)
                rows = rows_of(out / "log.jsonl")
                began = began or (time.perf_counter() if rows else 0.0)
            running.send_signal(signal.SIGTERM)
        rows = rows_of(out / "log.jsonl")
        steps = len(rows) - WARMUP_STEPS
        seconds = float(rows[-1]["seconds"] - rows[WARMUP_STEPS - 1]["seconds"])
        return steps * int(M1["train.batch"]) / seconds

    def network(self, model: Path, picture: Path, seconds: float) -> float:
        """Return pictures of the training size per second, by calls of the loaded model."""
        return 1 / float(self.run("-c", CALLS, model, picture, seconds))

    def predict(self, model: Path, pictures: Path, out: Path) -> float:
        """Return pictures per second of the whole `useg predict`, files and start included."""
        words = ("--quiet", "predict", model, pictures, "--out", out, "--no-overlays")
        return len(list(pictures.iterdir())) / seconds_of(lambda: self.useg(*words))


def rows_of(log: Path) -> list[dict[str, Any]]:
    """Return the rows of a log that is still being written."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def seconds_of(job: Callable[[], Any]) -> float:
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Checkout]:
    """Check a commit out into a new folder, and remove it afterwards."""
    git = ["git", "-C", str(ROOT)]
    named = ["rev-parse", "--verify", f"{commit}^{{commit}}"]
    full = subprocess.run([*git, *named], capture_output=True, text=True, check=True).stdout.strip()
    add = ["worktree", "add", "--detach", "--quiet", str(folder), full]
    subprocess.run([*git, *add], check=True)
    try:
        yield Checkout(full, folder)
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(folder)], check=True)


def one_round(
    order: Mapping[str, Checkout], data: Path, pictures: Path, root: Path, seconds: float
) -> dict[str, dict[str, float]]:
    """Measure each checkout once, one kind after the other; the model is the first commit's."""
    found: dict[str, dict[str, float]] = {name: {} for name in order}
    model = root / "model"
    for name, checkout in order.items():
        found[name]["help"] = checkout.help()
    for name, checkout in order.items():
        with tempfile.TemporaryDirectory(dir=root) as out:
            found[name]["train"] = checkout.train(data, Path(out) / "run", seconds)
            if name == "before" and not model.exists():
                (Path(out) / "run").rename(model)
    picture = min(data.glob("*/*.png"))
    for name, checkout in order.items():
        found[name]["network"] = checkout.network(model, picture, seconds / 4)
    for name, checkout in order.items():
        with tempfile.TemporaryDirectory(dir=root) as out:
            found[name]["predict"] = checkout.predict(model, pictures, Path(out) / "labels")
    return found


def summarise(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return the medians of both, and how many times as fast the second is: median and range."""
    medians = {
        name: {kind: statistics.median(each[name][kind] for each in rounds) for kind in UNITS}
        for name in ("before", "after")
    }
    ratios = {}
    for kind, unit in UNITS.items():
        values = [each["after"][kind] / each["before"][kind] for each in rounds]
        faster = [1 / value for value in values] if unit == "s" else values
        ratios[kind] = {
            "value": statistics.median(faster),
            "lowest": min(faster),
            "highest": max(faster),
        }
    return {"units": UNITS, "medians": medians, "times_as_fast": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20, help="of training in each turn")
    parser.add_argument("--data", type=Path, help="data set to train on")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as temporary,
        checked_out(arguments.before, Path(temporary) / "before") as before,
        checked_out(arguments.after, Path(temporary) / "after") as after,
    ):
        root = Path(temporary)
        made = ("--quiet", "scenes", "--seed", SEED)
        data = arguments.data.resolve() if arguments.data else root / "scenes"
        if not arguments.data:
            before.useg(*made, data, "--count", SCENES, "--size", SIZE)
        before.useg(*made, root / "large", "--count", PICTURES, "--size", PICTURE_SIZE)
        rounds = []
        for k in range(arguments.rounds):
            pair = {"before": before, "after": after}
            order = dict(reversed(pair.items())) if k % 2 else pair
            rounds.append(
                one_round(order, data, root / "large" / "CameraRGB", root, arguments.seconds)
            )
            print(f"round {k + 1}: {json.dumps(rounds[-1])}", flush=True)
        run = tomllib.loads((root / "model" / "run.toml").read_text())
        machine = {key: value for key, value in run["provenance"].items() if isinstance(value, str)}
        for key in ("dataset", "layout", "splits_by"):
            machine.pop(key, None)
        content = {
            "before": before.commit,
            "after": after.commit,
            "machine": machine,
            "threads": os.environ.get("OMP_NUM_THREADS", "all"),
            "seed": SEED,
            "data": arguments.data.name if arguments.data else f"{SCENES} made scenes of {SIZE}",
            "precision": run["train"]["precision"],
            "settings": M1,
            "seconds": arguments.seconds,
            **summarise(rounds),
            "help_limit": HELP_LIMIT_SECONDS,
            "rounds": rounds,
        }
    for kind, ratio in content["times_as_fast"].items():
        one, other = (content["medians"][name][kind] for name in ("before", "after"))
        print(
            f"{kind:8} {one:9.3f} -> {other:9.3f} {UNITS[kind]:9} {ratio['value']:.3f} times as "
            f"fast ({ratio['lowest']:.3f} to {ratio['highest']:.3f})"
        )
    print(record("before_after", content))


if __name__ == "__main__":
    main()
