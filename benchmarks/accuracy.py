"""How long until `useg train` is as good as a course's recipe after its 40 epochs, on one data set and split?

    python benchmarks/accuracy.py DATA [--minutes 0.3 1 2 5 10] [--seeds 0 1 2]

Wants a machine that does nothing else. Everything is the whole command in a process of its own, decoding included (nothing is cached), and
is scored on the same held-out block at native resolution with the weights of the last step. The course's recipe looks at that block just
once, at its end. The first seed's run of each time fixes the number of steps of the other seeds' runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

from recipes import RECIPES
from record import record, train

EPOCHS = 40


def timed(data: Path, settings: dict[str, Any], minutes: float) -> dict[str, Any]:
    """Train once; return score, wall time of the whole command, and the settings as resolved."""
    began = time.perf_counter()
    ran = train(data, settings, minutes)
    kept = ("steps", "epochs", "images_per_second", "machine", "resolved")
    return {"mean_iou": ran["last_mean_iou"], "wall_seconds": time.perf_counter() - began, **{key: ran[key] for key in kept if key in ran}}


def course(data: Path, seed: int) -> dict[str, Any]:
    return timed(data, {**RECIPES["course"], "train.epochs": EPOCHS, "train.validate_every": EPOCHS, "train.seed": seed}, 1)


def default(data: Path, minutes: float, seed: int, first: dict[str, Any] | None) -> dict[str, Any]:
    steps = {"train.steps": first["steps"]} if first else {}
    return timed(data, {**steps, "train.seed": seed}, minutes)


def summary(courses: list[dict[str, Any]], runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Compare means over the seeds; the time to accuracy is that of the shortest run whose mean is as good as the course's."""
    bar, wall = (statistics.mean(run[key] for run in courses) for key in ("mean_iou", "wall_seconds"))
    means = {name: {key: statistics.mean(run[key] for run in each) for key in ("mean_iou", "wall_seconds")} for name, each in runs.items()}
    reached = [mean["wall_seconds"] for mean in means.values() if mean["mean_iou"] >= bar]
    return {
        "course": {"mean_iou": bar, "wall_seconds": wall}, "minutes": means,
        "time_to_accuracy": {"seconds": min(reached), "share_of_course": min(reached) / wall} if reached else None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, nargs="+", default=[0.3, 1, 2, 5, 10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    os.environ["USEG_CACHE"] = "off"
    courses: list[dict[str, Any]] = []
    runs: dict[str, list[dict[str, Any]]] = {f"{minutes:g}": [] for minutes in arguments.minutes}
    for seed in arguments.seeds:
        courses.append({"seed": seed, **course(arguments.data, seed)})
        for minutes in arguments.minutes:
            own = runs[f"{minutes:g}"]
            own.append({"seed": seed, **default(arguments.data, minutes, seed, own[0] if own else None)})
        done = {name: each for name, each in runs.items() if each}
        content = {"dataset": arguments.data.name, "epochs": EPOCHS, **summary(courses, done), "course_runs": courses, "runs": done}
        print(record(f"accuracy_{arguments.data.name}", content), content["time_to_accuracy"], flush=True)


if __name__ == "__main__":
    main()
