"""Which recipe learns most in the same time? Variants of `useg train`'s own, on parts of the TRAINING pictures of three data sets.

    python benchmarks/trials.py FOLDER [--only NAME ...] [--sets carla camvid isbi] [--seeds 0 1 2] [--seconds 100]

FOLDER holds ``carla``, ``camvid`` and ``isbi2012``. What results are judged on is never looked at: of CARLA and ISBI the first fifth of the
training block is held out here, of CamVid a recording of its own, so that a variant has to do well on another street. The number of steps
is that of ``--seconds`` on two idle cores of the machine that the speeds below come from, so a busy machine changes nothing but the time
that this takes. Each run is scored at its last step, and so are averages of its weights (EMA over 2, 5 and 10 % of the steps) and its
weights with batch-norm statistics taken anew. Rows are added to ``results/trials.json``; a row that is there is not computed again.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, record
from torch import nn

from useg.config import Settings
from useg.data import augment
from useg.data.dataset import Dataset
from useg.data.layouts import find
from useg.data.splits import assign_splits
from useg.models.segmenter import Segmenter
from useg.scoring.metrics import score
from useg.training.length import Length
from useg.training.loop import Silent
from useg.training.plan import make_plan
from useg.training.trainer import Trainer, prepare
from useg.training.validation import compute, validate

FOLDERS = {"carla": "carla", "camvid": "camvid", "isbi": "isbi2012"}
HELD_OUT = "0006R0"  # of CamVid's recordings
SPEEDS = {  # images per second of training on two idle cores
    "plain": {"carla": 12.9, "camvid": 12.3, "isbi": 10.2}, "lite0": {"carla": 10.6, "camvid": 9.7, "isbi": 8.9}
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {  # settings, and constants of useg.data.augment
    "plain": {"model.encoder": "plain"},
    "learning rate 3e-3": {"train.learning_rate": 0.003},
    "3e-3, crops of 384x288": {"train.learning_rate": 0.003, "data.size": "384x288", "data.crop": "256x192"},
    "3e-3, label smoothing 0.05": {"train.learning_rate": 0.003, "train.label_smoothing": 0.05},
    "3e-3, strong colours": {"train.learning_rate": 0.003, "CONTRAST": 0.6, "BRIGHTNESS": 0.7, "TINT": 0.2},
    "lite0": {},
    "3e-3, ce + lovasz": {"train.learning_rate": 0.003, "train.loss": "ce + lovasz"},
    "learning rate 9e-3": {"train.learning_rate": 0.009},
    "ce + lovasz": {"train.loss": "ce + lovasz"},
    "half size first": {"train.coarse": 0.67},
    "plain, learning rate 5e-3": {"model.encoder": "plain", "train.learning_rate": 0.005},
}
AVERAGES = (0.02, 0.05, 0.1)


def inner(folder: Path, name: str) -> Dataset:
    """The training part of a set, with a part of it held out."""
    dataset = assign_splits(find(folder / FOLDERS[name]), "auto", 0.2)
    pairs = [pair for pair in dataset.pairs if pair.split == "train"]
    if name == "camvid":
        held = [pair for pair in pairs if pair.image.name.startswith(HELD_OUT)]
        others = [pair for pair in pairs if pair not in held]
        return replace(dataset, pairs=(*others, *(replace(pair, split="val") for pair in held[::2])))
    pairs.sort(key=lambda pair: (len(pair.image.stem), pair.image.stem))
    count, gap = len(pairs) // 5, max(1, len(pairs) // 30)
    return replace(dataset, pairs=(*(replace(pair, split="val") for pair in pairs[:count]), *pairs[count + gap :]))


@contextmanager
def constants(changes: dict[str, Any]) -> Iterator[None]:
    """Change what crops are drawn from."""
    before = {name: getattr(augment, name) for name in changes}
    for name, value in changes.items():
        setattr(augment, name, value)
    yield
    for name, value in before.items():
        setattr(augment, name, value)


def run(folder: Path, name: str, variant: str, seed: int, seconds: float) -> dict[str, Any]:
    """Train once; return the scores of its weights and of their averages."""
    changes = VARIANTS[variant]
    settings = {"model.encoder": "lite0", "train.epochs": 1, "train.seed": seed, **{key: value for key, value in changes.items() if "." in key}}
    dataset = inner(folder, name)
    plan = make_plan(Settings().with_(settings), dataset)
    trainer = prepare(dataset, plan, Silent())
    chosen = trainer.settings
    assert chosen.train.batch
    assert chosen.data.crop
    smaller = 256 * 192 / (chosen.data.crop[0] * chosen.data.crop[1]) if name != "isbi" else 1
    coarse = chosen.train.coarse or 0.0
    cost = coarse / 3 + 1 - coarse  # of a step: one at half the size takes a third of the time
    steps = int(seconds * SPEEDS[str(chosen.model.encoder)][name] * smaller / chosen.train.batch / cost)
    trainer.batches = replace(trainer.batches, coarse=int(coarse * steps))
    with constants({key: value for key, value in changes.items() if "." not in key}):
        averages = learn(trainer, seed, steps)
    row: dict[str, Any] = {"variant": variant, "set": name, "seed": seed, "steps": steps, "batch": chosen.train.batch, "settings": settings}
    row["mean_iou"] = mean_iou(trainer, trainer.model)
    row["new_statistics"] = mean_iou(trainer, recomputed(trainer, steps))
    return row | {f"ema_{share:g}": mean_iou(trainer, average) for share, average in averages.items()}


def learn(trainer: Trainer, seed: int, steps: int) -> dict[float, Segmenter]:
    """Train; return averages of the weights."""
    optimizer, schedule = trainer.optimizer(Length(steps))
    torch.manual_seed(seed)
    trainer.model.train()
    averages = {share: copy.deepcopy(trainer.model) for share in AVERAGES}
    for k, (x, target) in enumerate(islice(trainer.batches.stream(0), steps)):
        trainer.learn(optimizer, x, target)
        schedule.step()
        for share, average in averages.items():
            kept = min(1 - 1 / (share * steps + 1), (1 + k) / (10 + k))
            tensors = [[each for each in model.state_dict().values() if each.is_floating_point()] for model in (average, trainer.model)]
            torch._foreach_lerp_(*tensors, 1 - kept)
    return averages


def recomputed(trainer: Trainer, steps: int) -> Segmenter:
    """The model with batch-norm statistics of 30 further batches."""
    model = copy.deepcopy(trainer.model).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for x, _ in islice(trainer.batches.stream(steps), 30):
            compute(model, x, trainer.precision)
    return model


def mean_iou(trainer: Trainer, model: Segmenter) -> float:
    counts = validate(model, trainer.val, trainer.precision).counts
    return float(score(counts, model.classes.names, len(trainer.val)).mean_iou)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--sets", nargs="+", choices=FOLDERS, default=list(FOLDERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=100)
    arguments = parser.parse_args()
    path = RESULTS / "trials.json"
    for seed in arguments.seeds:
        for name in arguments.sets:
            for variant in arguments.only:
                rows = json.loads(path.read_text())["runs"] if path.exists() else []
                wanted = {"variant": variant, "set": name, "seed": seed, "seconds": arguments.seconds}
                if any(wanted.items() <= row.items() for row in rows):
                    continue
                row = {**wanted, **run(arguments.folder, name, variant, seed, arguments.seconds)}
                rows = json.loads(path.read_text())["runs"] if path.exists() else []
                record("trials", {"runs": [*rows, row]})
                print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items() if key != "settings"}, flush=True)


if __name__ == "__main__":
    main()
