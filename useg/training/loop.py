"""A data set + settings -> a trained model in a run folder: the visible training loop."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from useg.config import Settings, write_settings
from useg.data.cache import CachedSample, build_cache, class_shares, pixel_statistics
from useg.data.dataset import Dataset, Pair
from useg.data.splits import write_split_csv
from useg.errors import UsageError
from useg.files import make_folder
from useg.machine import describe
from useg.models import encoders
from useg.models.segmenter import MODEL_NAME, Segmenter, save
from useg.pictures import curves
from useg.scoring.losses import Loss, make_loss
from useg.scoring.metrics import Scores, score
from useg.training.batches import Batches
from useg.training.optimizer import make_optimizer
from useg.training.plan import Plan, choose_device, choose_precision, make_plan
from useg.training.validation import compute, draw, validate

Row = dict[str, Any]


class Progress(Protocol):
    """What a training run tells while it goes on; the command line shows it as a bar."""

    def say(self, text: str) -> None:
        """A line worth reading once."""

    def decoded(self, done: int, total: int) -> None:
        """Pictures decoded so far."""

    def step(self, row: Row, steps: int, seconds_left: float) -> None:
        """One step done, of ``steps``."""

    def validated(self, row: Row) -> None:
        """An epoch was scored."""


class Silent:
    """Tells nothing."""

    def say(self, text: str) -> None:  # noqa: D102
        pass

    def decoded(self, done: int, total: int) -> None:  # noqa: D102
        pass

    def step(self, row: Row, steps: int, seconds_left: float) -> None:  # noqa: D102
        pass

    def validated(self, row: Row) -> None:  # noqa: D102
        pass


@dataclass(frozen=True)
class Run:
    """What training leaves beside the files: the scores of the kept model, its log, and whether it was interrupted."""

    out: Path
    settings: Settings
    scores: Scores
    log: tuple[Row, ...]
    interrupted: bool


@dataclass
class _Trainer:
    """What a run works with."""

    settings: Settings
    batches: Batches
    val: Sequence[CachedSample]
    model: Segmenter
    loss: Loss
    precision: torch.dtype | None
    pretrained: bool

    def learn(self, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> float:
        """One step of gradient descent; returns the loss."""
        loss = self.loss(compute(self.model, x, self.precision), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    def optimizer(self, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Make the optimiser and schedule of a run of ``steps``."""
        encoder = self.model.network.encoder if self.pretrained and isinstance(self.model.network, encoders.EncoderUNet) else None
        return make_optimizer(self.model, encoder, self.settings.train, steps)

    def validate(self) -> tuple[Scores, list[NDArray[np.uint8]]]:
        """Score the model on the validation samples at native resolution; also returns the predictions."""
        counts, predictions = validate(self.model, self.val, self.precision)
        return score(counts, self.model.classes.names, len(self.val)), predictions


def train(dataset: Dataset, out: Path, settings: Settings, progress: Progress | None = None) -> Run:
    """Train a U-Net and leave the run in a folder.

    Args:
        dataset: pairs with their splits assigned (:func:`useg.data.splits.assign_splits`).
        out: the run folder, new or empty: ``model.safetensors`` (the best by validation mIoU), ``run.toml``, ``split.csv``,
            ``log.jsonl``, ``curves.png``, ``pictures/``.
        settings: what is set; the rest is planned.
        progress: told what happens.

    Raises:
        UsageError: unusable data or settings, or a folder that cannot be written or holds a run already.
    """
    began = time.perf_counter()
    progress = progress or Silent()
    if (out / MODEL_NAME).exists() or (out / "run.toml").exists():
        raise UsageError(f"{out} holds a trained run already; choose another folder with --out, or remove it first")
    parts = {name: [pair for pair in dataset.pairs if pair.split == name] for name in ("train", "val")}
    plan = make_plan(settings, parts["train"])
    for reason in plan.reasons:
        progress.say(reason)
    trainer = _prepare(dataset, parts, plan, progress)
    make_folder(out / "pictures")
    write_split_csv(out / "split.csv", dataset)
    steps = _count_steps(trainer, time.perf_counter() - began)
    settings = trainer.settings.with_({"train.steps": steps})
    trainer.settings = settings
    write_settings(out / "run.toml", settings, {"dataset": str(dataset.root), "layout": dataset.layout, **describe()})
    progress.say(f"train.steps = {steps}: {steps / trainer.batches.per_epoch:.1f} epochs of {len(trainer.batches.samples)} pictures")
    return _loop(trainer, out, dataset, steps, progress)


