"""The training loop: a data set and settings in, a trained model in a run folder out.

:func:`fit` plans, decodes and builds; ``_loop`` trains. Everything that the loop does beside the
training step (validate, keep the best model, log, save) is a method of ``_Session``.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from useg import distributed
from useg.config import Settings, write_settings
from useg.data.dataset import Dataset
from useg.data.official_splits import write_split_csv
from useg.device import CPU
from useg.errors import DataError, SettingsError, UsageError, need
from useg.files import clear_drafts, make_folder, replacing
from useg.images.files import write_picture
from useg.machine import describe_machine
from useg.models.segmenter import MODEL_NAME, Segmenter, save_model
from useg.ownership import is_own_picture
from useg.parsing import printable
from useg.pictures import draw_curves, paint_label, side_by_side, to_picture
from useg.scoring.metrics import Confusion, Scores, class_ious, score, tally
from useg.training.checkpoint import (
    CHECKPOINT_NAME,
    LogRow,
    RunRecorder,
    SaveClock,
    StopRequest,
    check_run_folder,
    estimate_save_seconds,
    interruptible,
    load_checkpoint,
    save_checkpoint,
)
from useg.training.monitor import Monitor, Notice
from useg.training.plan import Plan, make_plan
from useg.training.schedule import Schedule, TimeBudget, count_steps, make_optimizer
from useg.training.trainer import (
    Progress,
    SilentProgress,
    Trainer,
    Validation,
    draw_validation,
    prepare_trainer,
    validate,
)
from useg.training.warm_start import WarmStart, read_start

if TYPE_CHECKING:
    from useg.training.unlabelled import Unlabelled

# An early estimate of the score is printed after this share of a timed run, unless the first
# validation comes before twice that. It may take MAX_ESTIMATE_SHARE of the time.
ESTIMATE_AT_SHARE = 0.1
MAX_ESTIMATE_SHARE = 0.01
MIN_ESTIMATE_IMAGES = 4

# A new number of steps is printed if it differs from the last printed one by more than this share:
# on a busy machine it changes often, and the progress bar shows it anyway.
MIN_SAID_CHANGE = 0.35


@dataclass(frozen=True)
class Run:
    """A training run that has ended or was interrupted.

    Args:
        out: The run folder.
        settings: All settings, as in ``run.toml``.
        scores: Scores of the kept model on the validation images.
        log: One row per step, as in ``log.jsonl``.
        interrupted: Whether it was interrupted before its last step.
        notices: What went wrong.
    """

    out: Path
    settings: Settings
    scores: Scores
    log: tuple[LogRow, ...]
    interrupted: bool
    notices: tuple[Notice, ...] = ()

    def __fspath__(self) -> str:
        """Return the run folder: functions that take a model take a run too."""
        return str(self.out)


def fit(
    dataset: Dataset,
    out: Path,
    settings: Settings,
    progress: Progress | None = None,
    *,
    resume: bool = False,
    began: float | None = None,
    measure_ending: Callable[[Segmenter], float] | None = None,
) -> Run:
    """Train a U-Net and write the run into a folder.

    Args:
        dataset: Pairs with their splits assigned (:func:`useg.data.splits.assign_splits`).
        out: The run folder, new or empty. It receives ``model.safetensors`` (the model of the best
            validation mIoU), ``run.toml``, ``split.csv``, ``log.jsonl``, ``curves.png``,
            ``pictures/``, ``state.pt`` (the checkpoint), and ``tensorboard/`` if asked for.
        settings: The settings; those that are None are planned.
        progress: Receives what happens.
        resume: Continue the run in ``out``, whose ``run.toml`` holds the settings. The result is
            the same to the bit as without the interruption.
        began: When the time began to count (``time.perf_counter``); by default now.
        measure_ending: Returns how many seconds the caller will need after training, within the
            time of the run; by default none.

    Raises:
        UsageError: The data or settings cannot be used, or the folder cannot be written or
            contains a run already.
    """
    began = began or time.perf_counter()
    progress = SilentProgress() if distributed.process_rank() else progress or SilentProgress()
    check_run_folder(out, resume=resume)
    if settings.train.tensorboard:
        need("tensorboard", "tensorboard")
    if settings.train.deterministic:
        _make_deterministic()
    for note in dataset.notes:
        progress.say(note)
    plan = make_plan(settings, dataset)
    start = read_start(plan, dataset) if plan.settings.model.start else None
    for line in (*plan.table(), plan.fault, *(start.notes if start else ())):
        if line:
            progress.say(line)
    trainer, unlabelled = _prepare_run(dataset, plan, start, out, progress)
    origin = {
        "dataset": printable(str(dataset.root)),
        "layout": dataset.layout,
        "splits_by": dataset.splits_by,
    }
    if start:
        origin["start_sha256"] = start.digest
    provenance = {**origin, **describe_machine(), "plan": plan.reasons}
    write_run_toml = partial(write_settings, out / "run.toml", provenance=provenance)
    budget = None
    if not resume:
        budget = _start_run(trainer, began, progress, has_ending=measure_ending is not None)
        if not distributed.process_rank():
            # The splits come last: a run that has none is started again.
            write_run_toml(trainer.settings)
            write_split_csv(out / "split.csv", dataset)
    session = _open_session(trainer, dataset, out, progress, budget, write_run_toml)
    session.measure_ending, session.unlabelled = measure_ending, unlabelled
    try:
        interrupted = _loop(session)
    except KeyboardInterrupt:
        interrupted = True
    return _close_session(session, interrupted)


def _loop(session: _Session) -> bool:
    """Train until the last step or an interruption; return whether it was interrupted."""
    stopwatch, recorder = session.stopwatch, session.recorder
    with interruptible() as stop, recorder:
        stopwatch.start()
        taken: deque[_TakenStep] = deque()
        for x, target in session.remaining_batches():
            stopwatch.batch_arrived()
            taken.append(session.take_step(x, target))
            # The previous step is accounted for while a GPU computes this one.
            is_late = session.may_be_late(taken[-1].step, stop)
            while len(taken) > is_late:
                if session.account_for(taken.popleft(), stop, is_last_taken=not taken):
                    return True
            stopwatch.start_step(is_late=is_late)
    return False


def _make_deterministic() -> None:
    """Make GPUs repeat results to the bit; an operation that cannot be deterministic warns."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def _prepare_run(
    dataset: Dataset, plan: Plan, start: WarmStart | None, out: Path, progress: Progress
) -> tuple[Trainer, Unlabelled | None]:
    """Make the run folder and the trainer; a new folder is removed if the data cannot be used."""
    new, unlabelled = not os.path.exists(out), None
    make_folder(out)
    try:
        trainer = prepare_trainer(dataset, plan, progress, start)
        if trainer.settings.data.unlabelled:
            from useg.training.unlabelled import prepare_unlabelled

            unlabelled = prepare_unlabelled(trainer, plan)
    except BaseException:
        if new and not distributed.process_rank():
            out.rmdir()
        raise
    make_folder(out / "pictures")
    if not distributed.process_rank():
        for folder in (out, out / "pictures"):
            clear_drafts(folder)
    return trainer, unlabelled


