"""Compare variants of the training recipe after the same time, on parts of the TRAINING images.

    python benchmarks/trials.py FOLDER [--only NAME ...] [--sets carla camvid isbi]
        [--seeds 0 1 2] [--seconds 100]

FOLDER holds ``carla``, ``camvid`` and ``isbi2012``. The images that published results are scored
on are never used: of CARLA and ISBI the first fifth of the training block is held out here, of
CamVid a whole recording, so that a variant has to do well on another street.

The number of steps is what two idle cores of the machine on which SPEEDS was measured do in
``--seconds``, so a busy machine gives the same results, only later. Each run is scored at its last
step, with averages of its weights (EMA over 2, 5 and 10 % of the steps), and with recomputed
batch-norm statistics. Rows are added to ``results/trials.json``; a stored row is not computed
again.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import RESULTS, record
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from useg.classes import IGNORE
from useg.config import Settings
from useg.data.dataset import Dataset
from useg.data.layouts import find_dataset
from useg.data.splits import assign_splits
from useg.machine import describe_machine
from useg.models.segmenter import Segmenter
from useg.scoring.metrics import components, score
from useg.training import batches
from useg.training.plan import make_plan
from useg.training.plan_rules import COARSE_STEP_COST
from useg.training.schedule import Schedule, make_optimizer
from useg.training.trainer import SilentProgress, Trainer, compute_logits, prepare_trainer, validate

FOLDERS = {"carla": "carla", "camvid": "camvid", "isbi": "isbi2012"}
# The recording of CamVid that is held out.
HELD_OUT = "0006R0"
# Images per second of training on two idle cores.
SPEEDS = {
    "plain": {"carla": 12.9, "camvid": 12.3, "isbi": 10.2},
    "lite0": {"carla": 10.6, "camvid": 9.7, "isbi": 8.9},
}
# A class with a smaller share of the training pixels is rare.
RARE = 0.02
# The standard deviation of the paper's displacements, in pixels.
ELASTIC = 10.0
# The paper's w0, and its sigma in pixels.
BORDER, NEAR = 10.0, 5.0
AVERAGES = (0.02, 0.05, 0.1)

Batch = tuple[Tensor, Tensor]


def paste_rare(
    trainer: Trainer, batches: Iterator[Batch], random: np.random.Generator
) -> Iterator[Batch]:
    """Paste the rare pixels of a crop into the next crop of the batch, with probability 1/2."""
    rare = torch.from_numpy(
        np.append(trainer.shares < RARE, np.zeros(256 - len(trainer.shares), bool))
    )
    for x, target in batches:
        pasted = rare[target] & torch.from_numpy(random.random(len(x)) < 0.5)[:, None, None]
        x, target = (
            torch.where(mask, part.roll(1, 0), part)
            for part, mask in ((x, pasted.roll(1, 0)[:, None]), (target, pasted.roll(1, 0)))
        )
        yield x, target


def choose_richer(
    trainer: Trainer, batches: Iterator[Batch], random: np.random.Generator
) -> Iterator[Batch]:
    """Of every two crops take the one with more pixels of rare classes."""
    weights = torch.from_numpy(
        np.append(
            1 / np.sqrt(np.maximum(trainer.shares, 1e-4)), np.zeros(256 - len(trainer.shares))
        )
    )
    while True:
        (x, target), (other, others) = next(batches), next(batches)
        richer = weights[others].mean((1, 2)) > weights[target].mean((1, 2))
        yield (
            torch.where(richer[:, None, None, None], other, x),
            torch.where(richer[:, None, None], others, target),
        )


def deform(
    trainer: Trainer, batches: Iterator[Batch], random: np.random.Generator
) -> Iterator[Batch]:
    """Deform elastically: displacements on a grid of 3 by 3, bicubic between them.

    Source: Ronneberger, Fischer and Brox (2015), section 3.1.
    """
    for x, target in batches:
        (height, width), margin = x.shape[2:], (x.shape[2] - target.shape[1]) // 2
        coarse = torch.from_numpy(random.normal(0, ELASTIC, (len(x), 2, 3, 3)).astype(np.float32))
        moved = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True).permute(
            0, 2, 3, 1
        ) * (2 / torch.tensor([width, height]))
        straight = torch.eye(2, 3).expand(len(x), 2, 3)
        grid = F.affine_grid(straight, (len(x), 1, height, width), align_corners=False) + moved
        around = F.pad(target[:, None].float(), (margin,) * 4, value=IGNORE)
        label = F.grid_sample(around, grid, "nearest", "reflection", align_corners=False)[
            :, 0
        ].long()
        yield (
            F.grid_sample(x, grid, "bilinear", "reflection", align_corners=False),
            label[:, margin : height - margin, margin : width - margin],
        )


def weigh_borders(
    trainer: Trainer, batches: Iterator[Batch], random: np.random.Generator
) -> Iterator[Batch]:
    """Weight the cross-entropy between regions of class 1, most where the gap is thin.

    Source: Ronneberger, Fischer and Brox (2015), equation 2.
    """
    weights = torch.empty(0)

    def weighted(logits: Tensor, target: Tensor) -> Tensor:
        return (
            F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="none") * weights
        ).sum() / weights.sum()

    trainer.loss = weighted
    for x, target in batches:
        weights = torch.from_numpy(np.stack([border_weights(part) for part in target.numpy()]))
        yield x, target


def border_weights(label: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return 1, and up to ``1 + BORDER`` between two neighbouring regions of class 1."""
    numbers, reach = components(label == 1), int(4 * NEAR)
    nearest = np.full((2, *label.shape), np.inf)
    for number, box in enumerate(ndimage.find_objects(numbers), 1):
        around = tuple(slice(max(0, part.start - reach), part.stop + reach) for part in box)
        away = ndimage.distance_transform_edt(numbers[around] != number)
        window = nearest[:, *around]
        window[:] = np.sort([*window, away], axis=0)[:2]
    return np.where(
        numbers > 0, 1, 1 + BORDER * np.exp(-(nearest.sum(0) ** 2) / (2 * NEAR**2))
    ).astype(np.float32)