def _prepare(dataset: Dataset, parts: dict[str, list[Pair]], plan: Plan, progress: Progress) -> _Trainer:
    """Decode the data, measure it, build the network."""
    settings, total, done = plan.settings, sum(map(len, parts.values())), 0

    def count() -> None:
        nonlocal done
        done += 1
        progress.decoded(done, total)

    train, val = (
        build_cache(dataset, parts[name], plan.working, plan.channels, plan.pixels, native=name == "val", progress=count) for name in ("train", "val")
    )
    shares = class_shares(train, len(dataset.classes))
    if not shares.any():
        raise UsageError(f"every pixel of the {len(train)} training masks in {dataset.root} is ignored; check the ignore ids in classes.toml")
    device = choose_device()
    torch.manual_seed(settings.train.seed)
    pretrained = settings.model.pretrained and settings.model.encoder in encoders.ENCODERS
    mean, std = (encoders.pixel_statistics(settings.model.encoder, plan.channels) if pretrained else None) or pixel_statistics(train)
    network = {**settings.model.architecture(), "channels": plan.channels, "classes": len(dataset.classes)}
    model = Segmenter(network, dataset.classes, mean, std, plan.working, plan.pixels)
    if pretrained and isinstance(model.network, encoders.EncoderUNet):
        encoders.load_pretrained(model.network, Path(settings.model.weights) if settings.model.weights else None)
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = None
    if settings.train.class_weights == "sqrt":
        weight = np.where(shares > 0, 1 / np.sqrt(np.maximum(shares, 1e-4)), 0)
        weights = torch.tensor(weight / (weight * shares).sum(), dtype=torch.float32, device=device)
    assert settings.data.crop
    assert settings.train.batch
    batches = Batches(
        train, settings.data.crop, settings.train.batch, settings.train.seed, settings.train.flips if settings.train.augment else None,
        np.array(mean, np.float32), np.array(std, np.float32), model.margin, device,
    )  # fmt: skip
    return _Trainer(
        settings, batches, val, model, make_loss(settings.train.loss, weights), choose_precision(settings.train.precision, device), pretrained
    )


def _count_steps(trainer: _Trainer, seconds_used: float) -> int:
    """How many steps: as set, or as many as fit into the time after measuring a few on a copy of the model."""
    settings = trainer.settings.train
    per_epoch = trainer.batches.per_epoch
    if settings.steps is not None:
        return settings.steps
    if settings.epochs is not None:
        return max(1, round(settings.epochs * per_epoch))
    assert settings.minutes is not None
    probe = replace(trainer, model=copy.deepcopy(trainer.model))
    optimizer, _ = probe.optimizer(1)
    seconds = []
    began = time.perf_counter()
    for x, target in trainer.batches.stream(0, 40):
        probe.learn(optimizer, x, target)
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        if len(seconds) >= 5 and sum(seconds) > 0.03 * 60 * settings.minutes:
            break
    step = float(np.mean(seconds[2:]))  # the first ones warm up; the mean, because what disturbs these will disturb later ones
    began = time.perf_counter()
    probe.val = trainer.val[:4]
    probe.validate()
    validation = (time.perf_counter() - began) / len(probe.val) * len(trainer.val)
    left = 60 * settings.minutes - seconds_used - sum(seconds) - 2 * validation - 3  # the last validation, the report, start and end
    return max(1, int(left / (step + validation / per_epoch)))


def _loop(trainer: _Trainer, out: Path, dataset: Dataset, steps: int, progress: Progress) -> Run:
    settings = trainer.settings.train
    assert settings.batch is not None
    torch.manual_seed(settings.seed)  # of dropout; measuring the speed has drawn from it
    optimizer, scheduler = trainer.optimizer(steps)
    trainer.model.train()
    log: list[Row] = []
    best: Scores | None = None
    interrupted = False
    began = last = time.perf_counter()
    try:
        with open(out / "log.jsonl", "w", encoding="utf-8") as file:
            for step, (x, target) in enumerate(trainer.batches.stream(0, steps), 1):
                loss = trainer.learn(optimizer, x, target)
                rate = scheduler.get_last_lr()[0]
                scheduler.step()
                now = time.perf_counter()
                epoch, position = divmod(step * settings.batch, len(trainer.batches.samples))
                row: Row = {
                    "step": step, "epoch": step * settings.batch / len(trainer.batches.samples), "loss": loss, "mean_iou": None,
                    "images_per_second": settings.batch / (now - last), "seconds": now - began, "learning_rate": rate,
                }  # fmt: skip
                if (position < settings.batch and epoch) or step == steps:
                    scores, predictions = trainer.validate()
                    row |= {"mean_iou": scores.mean_iou, "pixel_accuracy": scores.pixel_accuracy, "seconds": time.perf_counter() - began}
                    if best is None or not scores.mean_iou <= best.mean_iou:
                        best = scores
                        _keep(trainer, out, dataset, row, scores)
                    if epoch & (epoch - 1) == 0 or step == steps:  # after 1, 2, 4, 8, ... epochs
                        draw(trainer.val, predictions, trainer.model.classes, out / "pictures" / f"epoch_{epoch:04d}.jpg")
                    progress.validated(row)
                log.append(row)
                file.write(json.dumps(row) + "\n")
                if row["mean_iou"] is not None:
                    file.flush()
                progress.step(row, steps, (row["seconds"] / step) * (steps - step))
                last = time.perf_counter()
    except KeyboardInterrupt:
        interrupted = True
        progress.say("interrupted: the best model so far is kept")
    if best is None:  # interrupted before the first epoch's end
        best, _ = trainer.validate()
        _keep(trainer, out, dataset, {"step": len(log)}, best)
    if log:
        curves(log, out / "curves.png")
    return Run(out, trainer.settings, best, tuple(log), interrupted)


def _keep(trainer: _Trainer, out: Path, dataset: Dataset, row: Row, scores: Scores) -> None:
    """Write the model as it stands, with where it comes from."""
    trainer.model.provenance = {
        "dataset": dataset.root.name,
        "layout": dataset.layout,
        "num_train": len(trainer.batches.samples),
        "step": row["step"],
        "seed": trainer.settings.train.seed,
        "split": {"data.split": trainer.settings.data.split, "data.holdout": trainer.settings.data.holdout},
        "validation": scores.as_dict(),
        "machine": describe(),
    }
    save(trainer.model, out / MODEL_NAME)
