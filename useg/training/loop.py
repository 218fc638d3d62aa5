"""A data set + settings -> a trained model in a run folder: the visible training loop."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from useg import distributed
from useg.config import Settings, write_settings
from useg.data.dataset import Dataset, write_split_csv
from useg.errors import UsageError, need
from useg.files import make_folder, replacing
from useg.images.files import write_picture
from useg.machine import describe_machine
from useg.models.segmenter import MODEL_NAME, save_model
from useg.pictures import draw_curves, paint_label, side_by_side, to_picture
from useg.scoring.metrics import Confusion, Scores, class_ious, score, tally
from useg.training.checkpoint import (
    STATE_NAME,
    Journal,
    SaveClock,
    TrainerRow,
    clear_unfinished_run,
    interruptible,
    likely_cost,
    load_state,
    save_state,
)
from useg.training.monitor import Monitor, Notice
from useg.training.plan import make_plan
from useg.training.schedule import Schedule, Timer
from useg.training.trainer import (
    Progress,
    SilentProgress,
    Trainer,
    count_steps,
    draw_validation,
    prepare,
)


@dataclass(frozen=True)
class Run:
    """What training leaves beside the files: the scores of the kept model, its log, and whether it was interrupted, what went wrong."""

    out: Path
    settings: Settings
    scores: Scores
    log: tuple[TrainerRow, ...]
    interrupted: bool
    notices: tuple[Notice, ...] = ()


def fit(
    dataset: Dataset,
    out: Path,
    settings: Settings,
    progress: Progress | None = None,
    *,
    resume: bool = False,
    began: float | None = None,
) -> Run:
    """Train a U-Net and leave the run in a folder.

    Args:
        dataset: pairs with their splits assigned (:func:`useg.data.splits.assign_splits`).
        out: the run folder, new or empty: ``model.safetensors`` (the best by validation mIoU), ``run.toml``, ``split.csv``,
            ``log.jsonl``, ``curves.png``, ``pictures/``, ``tensorboard/`` if asked for, and, until it has ended, ``state.pt``.
        settings: what is set; the rest is planned.
        progress: told what happens.
        resume: go on with the run in ``out``, whose ``run.toml`` the settings are; the result is the same to the bit.
        began: when the time began to count (``time.perf_counter``); by default now.

    Raises:
        UsageError: unusable data or settings, or a folder that cannot be written or holds a run already.
    """
    began = began or time.perf_counter()
    progress = SilentProgress() if distributed.process_rank() else progress or SilentProgress()
    if not resume and any(os.path.exists(out / name) for name in (MODEL_NAME, "run.toml")):
        raise UsageError(
            f"{out} holds a run already; go on with it by --resume, choose another folder with --out, or remove it first"
        )
    if settings.train.tensorboard:
        need("tensorboard", "tensorboard")
    if settings.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(
            True, warn_only=True
        )  # what has no such form says so, and goes on
    plan = make_plan(settings, dataset)
    for line in plan.table():
        progress.say(line)
    new = not os.path.exists(out)
    make_folder(out)
    try:
        trainer = prepare(dataset, plan, progress)
    except BaseException:
        if new and not distributed.process_rank():
            out.rmdir()
        raise
    make_folder(out / "pictures")
    if not distributed.process_rank():
        clear_unfinished_run(out, out / "pictures")
    origin = {
        "dataset": str(dataset.root),
        "layout": dataset.layout,
        "splits_by": dataset.splits_by,
    }
    note = partial(
        write_settings,
        out / "run.toml",
        provenance={**origin, **describe_machine(), "plan": plan.reasons},
    )
    timer = None
    if not resume:
        steps, every, timer = count_steps(trainer, began)
        trainer.settings = trainer.settings.with_(
            {"train.steps": steps, "train.validate_every": every}
        )
    if not resume and not distributed.process_rank():
        write_split_csv(out / "split.csv", dataset)
        note(trainer.settings)
        progress.say(
            f"train.steps = {steps}: {steps / trainer.batches.per_epoch:.1f} epochs of {len(trainer.batches.samples)} pictures"
        )
    return _loop(trainer, out, dataset, progress, timer, note)


def _loop(
    trainer: Trainer,
    out: Path,
    dataset: Dataset,
    progress: Progress,
    timer: Timer | None,
    note: Callable[[Settings], None],
) -> Run:
    settings, num_train = trainer.settings.train, len(trainer.batches.samples)
    assert settings.batch is not None
    assert settings.validate_every is not None
    assert settings.steps is not None
    assert settings.coarse is not None
    length = Schedule(settings.steps, settings.recounts, settings.coarse)
    torch.manual_seed(settings.seed)  # of dropout; measuring the speed has drawn from it
    optimizer, scheduler = trainer.optimizer(length)
    state = load_state(out / STATE_NAME, trainer.about, trainer.model, optimizer, scheduler)
    save = partial(save_state, out / STATE_NAME, state, trainer.model, optimizer, scheduler)
    journal = Journal(
        out, state, save, SaveClock(likely_cost(trainer.model)), trainer.settings.train.tensorboard
    )
    if state.step:
        progress.say(f"going on after step {state.step} of {length.steps}")
    trainer.model.train()
    watch = Monitor(trainer.model.classes.names, trainer.shares, trainer.guess, length.planned)
    watch.replay([row["loss"] for row in journal.rows])
    _tell(watch.start(), progress)
    interrupted = False
    began = last = time.perf_counter()
    began -= state.seconds
    try:
        with interruptible() as stop, journal:
            for x, target in takewhile(
                lambda _: state.step < length.steps,
                trainer.batches.stream(state.step, length.is_coarse),
            ):
                waited, rate = time.perf_counter() - last, scheduler.get_last_lr()[0]
                loss = trainer.learn(optimizer, x, target)
                if not math.isfinite(loss):
                    raise _broken(loss, state.step + 1, x, target, trainer, out)
                scheduler.step()
                step, now = state.step + 1, time.perf_counter()
                epoch, position = divmod(step * settings.batch, num_train)
                row: TrainerRow = {
                    "step": step, "epoch": step * settings.batch / num_train, "loss": loss, "mean_iou": None, "validation_loss": None,
                    "images_per_second": settings.batch / (now - last), "seconds": now - began, "learning_rate": rate,
                }  # fmt: skip
                _tell(watch.step(step, loss, now - last, waited), progress)
                if trainer.parts > settings.accumulate:
                    _tell(watch.memory(trainer.parts), progress)
                due = (
                    position < settings.batch
                    and epoch % settings.validate_every == 0
                    and not length.is_coarse(step - 1)
                )
                scoring = epoch // settings.validate_every if due else 0
                if scoring or step == length.steps:
                    drawn = (
                        step == length.steps or scoring & (scoring - 1) == 0
                    )  # the first, second, fourth, eighth, ... and last scoring
                    picture = out / "pictures" / f"epoch_{epoch:04d}.jpg" if drawn else None
                    counts = _validate(trainer, journal, dataset, row, picture)
                    row["seconds"] = time.perf_counter() - began
                    if timer:
                        timer.scored.append(began + row["seconds"] - now)
                    progress.validated(row)
                    _tell(watch.validated(step, counts, row["validation_loss"]), progress)
                if timer and timer.keep(step, length):
                    trainer.settings = trainer.settings.with_(
                        {"train.steps": length.steps, "train.recounts": length.recounts}
                    )
                    if not distributed.process_rank():
                        note(trainer.settings)
                    progress.say(
                        f"train.steps = {length.steps}: counted again after step {step}, to end in time"
                    )
                interrupted = distributed.any_process(stop.wanted) and step < length.steps
                journal.step(row, last=interrupted or step == length.steps)
                progress.step(
                    row,
                    length.steps,
                    row["seconds"] * (length.work(length.steps) / length.work(step) - 1),
                )
                if interrupted:
                    break
                last = time.perf_counter()
    except KeyboardInterrupt:
        interrupted = True
    if interrupted:
        progress.say("interrupted: the best model so far is kept; --resume goes on")
    if state.best is None:  # interrupted before the first validation
        counts = trainer.validate().counts
        state.best = torch.from_numpy(counts)
        _keep(trainer, out, dataset, state.step, _score(trainer, counts))
    if journal.rows and not distributed.process_rank():
        with replacing(out / "curves.png") as temporary:
            draw_curves(journal.rows, temporary)
    return Run(
        out,
        trainer.settings,
        _score(trainer, state.best),
        tuple(journal.rows),
        interrupted,
        tuple(watch.told.values()),
    )


def _validate(
    trainer: Trainer, journal: Journal, dataset: Dataset, row: TrainerRow, picture: Path | None
) -> Confusion:
    """Score the model as it stands, keep it if it is the best so far, and draw some of what it says; returns the counts.

    The scores are added to the row of the step.
    """
    seen = trainer.validate()
    counts = seen.counts
    scores, best, names = _score(trainer, counts), journal.state.best, trainer.model.classes.names
    row |= {
        "mean_iou": scores.mean_iou,
        "pixel_accuracy": scores.pixel_accuracy,
        "validation_loss": seen.loss if math.isfinite(seen.loss) else None,
    }
    if best is None or not scores.mean_iou <= _score(trainer, best).mean_iou:
        journal.state.best = torch.from_numpy(counts)
        _keep(trainer, journal.out, dataset, row["step"], scores)
    if picture and seen.predictions:
        draw_validation(trainer.val, seen.predictions, trainer.model.classes, picture)
    journal.scored(
        row["step"], dict(zip(names, class_ious(tally(counts)).tolist(), strict=True)), picture
    )
    return counts


def _tell(notices: Sequence[Notice], progress: Progress) -> None:
    for notice in notices:
        progress.say(str(notice))


def _broken(
    loss: float, step: int, x: Tensor, target: Tensor, trainer: Trainer, out: Path
) -> UsageError:
    """Draw the batch of a loss that is no number; returns what to say."""
    path = out / "pictures" / f"step_{step:06d}.png"
    margin, classes = trainer.model.margin, trainer.model.classes
    rows = []
    for image, label in zip(
        x[:4].float().cpu().permute(0, 2, 3, 1).numpy(),
        target[:4].cpu().numpy().astype(np.uint8),
        strict=True,
    ):
        seen = image[margin : image.shape[0] - margin, margin : image.shape[1] - margin]
        rows.append(
            side_by_side(
                [to_picture(np.nan_to_num(seen)), paint_label(label, classes)], ("image", "truth")
            )
        )
    write_picture(path, np.concatenate(rows))
    blame = (
        "the pictures hold numbers that are none"
        if not bool(torch.isfinite(x).all())
        else "the learning rate is too high, or bf16 too coarse"
    )
    return UsageError(
        f"the loss of step {step} is {loss}: {blame} (the batch is drawn in {path}); set train.learning_rate to a tenth, or train.precision = fp32"
    )


def _keep(trainer: Trainer, out: Path, dataset: Dataset, step: int, scores: Scores) -> None:
    """Write the model as it stands, with where it comes from."""
    trainer.model.provenance = {
        "dataset": dataset.root.name,
        "layout": dataset.layout,
        "num_train": len(trainer.batches.samples),
        "step": step,
        "seed": trainer.settings.train.seed,
        "splits_by": dataset.splits_by,
        "split": {
            "data.split": trainer.settings.data.split,
            "data.holdout": trainer.settings.data.holdout,
        },
        "validation": scores.as_dict(),
        "machine": describe_machine(),
    }
    if not distributed.process_rank():
        save_model(trainer.model, out / MODEL_NAME)


def _score(trainer: Trainer, counts: Confusion | torch.Tensor) -> Scores:
    return score(np.asarray(counts), trainer.model.classes.names, len(trainer.val))