# Name -> settings, constants of useg.training.batches, and "mend": a function that changes batches.
# "A, B" is compared with "A", other variants with "lite0", and "lite0" with "plain".
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"model.encoder": "plain"},
    "learning rate 3e-3": {"train.learning_rate": 0.003},
    "learning rate 3e-3, crops of 384x288": {
        "train.learning_rate": 0.003,
        "data.size": "384x288",
        "data.crop": "256x192",
    },
    "learning rate 3e-3, label smoothing 0.05": {
        "train.learning_rate": 0.003,
        "train.label_smoothing": 0.05,
    },
    "learning rate 3e-3, strong colours": {
        "train.learning_rate": 0.003,
        "MAX_CONTRAST_CHANGE": 0.6,
        "MAX_BRIGHTNESS_CHANGE": 0.7,
        "MAX_TINT_CHANGE": 0.2,
    },
    "lite0": {},
    "learning rate 3e-3, ce + lovasz": {"train.learning_rate": 0.003, "train.loss": "ce + lovasz"},
    "learning rate 9e-3": {"train.learning_rate": 0.009},
    "ce + lovasz": {"train.loss": "ce + lovasz"},
    "half size first": {"train.coarse": 0.67},
    "half size first, for 80 % of the steps": {"train.coarse": 0.8},
    "half size first, ce + lovasz": {"train.coarse": 0.67, "train.loss": "ce + lovasz"},
    "plain, learning rate 5e-3": {"model.encoder": "plain", "train.learning_rate": 0.005},
    "half size first, rare things pasted": {"train.coarse": 0.67, "mend": paste_rare},
    "half size first, the richer of two crops": {"train.coarse": 0.67, "mend": choose_richer},
    "half size first, elastic": {"train.coarse": 0.67, "mend": deform},
    "plain, elastic": {"model.encoder": "plain", "mend": deform},
    "plain, border weights": {"model.encoder": "plain", "mend": weigh_borders},
}


def inner(folder: Path, name: str) -> Dataset:
    """Return the training part of a data set, with a part of it held out."""
    dataset = assign_splits(find_dataset(folder / FOLDERS[name]), "auto", 0.2)
    pairs = [pair for pair in dataset.pairs if pair.split == "train"]
    if name == "camvid":
        held = [pair for pair in pairs if pair.image.name.startswith(HELD_OUT)]
        others = [pair for pair in pairs if pair not in held]
        return replace(
            dataset, pairs=(*others, *(replace(pair, split="val") for pair in held[::2]))
        )
    pairs.sort(key=lambda pair: (len(pair.image.stem), pair.image.stem))
    count, gap = len(pairs) // 5, max(1, len(pairs) // 30)
    return replace(
        dataset,
        pairs=(*(replace(pair, split="val") for pair in pairs[:count]), *pairs[count + gap :]),
    )


