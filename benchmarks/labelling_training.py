"""Train as `useg label` does, with the number of steps that its minutes give on two idle cores.

    python benchmarks/labelling_training.py round < TASK
    python benchmarks/labelling_training.py train IMAGES OUT --minutes 2

`round` takes the place of `useg.labelling.round_process`. `train` is the final training on a folder
of images that `useg label` has been used on. A busy machine gives the same models, only later.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from generalise import count_steps, reference_speed

from useg.config import Settings
from useg.data.dataset import Dataset, Pair, read_label, read_pair_image
from useg.data.layouts import find_dataset
from useg.data.splits import assign_splits
from useg.inference.predictor import load
from useg.labelling import round_process
from useg.labelling.folder import LabelFolder
from useg.labelling.mask_files import find_paths
from useg.labelling.rounds import Rounds
from useg.labelling.session import SCORED_NAME, SCORED_SHARE
from useg.scoring.metrics import class_ious, confusion, mean_present, tally
from useg.training import loop
from useg.training.schedule import RunLength
from useg.training.trainer import SilentProgress, Trainer

# How often a run is validated.
NUM_VALIDATIONS = 6


def fixed_length(trainer: Trainer, began: float, *, has_report: bool = False) -> RunLength:
    """Return the length of a run that its minutes give on the reference machine."""
    assert trainer.settings.train.minutes
    steps = count_steps(trainer.settings, trainer.settings.train.minutes)
    every = math.ceil(steps / NUM_VALIDATIONS / trainer.batches.per_epoch)
    return RunLength(steps, trainer.settings.train.validate_every or max(1, every))


@contextmanager
def fixed_steps() -> Iterator[None]:
    """Let training count steps instead of watching the clock."""
    original = loop.count_steps
    loop.count_steps = fixed_length
    try:
        with reference_speed():
            yield
    finally:
        loop.count_steps = original


def train(images: Path, out: Path, minutes: float) -> dict[str, Any]:
    """Run the final training; return steps, processor seconds and the score it shows."""
    began = time.process_time()
    rounds = Rounds(LabelFolder(find_paths(images)))
    rounds.load_latest_model()
    scored = out / SCORED_NAME
    with fixed_steps():
        settings = Settings().with_({"train.minutes": SCORED_SHARE * minutes})
        dataset = assign_splits(find_dataset(rounds.folder.paths.root))
        run = loop.fit(dataset, scored, settings, SilentProgress())
        task = rounds.final_training_task(out, (1 - SCORED_SHARE) * minutes)
        task = {**task, "scored": str(scored)}
        round_process.train_final_model(task, time.perf_counter())
    return {
        "steps": [len(run.log), len((out / "log.jsonl").read_text().splitlines())],
        "cpu_seconds": round(time.process_time() - began, 1),
        "shown_mean_iou": round(run.scores.mean_iou, 4),
    }


def judge(model: Path, pairs: list[Pair], dataset: Dataset) -> float:
    """Return the mean IoU of a model on pairs, over the classes that they show."""
    predictor = load(model)
    names = dataset.classes.names
    ids = np.array([names.index(name) for name in predictor.classes.names], np.uint8)
    total = np.zeros((len(names), len(names)), np.int64)
    for pair in pairs:
        answer = ids[predictor(read_pair_image(pair))]
        total += confusion(answer, read_label(pair, dataset), len(names))
    return float(mean_present(class_ious(tally(total))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    jobs.add_parser("round")
    training = jobs.add_parser("train")
    training.add_argument("pictures", type=Path)
    training.add_argument("out", type=Path)
    training.add_argument("--minutes", type=float, default=2)
    arguments = parser.parse_args()
    if arguments.job == "round":
        with fixed_steps():
            round_process.train_round(json.loads(sys.stdin.readline()), time.perf_counter())
        return
    print(json.dumps(train(arguments.pictures, arguments.out, arguments.minutes)))


if __name__ == "__main__":
    main()