def _start_run(
    trainer: Trainer, began: float, progress: Progress, *, has_ending: bool
) -> TimeBudget | None:
    """Set the number of steps of a new run; return its time, if it has a limit."""
    length = count_steps(trainer, began, has_ending=has_ending)
    trainer.settings = trainer.settings.with_(
        {"train.steps": length.steps, "train.validate_every": length.validate_every}
    )
    num_train = len(trainer.batches.samples)
    epochs = length.steps / trainer.batches.per_epoch
    progress.say(
        f"train.steps = {length.steps}: {epochs:.1f} epochs of {num_train} training images"
    )
    return length.budget


class _Stopwatch:
    """Measures the run (``seconds``), the current step, and its wait for the batch.

    Args:
        seconds_before: Seconds that earlier processes have trained.
    """

    def __init__(self, seconds_before: float) -> None:
        self.seconds = seconds_before
        self.waited = self.step_seconds = 0.0

    def start(self) -> None:
        self.start_step()
        self._began = self._step_began - self.seconds

    def start_step(self, *, is_late: bool = False) -> None:
        """Begin a step; its time began with the end of the one before if that is still open."""
        self._wait_began = time.perf_counter()
        if not is_late:
            self._step_began = self._wait_began

    def batch_arrived(self) -> None:
        self.waited = time.perf_counter() - self._wait_began

    def step_done(self) -> None:
        now = time.perf_counter()
        self.step_seconds, self.seconds = now - self._step_began, now - self._began
        self._step_began = now

    def seconds_now(self) -> float:
        return time.perf_counter() - self._began