@contextmanager
def constants(changes: dict[str, Any]) -> Iterator[None]:
    """Change constants of useg.training.batches for a while."""
    before = {name: getattr(batches, name) for name in changes}
    for name, value in changes.items():
        setattr(batches, name, value)
    yield
    for name, value in before.items():
        setattr(batches, name, value)


def run(folder: Path, name: str, variant: str, seed: int, seconds: float) -> dict[str, Any]:
    """Train once; return the scores of its weights and of their averages."""
    changes = VARIANTS[variant]
    settings = {
        "model.encoder": "lite0",
        "train.epochs": 1,
        "train.seed": seed,
        **{key: value for key, value in changes.items() if "." in key},
    }
    dataset = inner(folder, name)
    plan = make_plan(Settings().with_(settings), dataset)
    trainer = prepare_trainer(dataset, plan, SilentProgress())
    chosen = trainer.settings
    assert chosen.train.batch
    assert chosen.data.crop
    smaller = 256 * 192 / (chosen.data.crop[0] * chosen.data.crop[1]) if name != "isbi" else 1
    coarse = chosen.train.coarse or 0.0
    # The mean cost of a step, where a step at full size costs 1.
    cost = coarse * COARSE_STEP_COST + 1 - coarse
    steps = int(
        seconds * SPEEDS[str(chosen.model.encoder)][name] * smaller / chosen.train.batch / cost
    )
    mend = changes.get("mend", lambda trainer, batches, random: batches)
    with constants({key: value for key, value in changes.items() if key.isupper()}):
        averages = learn(trainer, seed, Schedule(steps, coarse=coarse), mend)
    row: dict[str, Any] = {
        "variant": variant,
        "set": name,
        "seed": seed,
        "steps": steps,
        "batch": chosen.train.batch,
        "settings": settings,
    }
    row["mean_iou"] = mean_iou(trainer, trainer.model)
    row["new_statistics"] = mean_iou(trainer, recomputed(trainer, steps))
    return row | {
        f"ema_{share:g}": mean_iou(trainer, average) for share, average in averages.items()
    }


def learn(
    trainer: Trainer, seed: int, length: Schedule, mend: Callable[..., Iterator[Batch]]
) -> dict[float, Segmenter]:
    """Train; return averages of the weights."""
    # Batches that a step draws.
    drawn = 2 if mend is choose_richer else 1
    batches = mend(
        trainer,
        trainer.batches.stream(0, lambda number: length.is_coarse(number // drawn)),
        np.random.default_rng(seed),
    )
    optimizer, schedule = make_optimizer(trainer, length)
    torch.manual_seed(seed)
    trainer.set_training_mode()
    averages = {share: copy.deepcopy(trainer.model) for share in AVERAGES}
    for k, (x, target) in enumerate(islice(batches, length.steps)):
        trainer.train_step(optimizer, x, target)
        schedule.step()
        for share, average in averages.items():
            kept = min(1 - 1 / (share * length.steps + 1), (1 + k) / (10 + k))
            tensors = [
                [each for each in model.state_dict().values() if each.is_floating_point()]
                for model in (average, trainer.model)
            ]
            torch._foreach_lerp_(*tensors, 1 - kept)
    return averages


def recomputed(trainer: Trainer, steps: int) -> Segmenter:
    """Return the model with batch-norm statistics recomputed from 30 further batches."""
    model = copy.deepcopy(trainer.model).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for x, _ in islice(trainer.batches.stream(steps), 30):
            compute_logits(model, x, trainer.precision)
    return model


def mean_iou(trainer: Trainer, model: Segmenter) -> float:
    counts = validate(replace(trainer, model=model), trainer.val).counts
    return float(score(counts, model.classes.names, len(trainer.val)).mean_iou)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
                wanted = {
                    "variant": variant,
                    "set": name,
                    "seed": seed,
                    "seconds": arguments.seconds,
                }
                if any(wanted.items() <= row.items() for row in rows):
                    continue
                row = {**wanted, **run(arguments.folder, name, variant, seed, arguments.seconds)}
                rows = json.loads(path.read_text())["runs"] if path.exists() else []
                record("trials", {"machine": describe_machine(), "runs": [*rows, row]})
                print(
                    {
                        key: round(value, 4) if isinstance(value, float) else value
                        for key, value in row.items()
                        if key != "settings"
                    },
                    flush=True,
                )


if __name__ == "__main__":
    main()
