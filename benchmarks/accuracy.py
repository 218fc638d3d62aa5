"""Measure how long `useg train` takes to reach the score of a course's recipe after its 40 epochs.

    python benchmarks/accuracy.py DATA [--minutes 1 2 5 10] [--seeds 0 1 2]

Run it on a machine that does nothing else. Each measurement is the whole command in a process of
its own, decoding included: nothing is cached. All runs are scored on the same held-out block, at
native resolution, with the weights of the last step. The course's recipe validates only once, at
its end.

The benchmark takes hours and can be stopped: each run is stored when it ends, and a stored run is
not repeated. Remove the file to start again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from recipes import RECIPES
from record import RESULTS, commit, record, train

EPOCHS = 40


def timed(data: Path, settings: dict[str, Any], minutes: float) -> dict[str, Any]:
    """Train once; return score, wall time of the whole command, and the settings as resolved."""
    began = time.perf_counter()
    ran = train(data, settings, minutes)
    kept = ("steps", "epochs", "images_per_second", "machine", "resolved")
    return {
        "commit": commit(),
        "mean_iou": ran["last_mean_iou"],
        "wall_seconds": time.perf_counter() - began,
        **{key: ran[key] for key in kept if key in ran},
    }


def course(data: Path, seed: int) -> dict[str, Any]:
    return timed(
        data,
        {
            **RECIPES["course"],
            "train.epochs": EPOCHS,
            "train.validate_every": EPOCHS,
            "train.seed": seed,
        },
        1,
    )


def mean(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the means over the seeds, and the seeds."""
    return {
        **{key: statistics.mean(run[key] for run in runs) for key in ("mean_iou", "wall_seconds")},
        "seeds": [run["seed"] for run in runs],
    }


def summary(courses: list[dict[str, Any]], runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Compare means over the seeds.

    The time to accuracy is that of the shortest run whose mean is as good as the course's.
    """
    bar, means = mean(courses), {name: mean(each) for name, each in runs.items() if each}
    seconds = [
        each["wall_seconds"] for each in means.values() if each["mean_iou"] >= bar["mean_iou"]
    ]
    reached = None
    if seconds:
        share = min(seconds) / bar["wall_seconds"]
        reached = {"seconds": min(seconds), "share_of_course": share}
    return {"course": bar, "minutes": means, "time_to_accuracy": reached}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, nargs="*", default=[1, 2, 5, 10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    os.environ["USEG_CACHE"] = "off"
    name = f"accuracy_{arguments.data.name}"
    path = RESULTS / f"{name}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    courses: list[dict[str, Any]] = stored.get("course_runs", [])
    runs: dict[str, list[dict[str, Any]]] = stored.get("runs", {})
    for seed in arguments.seeds:
        for minutes in (None, *arguments.minutes):
            own = courses if minutes is None else runs.setdefault(f"{minutes:g}", [])
            if any(run["seed"] == seed for run in own):
                continue
            ran = (
                course(arguments.data, seed)
                if minutes is None
                else timed(arguments.data, {"train.seed": seed}, minutes)
            )
            own.append({"seed": seed, **ran})
            content = {
                "dataset": arguments.data.name,
                "epochs": EPOCHS,
                **summary(courses, runs),
                "course_runs": courses,
                "runs": runs,
            }
            print(
                record(name, content),
                minutes or "course",
                f"{ran['mean_iou']:.4f} in {ran['wall_seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