@dataclass(frozen=True)
class _TakenStep:
    """A step that was taken: its number, batch, learning rate, loss, and wait for the batch."""

    step: int
    x: Tensor
    target: Tensor
    learning_rate: float
    loss: Tensor
    waited: float


@dataclass
class _Session:
    """A run while it trains, and what the loop does beside the training step."""

    trainer: Trainer
    dataset: Dataset
    out: Path
    progress: Progress
    schedule: Schedule
    budget: TimeBudget | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    recorder: RunRecorder
    monitor: Monitor
    stopwatch: _Stopwatch
    write_run_toml: Callable[[Settings], None]
    # An early estimate of the score: after which step, on how many images.
    estimate_step: int = 0
    estimate_images: int = 0
    # Returns how many seconds the caller needs after training.
    measure_ending: Callable[[Segmenter], float] | None = None
    unlabelled: Unlabelled | None = None

    def __post_init__(self) -> None:
        self.train = self.trainer.settings.train
        assert self.train.batch
        assert self.train.validate_every
        self.batch, self.validate_every = self.train.batch, self.train.validate_every
        self.num_train = len(self.trainer.batches.samples)
        self.num_taken = self.recorder.state.step
        self.steps_said = self.schedule.steps
        self.reads_late = self.trainer.device != CPU and not distributed.is_distributed()

    def take_step(self, x: Tensor, target: Tensor) -> _TakenStep:
        """Start the next training step; a GPU may still compute it when this returns."""
        self.num_taken += 1
        learning_rate = self.learning_rate()
        loss = self.trainer.train_step(self.optimizer, x, target)
        self.scheduler.step()
        waited = self.stopwatch.waited
        return _TakenStep(self.num_taken, x, target, learning_rate, loss, waited)

    def may_be_late(self, step: int, stop: StopRequest) -> bool:
        """Return whether the next step may begin before this one is accounted for.

        It may not if something needs the weights after this step, or decides about the next one.
        """
        return self.reads_late and not (
            step == self.schedule.steps
            or stop.requested
            or self.is_validation_due(step)
            or step == self.estimate_step
            or self.is_comparison_due(step)
            or self.recorder.clock.is_due()
            or (self.budget is not None and self.budget.is_recount_due(step, self.schedule))
        )

    def account_for(self, taken: _TakenStep, stop: StopRequest, *, is_last_taken: bool) -> bool:
        """Read the loss of a step, and do what is due after it; return whether to stop.

        Args:
            taken: The step.
            stop: Whether the run was asked to stop.
            is_last_taken: Whether no later step has begun.
        """
        step, loss, stopwatch = taken.step, float(taken.loss), self.stopwatch
        if not math.isfinite(loss):
            raise _explain_infinite_loss(self, taken)
        stopwatch.step_done()
        if self.budget:
            self.budget.step_done(is_coarse=self.schedule.is_coarse(step - 1))
        row = self.log_row(step, loss, taken.learning_rate)
        self.warn(self.monitor.check_step(step, loss, stopwatch.step_seconds, taken.waited))
        self.warn(self.monitor.check_memory(self.trainer.num_parts, self.train.accumulate))
        interrupted = False
        if is_last_taken:
            if self.is_validation_due(step):
                self.validate(row)
            elif step == self.estimate_step:
                _estimate_score(self)
            if self.is_comparison_due(step):
                self.compare_colours(row)
            if self.budget and self.budget.recount(step, self.schedule):
                self.store_recount(step)
            interrupted = distributed.any_process(stop.requested) and step < self.schedule.steps
        is_last = interrupted or step == self.schedule.steps
        self.recorder.record_step(row, last=is_last, may_save=is_last_taken)
        self.progress.step(row, self.schedule.steps, self.seconds_left(row))
        return interrupted

    def remaining_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a batch per step; recounts change how many there are."""
        state, schedule = self.recorder.state, self.schedule
        is_matched = self.unlabelled.is_matched if self.unlabelled else None
        batches = self.trainer.batches.stream(state.step, schedule.is_coarse, is_matched)
        return takewhile(lambda batch: state.step < schedule.steps, batches)

    def learning_rate(self) -> float:
        """Return the learning rate of the next step, without the factor of the encoder."""
        return float(self.scheduler.get_last_lr()[0])

    def log_row(self, step: int, loss: float, learning_rate: float) -> LogRow:
        """Return what the log says about a step; a validation adds to it."""
        return {
            "step": step,
            "epoch": step * self.batch / self.num_train,
            "loss": loss,
            "mean_iou": None,
            "validation_loss": None,
            "images_per_second": self.batch / self.stopwatch.step_seconds,
            "seconds": self.stopwatch.seconds,
            "learning_rate": learning_rate,
        }

    def warn(self, notices: Sequence[Notice]) -> None:
        """Print notices."""
        for notice in notices:
            self.progress.say(str(notice))

    def is_validation_due(self, step: int) -> bool:
        """Validate at the end of every ``validate_every``-th epoch and after the last step.

        A model that has seen only images at half the size is not validated.
        """
        epoch, position = divmod(step * self.batch, self.num_train)
        ends_epoch = position < self.batch and epoch % self.validate_every == 0
        is_full_size = not self.schedule.is_coarse(step - 1)
        return step == self.schedule.steps or (ends_epoch and is_full_size)

    def is_comparison_due(self, step: int) -> bool:
        """Return whether to score the model in the colours of images without masks."""
        return self.unlabelled is not None and self.unlabelled.is_due(step, self.schedule)

    def compare_colours(self, row: LogRow) -> None:
        """Score the model in these colours; later crops take them if they matter."""
        assert self.unlabelled
        self.progress.say(self.unlabelled.compare(self.trainer, row, self.schedule))
        self.set_and_store({"train.unlabelled_from": self.unlabelled.from_step})
        if self.budget:
            self.budget.skip()

    def validate(self, row: LogRow) -> None:
        """Validate the model, keep it if it is the best, and add its scores to the row."""
        step, model = row["step"], self.trainer.model
        validation, scores = self.validate_and_keep_best(step)
        if not self.trainer.val:
            return
        row |= {
            "mean_iou": scores.mean_iou,
            "pixel_accuracy": scores.pixel_accuracy,
            "validation_loss": validation.loss if math.isfinite(validation.loss) else None,
        }
        picture = self._picture_path(step)
        if picture and validation.predictions:
            draw_validation(self.trainer.val, validation.predictions, model.classes, picture)
        ious = class_ious(tally(validation.counts)).tolist()
        by_name = dict(zip(model.classes.names, ious, strict=True))
        self.recorder.record_validation(step, by_name, picture)
        row["seconds"] = self.stopwatch.seconds_now()
        if self.budget:
            self.budget.validated()
            if picture and step < self.schedule.steps:
                self.predict_ending()
        self.progress.validated(row)
        self.warn(self.monitor.check_validation(step, validation.counts, row["validation_loss"]))

    def validate_and_keep_best(self, step: int) -> tuple[Validation, Scores]:
        """Validate the model, and write the model file if it is the best so far."""
        trainer, state = self.trainer, self.recorder.state
        validation = validate(trainer, trainer.val)
        scores = _score(trainer, validation.counts)
        best = None if state.best is None else _score(trainer, state.best).mean_iou
        # NaN (no pixel counts) compares as not worse: a later model is kept.
        is_worse = best is not None and scores.mean_iou <= best
        if not is_worse:
            state.best = torch.from_numpy(validation.counts)
            _save_best_model(trainer, self.out, self.dataset, step, scores)
        return validation, scores

    def score_start(self) -> None:
        """Score the model that the run starts from: it is kept if training makes nothing better."""
        start = self.trainer.start
        # It may have been trained on images that would score it.
        if start is None or not start.keeps_all_classes or start.num_seen or not self.trainer.val:
            return
        _, scores = self.validate_and_keep_best(0)
        self.progress.say(
            f"before training, the model scores mIoU {100 * scores.mean_iou:.1f} % on the held-out "
            "images"
        )

    def _picture_path(self, step: int) -> Path | None:
        """Draw the first, second, fourth, eighth, ... and last validation."""
        epoch = step * self.batch // self.num_train
        is_power_of_two = (epoch // self.validate_every).bit_count() == 1
        if step < self.schedule.steps and not is_power_of_two:
            return None
        return self.out / "pictures" / f"epoch_{epoch:04d}.jpg"

    def predict_ending(self) -> None:
        """Measure how long what the caller does after training would take now."""
        if not self.budget:
            return
        if self.measure_ending:
            model = self.trainer.model
            model.eval()
            comparison = self.unlabelled.ending_seconds if self.unlabelled else 0.0
            self.budget.ending_measured(self.measure_ending(model) + comparison)
            self.trainer.set_training_mode()
        self.budget.skip()

    def store_recount(self, step: int) -> None:
        """Write the new number of steps into ``run.toml``."""
        schedule = self.schedule
        self.set_and_store({"train.steps": schedule.steps, "train.recounts": schedule.recounts})
        if abs(schedule.steps - self.steps_said) > MIN_SAID_CHANGE * self.steps_said:
            self.steps_said = schedule.steps
            self.progress.say(
                f"train.steps = {schedule.steps}: recounted after step {step} to finish on time"
            )

    def set_and_store(self, changes: dict[str, Any]) -> None:
        """Change settings, here and in ``run.toml``."""
        self.trainer.settings = self.trainer.settings.with_(changes)
        if not distributed.process_rank():
            self.write_run_toml(self.trainer.settings)

    def seconds_left(self, row: LogRow) -> float:
        """Estimate the rest of the run: of its time, or from the time of the steps so far."""
        if self.budget:
            return self.budget.seconds_left()
        work = self.schedule.work
        return float(row["seconds"] * (work(self.schedule.steps) / work(row["step"]) - 1))


def _open_session(
    trainer: Trainer,
    dataset: Dataset,
    out: Path,
    progress: Progress,
    budget: TimeBudget | None,
    write_run_toml: Callable[[Settings], None],
) -> _Session:
    """Make what the loop needs, at the state of the checkpoint if there is one."""
    train, model = trainer.settings.train, trainer.model
    assert train.steps is not None
    assert train.coarse is not None
    schedule = Schedule(train.steps, train.recounts, train.coarse)
    # For dropout: measuring the speed has drawn random numbers.
    torch.manual_seed(train.seed)
    optimizer, scheduler = make_optimizer(trainer, schedule)
    path = out / CHECKPOINT_NAME
    state = load_checkpoint(path, trainer.identity, model, optimizer, scheduler, trainer.scaler)
    save = partial(save_checkpoint, path, state, model, optimizer, scheduler, trainer.scaler)
    clock = SaveClock(estimate_save_seconds(model))
    recorder = RunRecorder(out, state, save, clock, train.tensorboard)
    if state.step:
        progress.say(f"continuing after step {state.step} of {schedule.steps}")
    trainer.set_training_mode()
    monitor = Monitor(
        model.classes.names,
        trainer.shares,
        trainer.chance_loss,
        schedule.planned_steps,
        cuts_on_device=trainer.batches.device_samples is not None,
    )
    monitor.replay([row["loss"] for row in recorder.rows])
    session = _Session(
        trainer,
        dataset,
        out,
        progress,
        schedule,
        budget,
        optimizer,
        scheduler,
        recorder,
        monitor,
        _Stopwatch(state.seconds),
        write_run_toml,
    )
    session.warn(monitor.check_passed_over([each.reason for each in dataset.passed_over]))
    session.warn(monitor.check_classes())
    if not state.step:
        session.score_start()
    _plan_estimate(session)
    return session


def _plan_estimate(session: _Session) -> None:
    """Plan an early estimate of the score, if the first validation of a timed run is late."""
    budget, schedule, num_val = session.budget, session.schedule, len(session.trainer.val)
    if not budget or not num_val:
        return
    steps = range(1, schedule.steps + 1)
    first, whole = next(filter(session.is_validation_due, steps)), schedule.work(schedule.steps)
    if schedule.work(first) <= 2 * ESTIMATE_AT_SHARE * whole:
        return
    seconds = MAX_ESTIMATE_SHARE * budget.seconds_left()
    affordable = int(seconds * num_val / max(1e-9, budget.validation_seconds))
    count = distributed.broadcast_from_main(min(num_val, affordable))
    if count >= min(MIN_ESTIMATE_IMAGES, num_val):
        reached = (step for step in steps if schedule.work(step) >= ESTIMATE_AT_SHARE * whole)
        session.estimate_step, session.estimate_images = next(reached), count


def _estimate_score(session: _Session) -> None:
    """Print the score on a few validation images; it changes nothing in the run."""
    trainer, count = session.trainer, session.estimate_images
    num_val = len(trainer.val)
    samples = [trainer.val[k * num_val // count] for k in range(count)]
    scores = _score(trainer, validate(trainer, samples).counts)
    session.progress.say(
        f"step {session.estimate_step} of {session.schedule.steps}: mIoU about "
        f"{100 * scores.mean_iou:.0f} %, an early estimate from {count} of {num_val} validation "
        "images"
    )
    session.predict_ending()


def _close_session(session: _Session, interrupted: bool) -> Run:
    """Draw the curves and return the run."""
    trainer, recorder = session.trainer, session.recorder
    if interrupted:
        session.progress.say("interrupted: the best model is kept, and the run can be resumed")
    if recorder.state.best is None:
        # It was interrupted before the first validation.
        session.validate_and_keep_best(recorder.state.step)
    assert recorder.state.best is not None
    if recorder.rows and not distributed.process_rank():
        with replacing(session.out / "curves.png", is_own_picture) as draft:
            draw_curves(recorder.rows, draft)
    return Run(
        session.out,
        trainer.settings,
        _score(trainer, recorder.state.best),
        tuple(recorder.rows),
        interrupted,
        tuple(session.monitor.notices.values()),
    )


def _explain_infinite_loss(session: _Session, taken: _TakenStep) -> UsageError:
    """Draw the batch of a step whose loss is NaN or infinite; return the error."""
    path = session.out / "pictures" / f"step_{taken.step:06d}.png"
    _draw_batch(session.trainer, taken.x, taken.target, path)
    value = "NaN" if math.isnan(float(taken.loss)) else "infinite"
    problem = f"the loss is {value} at step {taken.step}"
    if not bool(torch.isfinite(taken.x).all()):
        return DataError(
            f"{problem}: the images contain NaN or infinite values (the batch is drawn in "
            f"{path}); replace these values or remove the images"
        )
    return SettingsError(
        f"{problem}: the learning rate is too high, or {session.train.precision} too imprecise "
        f"(the batch is drawn in {path}); set train.learning_rate to a tenth, or "
        "train.precision = fp32"
    )


def _draw_batch(trainer: Trainer, x: Tensor, target: Tensor, path: Path) -> None:
    """Draw image and truth of the first crops of a batch."""
    margin, rows = trainer.model.margin, []
    images = x[:4].float().cpu().permute(0, 2, 3, 1).numpy()
    labels = (target[:4] & 0xFF).cpu().numpy().astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        inner = image[margin : image.shape[0] - margin, margin : image.shape[1] - margin]
        pictures = [to_picture(np.nan_to_num(inner)), paint_label(label, trainer.model.classes)]
        rows.append(side_by_side(pictures, ("image", "truth")))
    write_picture(path, np.concatenate(rows))


def _save_best_model(
    trainer: Trainer, out: Path, dataset: Dataset, step: int, scores: Scores
) -> None:
    """Write the model file, with the provenance of the model."""
    data = trainer.settings.data
    trainer.model.provenance = {
        "dataset": dataset.root.name,
        "layout": dataset.layout,
        "num_train": len(trainer.batches.samples),
        "step": step,
        "seed": trainer.settings.train.seed,
        "splits_by": dataset.splits_by,
        "split": {"data.split": data.split, "data.holdout": data.holdout},
        "validation": scores.as_dict(),
        "machine": describe_machine(),
    }
    if trainer.objects:
        trainer.model.provenance["min_object_pixels"] = trainer.objects.min_pixels
        trainer.model.provenance["object_side"] = round(trainer.objects.side, 3)
    if trainer.settings.train.unlabelled_from is not None:
        trainer.model.provenance["unlabelled_from"] = trainer.settings.train.unlabelled_from
    if trainer.start:
        trainer.model.provenance["start"] = trainer.start.provenance(trainer.model.classes)
    if not distributed.process_rank():
        save_model(trainer.model, out / MODEL_NAME)


def _score(trainer: Trainer, counts: Confusion | Tensor) -> Scores:
    return score(np.asarray(counts), trainer.model.classes.names, len(trainer.val))
