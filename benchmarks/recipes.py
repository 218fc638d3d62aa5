"""Which recipe gives most in the same wall time? `useg train` against the course's own recipe, on one data set and split.

    python benchmarks/recipes.py DATA --minutes 10 [--only default course lite0] [--seed 0]

Every recipe goes through the same command and loop, keeps its best epoch, and is scored on the same held-out block at native
resolution. The course's recipe is meant for 40 epochs; its score after 40 is stored beside that of the whole time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RECIPES = {
    "default": {},
    "course": {
        "model.width": 32, "model.normalize": "false", "model.dropout": 0.3, "model.up_kernel": 3, "model.extra_conv": "true",
        "data.size": "128x96", "train.batch": 32, "train.optimizer": "adam", "train.learning_rate": 1e-3, "train.schedule": "constant",
        "train.augment": "false", "train.class_weights": "none", "train.loss": "ce",
    },
    "lite0": {"model.encoder": "lite0"},
}  # fmt: skip


def run(name: str, data: Path, minutes: float, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        settings = {**RECIPES[name], "train.seed": seed}
        command = [sys.executable, "-m", "useg", "train", str(data), "--out", str(out), "--minutes", str(minutes)]
        subprocess.run(command + [word for key, value in settings.items() for word in ("--set", f"{key}={value}")], check=True)
        scores = json.loads((out / "scores.json").read_text())
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        scored = [row for row in log if row["mean_iou"] is not None]
        after_40 = [row for row in scored if row["epoch"] >= 40]
        return {
            "recipe": name,
            "settings": settings,
            "seed": seed,
            "minutes": minutes,
            **scores,
            "last_mean_iou": scored[-1]["mean_iou"],
            "epochs": log[-1]["epoch"],
            "after_40_epochs": {key: after_40[0][key] for key in ("mean_iou", "seconds")} if after_40 else None,
            "images_per_second": sorted(row["images_per_second"] for row in log)[len(log) // 2],
            "resolved": (out / "run.toml").read_text().partition("[provenance]")[0],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    for name in arguments.only:
        result = {"commit": commit, "date": datetime.now(UTC).date().isoformat(), "dataset": arguments.data.name}
        result |= run(name, arguments.data, arguments.minutes, arguments.seed)
        path = Path(__file__).parent / "results" / f"recipes_{arguments.data.name}_{name}_{arguments.minutes:g}min_seed{arguments.seed}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{name}: mIoU {result['mean_iou']:.4f}, {path}")


if __name__ == "__main__":
    main()
