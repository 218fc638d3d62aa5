"""Train on some recordings, laboratories or patients, and judge on others that were left out.

    python benchmarks/generalise.py FOLDER [--only NAME ...] [--folds carla camvid ...]
        [--minutes 2 5 10] [--seeds 0 1 2] [--set KEY=VALUE ... --name NAME]

FOLDER holds the data sets that ``FOLDS`` names. In each fold a whole group is left out: a street,
a recording, a laboratory, patients, a series. A model is scored on the left-out groups ("away") and
on a held-out block of the groups that it was trained on ("home"). Scores are mean IoU over the
classes that are present, and the share of right pixels, at the labels' own resolution, with the
weights of the last step.

The number of steps is what ``--minutes`` gives on two idle cores of the machine on which
``PIXELS_PER_SECOND`` was measured. So a busy machine gives the same results, only later. ``--set``
judges other settings under a ``--name`` of their own. Each run becomes a row of
``results/generalise.json`` as soon as it ends; a stored row is not computed again.

``--peer`` trains another package or recipe instead, on the same images for as many steps of as many
pixels: ``smp`` (segmentation_models.pytorch with the same ImageNet weights; loss and rate are those
of its CamVid example), ``unet`` (plain U-Net in plain PyTorch) or ``course`` (a course's recipe).
``--summary`` prints what is stored: the mean and the worst of all folds for each name.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peers_torch import UNet, smp_package
from recipes import RECIPES
from record import RESULTS, commit

from useg.classes import IGNORE
from useg.config import Settings, parse_assignments
from useg.data.dataset import Dataset, Pair
from useg.data.layouts import find_dataset
from useg.machine import describe_machine
from useg.models.encoders import EncoderUNet
from useg.models.pretrained import load_pretrained
from useg.models.segmenter import Segmenter
from useg.scoring.metrics import class_ious, mean_present, tally
from useg.training import plan as planning
from useg.training.plan_rules import COARSE_STEP_COST
from useg.training.schedule import Schedule, make_optimizer
from useg.training.trainer import SilentProgress, Trainer, compute_logits, prepare_trainer, validate

# Pixels of training per second on two idle cores, and the share of the time that steps take.
PIXELS_PER_SECOND = {
    encoder: images * 256 * 192
    for encoder, images in {"plain": 12.9, "lite0": 15.9, "lite1": 13.8, "lite2": 12.9}.items()
}
STEP_SHARE = 0.85

# Share of each training group that is held out as one block, and of its images next to it that are
# not used at all.
HOME_SHARE, GAP_SHARE = 0.15, 0.03
# Of long films, so many images are scored.
MAX_SCORED = 48


@dataclass(frozen=True)
class Fold:
    """Groups to train on, and groups that are left out.

    Args:
        folder: The data set.
        group: The group of an image, found in the name of its file.
        away: Which groups are left out, as a regular expression.
        elsewhere: Another data set with the same classes that is left out whole.
        uncounted: Names of classes of ``elsewhere`` without which the mean is given too.
    """

    folder: str
    group: str = r"^"
    away: str = r"$^"
    elsewhere: str = ""
    uncounted: tuple[str, ...] = ()


# Name -> what is left out. CamVid's validation images are cut out of the recording 0016E5.
FOLDS: dict[str, Fold] = {
    "carla": Fold(
        "carla", r"^000", elsewhere="carla_more", uncounted=("None", "Other", "class 0", "class 3")
    ),
    "camvid 0006R0": Fold("camvid", r"^[^_]+", "0006R0"),
    "camvid 0001TP": Fold("camvid", r"^[^_]+", "0001TP"),
    "camvid 0016E5": Fold("camvid", r"^[^_]+", "0016E5"),
    "cells d1": Fold("bloodcells", r"^d\d", "d1"),
    "cells d2": Fold("bloodcells", r"^d\d", "d2"),
    "vessels": Fold("vessels_chase", r"^s\d+", r"s(03|06|09|12)"),
    "tiles": Fold("magnetic_tiles", r"^exp\d", r"exp[14]"),
    "isbi": Fold("isbi2012", r"^", r"$^"),
    "cropweed": Fold("cropweed", r"^\d\d", r"0[0-2]"),
}


def group_of(pair: Pair, fold: Fold) -> str:
    found = re.search(fold.group, pair.image.name)
    assert found, f"{pair.image.name} has no group"
    return found[0] or fold.folder


def is_left_out(pair: Pair, fold: Fold) -> bool:
    return re.fullmatch(fold.away, group_of(pair, fold)) is not None


def elsewhere_group(pair: Pair) -> str:
    """Return the town and light, or the source, of an image of ``carla_more``."""
    return re.split(r"_?\d{4,}|_\d", pair.image.stem)[0]


def split(folder: Path, fold: Fold) -> tuple[Dataset, dict[Path, str]]:
    """Return a data set whose validation part holds home and away, and each image's group there.

    Home is a block from the middle of each training group.
    """
    dataset = find_dataset(folder / fold.folder)
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in sorted(dataset.pairs, key=lambda pair: natural(pair.image.stem)):
        groups[group_of(pair, fold)].append(pair)
    pairs: list[Pair] = []
    scored: dict[Path, str] = {}
    for name, members in groups.items():
        if re.fullmatch(fold.away, name):
            chosen = spread(members, MAX_SCORED)
            scored |= {pair.image: name for pair in chosen}
            pairs += [replace(pair, split="val") for pair in chosen]
            continue
        count, gap = round(HOME_SHARE * len(members)), round(GAP_SHARE * len(members))
        start = len(members) // 2
        home = spread(members[start : start + count], MAX_SCORED // 2)
        kept = members[: max(0, start - gap)] + members[start + count + gap :]
        scored |= {pair.image: "home" for pair in home}
        pairs += [replace(pair, split="val") for pair in home]
        pairs += [replace(pair, split="train") for pair in kept]
    if fold.elsewhere:
        other = find_dataset(folder / fold.elsewhere)
        for pair in other.pairs:
            scored[pair.image] = elsewhere_group(pair)
            pairs.append(replace(pair, split="val"))
    return replace(dataset, pairs=tuple(pairs)), scored


def natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def spread(items: Sequence[Pair], count: int) -> list[Pair]:
    if len(items) <= count:
        return list(items)
    return [items[k * len(items) // count] for k in range(count)]


@contextmanager
def reference_speed() -> Iterator[None]:
    """Let the planner believe that it has measured the speed of the reference machine."""
    measure = planning.measure_training_speed

    def known(network: torch.nn.Module, *_: object) -> float:
        return PIXELS_PER_SECOND["lite0" if hasattr(network, "encoder") else "plain"]

    planning.measure_training_speed = known
    try:
        yield
    finally:
        planning.measure_training_speed = measure


def count_steps(settings: Settings, minutes: float) -> int:
    """Return how many steps the reference machine takes in the time."""
    crop, batch = settings.data.crop, settings.train.batch
    assert crop
    assert batch
    known = settings.model.encoder in PIXELS_PER_SECOND
    kind = settings.model.encoder if known else "lite0"
    coarse = settings.train.coarse or 0.0
    cost = coarse * COARSE_STEP_COST + 1 - coarse
    pixels = STEP_SHARE * 60 * minutes * PIXELS_PER_SECOND[kind]
    width = (settings.model.width or 16) / 16
    return max(1, int(pixels / (batch * crop[0] * crop[1] * cost * width**2)))


def run(
    folder: Path, fold: Fold, changes: dict[str, Any], minutes: float, seed: int, peer: str
) -> dict[str, Any]:
    """Train once; return the scores of each group, and what was planned."""
    dataset, scored = split(folder, fold)
    settings = Settings().with_({"train.minutes": minutes, "train.seed": seed, **changes})
    with reference_speed():
        plan = planning.make_plan(settings, dataset)
        trainer = prepare_trainer(dataset, plan, SilentProgress())
    steps = count_steps(trainer.settings, minutes)
    began = time.process_time()
    (PEERS[peer] if peer else learn)(trainer, steps)
    seconds = time.process_time() - began
    groups = [scored[pair.image] for pair in dataset.of("val")]
    kept = trainer.settings
    return {
        "steps": steps,
        "cpu_seconds": round(seconds, 1),
        "plan": {each.key: each.shown for each in plan.decisions},
        "crop": kept.data.crop,
        **score_groups(trainer.model, trainer, groups, fold),
    }


def learn(trainer: Trainer, steps: int) -> None:
    length = Schedule(steps, coarse=trainer.settings.train.coarse or 0.0)
    torch.manual_seed(trainer.settings.train.seed)
    optimizer, scheduler = make_optimizer(trainer, length)
    trainer.set_training_mode()
    for x, target in islice(trainer.batches.stream(0, length.is_coarse), steps):
        trainer.train_step(optimizer, x, target)
        scheduler.step()


class Peer(torch.nn.Module):
    """Another package's network in the place of useg's, with its pixel statistics."""

    def __init__(self, network: torch.nn.Module, like: torch.nn.Module) -> None:
        super().__init__()
        self.network = network
        self.margin, self.stride, self.context = 0, 32, like.context
        self.valid_size = like.valid_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


def learn_smp(trainer: Trainer, steps: int) -> None:
    """Train as the CamVid example of segmentation_models.pytorch does."""
    package, model = smp_package(), trainer.model
    channels, num_classes = len(model.mean.flatten()), len(model.classes)
    network = package.Unet(
        "timm-tf_efficientnet_lite0",
        encoder_weights=None,
        in_channels=channels,
        classes=num_classes,
    )
    like = EncoderUNet("lite0", channels, num_classes)
    load_pretrained(like)
    published = {k: v for k, v in like.encoder.state_dict().items() if v.ndim}
    own = {k: v for k, v in network.encoder.state_dict().items() if v.ndim}
    # Both name their layers in the same order; the package also has the last layer's.
    renamed = dict(zip(own, published.values(), strict=False))
    network.encoder.load_state_dict(renamed, strict=False)
    model.network = Peer(network, like)
    dice = package.losses.DiceLoss(
        package.losses.MULTICLASS_MODE, from_logits=True, ignore_index=IGNORE
    )
    learn_plainly(trainer, steps, dice, 2e-4, cosine=True)


def learn_unet(trainer: Trainer, steps: int) -> None:
    """Train a plain U-Net with cross-entropy and Adam, as tutorials do."""
    model = trainer.model
    network = UNet(len(model.mean.flatten()), len(model.classes), 16, True, 2, False, 0.0)
    model.network = Peer(network, EncoderUNet("lite0", 3, 2))
    learn_plainly(trainer, steps, torch.nn.CrossEntropyLoss(ignore_index=IGNORE), 1e-3)


def learn_plainly(
    trainer: Trainer, steps: int, criterion: Any, rate: float, *, cosine: bool = False
) -> None:
    """Train on crops that are flipped at random and otherwise not changed."""
    torch.manual_seed(trainer.settings.train.seed)
    optimizer = torch.optim.Adam(trainer.model.parameters(), rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if cosine else None
    trainer.model.train()
    for x, target in islice(replace(trainer.batches, flips=None).stream(0), steps):
        if torch.rand(()) < 0.5:
            x, target = x.flip(3), target.flip(2)
        optimizer.zero_grad()
        logits = compute_logits(trainer.model, x, trainer.precision).float()
        criterion(logits, target).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


PEERS: dict[str, Callable[[Trainer, int], None]] = {
    "smp": learn_smp,
    "unet": learn_unet,
    "course": learn,
}


def score_groups(
    model: Segmenter, trainer: Trainer, groups: Sequence[str], fold: Fold
) -> dict[str, Any]:
    """Score each group of the validation samples, and all that are away together."""
    names = model.classes.names
    counts: dict[str, NDArray[np.int64]] = {}
    for name in dict.fromkeys(groups):
        samples = [trainer.val[k] for k, group in enumerate(groups) if group == name]
        counts[name] = validate(replace(trainer, model=model), samples).counts
    away = [each for name, each in counts.items() if name != "home"]
    if away:
        counts["away"] = np.sum(away, axis=0)
    counted = [name not in fold.uncounted for name in names]
    rows = {}
    for name, each in counts.items():
        ious = class_ious(tally(each))
        rows[name] = {
            "mean_iou": float(mean_present(ious)),
            "pixels_right": float(np.trace(each) / max(1, each.sum())),
        }
        if fold.uncounted:
            rows[name]["mean_iou_counted"] = float(mean_present(ious[counted]))
    return {
        "scores": rows,
        "class_ious": dict(
            zip(
                names,
                class_ious(tally(counts["away"] if away else counts["home"])).round(4).tolist(),
                strict=True,
            )
        ),
    }


def store(path: Path, row: dict[str, Any]) -> None:
    """Add a row; several processes may do so at once."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = read_rows(path)
        content = {
            "commit": commit(),
            "date": datetime.now(UTC).date().isoformat(),
            "machine": describe_machine(),
            "runs": [*rows, row],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["runs"] if path.exists() else []


def print_summary(rows: Sequence[dict[str, Any]]) -> None:
    """Print the mean over the seeds for each fold, and mean and worst over the folds."""
    found: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        key = row["name"], row["minutes"]
        found.setdefault(key, defaultdict(list))[row["fold"]].append(row["scores"])
    for (name, minutes), folds in found.items():
        print(f"{name}, {minutes:g} minutes")
        for what in ("mean_iou", "pixels_right"):
            means = {
                fold: statistics.mean(
                    100 * (scores.get("away") or scores["home"])[what] for scores in each
                )
                for fold, each in folds.items()
            }
            shown = ", ".join(f"{fold} {value:.1f}" for fold, value in means.items())
            mean, worst = statistics.mean(means.values()), min(means.values())
            print(f"  {what}: mean {mean:.1f}, worst {worst:.1f} ({shown})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--folds", nargs="+", choices=FOLDS, default=list(FOLDS))
    parser.add_argument("--minutes", type=float, nargs="+", default=[2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--name")
    parser.add_argument("--peer", choices=PEERS, default="")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "generalise.json")
    arguments = parser.parse_args()
    if arguments.summary:
        print_summary(read_rows(arguments.out))
        return
    changes = parse_assignments(arguments.set)
    if arguments.peer:
        # Peers know no steps at half the size.
        changes["train.coarse"] = 0
    if arguments.peer == "course":
        changes |= RECIPES["course"]
    called = arguments.name or arguments.peer or "default"
    for seed in arguments.seeds:
        for minutes in arguments.minutes:
            for name in arguments.folds:
                wanted = {"name": called, "fold": name, "minutes": minutes, "seed": seed}
                if any(wanted.items() <= row.items() for row in read_rows(arguments.out)):
                    continue
                result = run(arguments.folder, FOLDS[name], changes, minutes, seed, arguments.peer)
                store(
                    arguments.out,
                    {**wanted, "commit": commit(), "settings": arguments.set, **result},
                )
                shown = {
                    group: " ".join(f"{100 * value:.1f}" for value in each.values())
                    for group, each in result["scores"].items()
                }
                print(
                    called,
                    name,
                    minutes,
                    seed,
                    result["steps"],
                    result["cpu_seconds"],
                    shown,
                    flush=True,
                )


if __name__ == "__main__":
    main()
