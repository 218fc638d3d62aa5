"""Compare training recipes after the same wall time, on one data set and split.

    python benchmarks/recipes.py DATA --minutes 10 [--only default course plain]
        [--seed 0] [--keep 20]

Every recipe goes through the same command and loop, keeps its best epoch, and is scored on the same
held-out block at native resolution. The course's recipe is meant for 40 epochs, so its score after
40 is stored beside that after the whole time. ``--keep N`` leaves every recipe only N evenly spread
training images, and the same images to be scored on.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

from record import record, train

from useg.data.layouts import find_dataset
from useg.data.split_files import write_split_csv
from useg.data.splits import assign_splits

RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "course": {
        "model.encoder": "plain",
        "model.width": 32,
        "model.normalize": "false",
        "model.dropout": 0.3,
        "model.up_kernel": 3,
        "model.extra_conv": "true",
        "data.size": "128x96",
        "data.standardize": "false",
        "train.batch": 32,
        "train.optimizer": "adam",
        "train.learning_rate": 1e-3,
        "train.schedule": "constant",
        "train.augment": "false",
        "train.class_weights": "none",
        "train.loss": "ce",
    },
    "plain": {"model.encoder": "plain"},
}


def keep_training_images(data: Path, keep: int, folder: Path) -> Path:
    """Write a copy of a data set with only ``keep`` training images; the others are in no split."""
    dataset = assign_splits(find_dataset(data), "auto", 0.2)
    write_split_csv(folder / "split.csv", dataset)
    with open(folder / "split.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    training = [row for row in rows if row["split"] == "train"]
    kept = {training[k * (len(training) - 1) // (keep - 1)]["image"] for k in range(keep)}
    for row in training:
        row["split"] = "train" if row["image"] in kept else "gap"
    with open(folder / "split.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ("image", "split"))
        writer.writeheader()
        writer.writerows(rows)
    for child in data.resolve().iterdir():
        if child.name != "split.csv":
            (folder / child.name).symlink_to(child)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=int)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = (
            keep_training_images(arguments.data, arguments.keep, Path(folder))
            if arguments.keep
            else arguments.data
        )
        for name in arguments.only:
            settings = {**RECIPES[name], "train.seed": arguments.seed}
            ran = train(data, settings, arguments.minutes)
            after_40 = next((row for row in ran["course"] if row["epoch"] >= 40), None)
            result = {
                "dataset": arguments.data.name,
                "num_train": arguments.keep or "all",
                "recipe": name,
                "settings": settings,
            }
            result |= {
                "seed": arguments.seed,
                "minutes": arguments.minutes,
                **ran,
                "after_40_epochs": after_40,
            }
            some = f"_{arguments.keep}images" if arguments.keep else ""
            trained = f"{name}_{arguments.minutes:g}min_seed{arguments.seed}"
            path = record(f"recipes_{arguments.data.name}{some}_{trained}", result)
            print(f"{name}: mean IoU {result['mean_iou']:.1%}, {path}")


if __name__ == "__main__":
    main()
