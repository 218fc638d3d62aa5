"""What a run does after each training step: check, log, validate, save, and keep to its time.

After each step the session checks the loss, logs, validates if that is due, keeps the best model,
recounts the steps of a timed run, and saves. ``loop.py`` takes the steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from useg import distributed
from useg.config import VALIDATE_AT_END, write_settings
from useg.data.dataset import Dataset
from useg.device import CPU
from useg.errors import DataError, SettingsError, UsageError, format_count
from useg.images.image_files import write_picture
from useg.machine import describe_machine
from useg.models.segmenter import MODEL_NAME, Segmenter, load_model, save_model
from useg.scoring.metrics import Confusion, Scores, score
from useg.training.checkpoint import (
    CHECKPOINT_NAME,
    LogRow,
    RunRecorder,
    SaveClock,
    StopRequest,
    estimate_save_seconds,
    load_checkpoint,
    save_checkpoint,
)
from useg.training.monitor import Monitor, Notice
from useg.training.schedule import Schedule, TimeBudget, make_optimizer
from useg.training.threads import ThreadControl
from useg.training.trainer import (
    Progress,
    Trainer,
    Validation,
    choose_enlarged_biases,
    draw_validation,
    validate,
)
from useg.visualization import paint_label, side_by_side, to_picture

if TYPE_CHECKING:
    from useg.training.unlabelled import Unlabelled
    from useg.training.warm_start import WarmStart

# An early estimate of the score is printed after this share of a timed run, unless the first
# validation comes before twice that. It may take MAX_ESTIMATE_SHARE of the time.
ESTIMATE_AT_SHARE = 0.1
MAX_ESTIMATE_SHARE = 0.01
MIN_ESTIMATE_IMAGES = 4

# A new number of steps is printed if it differs from the last printed one by more than this share:
# on a busy machine it changes often, and the progress bar shows it anyway.
MIN_REPORTED_CHANGE = 0.35

# With fewer held-out images, the model that a run starts from is not kept: by two of them it seemed
# better than one that scored 13 points more on ninety others.
MIN_HELD_OUT_TO_KEEP_START = 5

# At a new place, this share of the weights of the trained model comes from the model that it
# started from, unless that lowers the mean IoU on the held-out images by more than MAX_MIXING_LOSS.
START_SHARE = 0.25
MAX_MIXING_LOSS = 0.01


class Stopwatch:
    """Measures the run (``seconds``), the current step, and its wait for the batch.

    Args:
        seconds_before: Seconds that earlier processes have trained.
    """

    def __init__(self, seconds_before: float) -> None:
        self.seconds = seconds_before
        self.waited = self.step_seconds = 0.0

    def start(self) -> None:
        """Begin the first step."""
        self.start_step()
        self._began = self._step_began - self.seconds

    def start_step(self, *, is_overlapped: bool = False) -> None:
        """Begin a step; its time began with the end of the one before if that is still open."""
        self._wait_began = time.perf_counter()
        if not is_overlapped:
            self._step_began = self._wait_began

    def batch_arrived(self) -> None:
        """Note that the wait for the batch has ended."""
        self.waited = time.perf_counter() - self._wait_began

    def step_done(self) -> None:
        """Note that the step has ended."""
        now = time.perf_counter()
        self.step_seconds, self.seconds = now - self._step_began, now - self._began
        self._step_began = now

    def seconds_now(self) -> float:
        """Return the seconds of the run so far, those of the current step too."""
        return time.perf_counter() - self._began


@dataclass(frozen=True)
class TakenStep:
    """A step that was taken: its number, batch, learning rate, loss, and wait for the batch."""

    step: int
    x: Tensor
    target: Tensor
    learning_rate: float
    loss: Tensor
    waited: float


@dataclass
class TrainingSession:
    """A run while it trains, and what the loop does besides the training step.

    It starts from the checkpoint in the run folder, if there is one, else at step 0.

    Args:
        trainer: The parts of the run.
        dataset: The data set, for the provenance of the model.
        out: The run folder.
        progress: Receives what happens.
        threads: Decides on the number of threads; None if it never changes.
        provenance: What ``run.toml`` says about the run besides its settings.
        budget: The time of a new run that has a limit.
        unlabelled: The images without masks, if any.
        predict_report_seconds: Returns how long the report will take.
    """

    trainer: Trainer
    dataset: Dataset
    out: Path
    progress: Progress
    threads: ThreadControl | None
    provenance: Mapping[str, Any]
    budget: TimeBudget | None = None
    unlabelled: Unlabelled | None = None
    predict_report_seconds: Callable[[Segmenter], float] | None = None

    def __post_init__(self) -> None:
        trainer, train = self.trainer, self.trainer.settings.train
        assert train.steps is not None
        assert train.coarse is not None
        assert train.batch is not None
        assert train.validate_every is not None
        self.train, self.batch, self.validate_every = train, train.batch, train.validate_every
        self.num_train = len(trainer.batches.samples)
        self.overlaps_steps = trainer.device != CPU and not distributed.is_distributed()
        self.schedule = Schedule(train.steps, train.recounts, train.coarse)
        # For dropout: measuring the speed has drawn random numbers.
        torch.manual_seed(train.seed)
        self.optimizer, self.scheduler = make_optimizer(trainer, self.schedule)
        self.recorder = self._open_recorder()
        self.num_taken = self.recorder.state.step
        self.stopwatch = Stopwatch(self.recorder.state.seconds)
        self.monitor = Monitor(
            trainer.model.classes.names,
            trainer.shares,
            trainer.chance_loss,
            self.schedule.planned_steps,
            cuts_on_device=trainer.batches.device_samples is not None,
        )
        self.monitor.replay([row["loss"] for row in self.recorder.rows])
        # The number of steps that was printed last.
        self.reported_steps = self.schedule.steps
        # An early estimate of the score: after which step, on how many images.
        self.estimate_step = self.estimate_images = 0

    def _open_recorder(self) -> RunRecorder:
        """Load the checkpoint, and open the log behind it."""
        trainer, path = self.trainer, self.out / CHECKPOINT_NAME
        parts = trainer.model, self.optimizer, self.scheduler, trainer.scaler
        state = load_checkpoint(path, trainer.identity, *parts)
        save = partial(save_checkpoint, path, state, *parts)
        clock = SaveClock(estimate_save_seconds(trainer.model))
        return RunRecorder(self.out, state, save, clock, self.train.tensorboard)

    def begin(self) -> None:
        """Do what comes before the first step: check the data, and score the initial model."""
        step = self.recorder.state.step
        if step:
            self.progress.say(f"continuing after step {step} of {self.schedule.steps}")
        self.trainer.set_training_mode()
        self.warn(self.monitor.check_skipped([each.reason for each in self.dataset.skipped]))
        self.warn(self.monitor.check_classes())
        if self.trainer.start and not step:
            _score_start(self, self.trainer.start)
        _plan_estimate(self)

    def take_step(self, x: Tensor, target: Tensor) -> TakenStep:
        """Start the next training step; a GPU may still compute it when this returns."""
        if self.threads:
            self.threads.apply_changes_until(self.num_taken)
        self.num_taken += 1
        # That of the first group: without the factor of the encoder.
        learning_rate = float(self.scheduler.get_last_lr()[0])
        loss = self.trainer.train_step(self.optimizer, x, target)
        self.scheduler.step()
        return TakenStep(self.num_taken, x, target, learning_rate, loss, self.stopwatch.waited)

    def may_overlap_next(self, step: int, stop: StopRequest) -> bool:
        """Return whether the next step may begin before this one is accounted for.

        It may not if something needs the weights after this step, or decides about the next one.
        """
        return self.overlaps_steps and not (
            step == self.schedule.steps
            or stop.requested
            or self.is_validation_due(step)
            or step == self.estimate_step
            or (self.unlabelled is not None and self.unlabelled.is_due(step, self.schedule))
            or self.recorder.clock.is_due()
            or (self.budget is not None and self.budget.is_recount_due(step, self.schedule))
        )

    def account_for(self, taken: TakenStep, stop: StopRequest, *, is_last_taken: bool) -> bool:
        """Read the loss of a step, and do what is due after it; return whether to stop.

        Args:
            taken: The step.
            stop: Whether the run was asked to stop.
            is_last_taken: Whether no later step has begun, so the weights are those after this one.
        """
        step, stopwatch = taken.step, self.stopwatch
        loss = float(taken.loss)
        if not math.isfinite(loss):
            raise _explain_infinite_loss(self, taken)
        stopwatch.step_done()
        if self.budget:
            self.budget.step_done(is_coarse=self.schedule.is_coarse(step - 1))
        row = self.log_row(taken, loss)
        self.warn(self.monitor.check_step(step, loss, stopwatch.step_seconds, taken.waited))
        self.warn(self.monitor.check_memory(self.trainer.num_parts, self.train.accumulate))
        interrupted = False
        if is_last_taken:
            self.do_what_is_due(row)
            interrupted = distributed.any_process(stop.requested) and step < self.schedule.steps
        is_last = interrupted or step == self.schedule.steps
        self.recorder.record_step(row, last=is_last, may_save=is_last_taken)
        self.progress.step(row, self.schedule.steps, self.seconds_left(row))
        return interrupted

    def do_what_is_due(self, row: LogRow) -> None:
        """Validate, compare, recount the steps and change the threads, whichever are due."""
        step = row["step"]
        if self.is_validation_due(step):
            self.validate(row)
        elif step == self.estimate_step:
            _estimate_score(self)
        if self.unlabelled and self.unlabelled.is_due(step, self.schedule):
            _compare_colours(self, self.unlabelled, row)
        if self.budget and self.budget.recount(step, self.schedule):
            self.store_recount(step)
        if self.budget and self.threads and self.threads.adapt(step):
            self.progress.say(self.threads.describe())
            self.set_and_store({"train.thread_changes": self.threads.changes})

    def remaining_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a batch per step; recounts change how many there are."""
        state, schedule = self.recorder.state, self.schedule
        is_matched = self.unlabelled.is_matched if self.unlabelled else None
        batches = self.trainer.batches.stream(state.step, schedule.is_coarse, is_matched)
        return takewhile(lambda batch: state.step < schedule.steps, batches)

    def log_row(self, taken: TakenStep, loss: float) -> LogRow:
        """Return what the log says about a step; a validation adds to it."""
        return {
            "step": taken.step,
            "epoch": taken.step * self.batch / self.num_train,
            "loss": loss,
            "mean_iou": None,
            "validation_loss": None,
            "images_per_second": self.batch / self.stopwatch.step_seconds,
            "seconds": self.stopwatch.seconds,
            "learning_rate": taken.learning_rate,
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

    def validate(self, row: LogRow) -> None:
        """Validate the model, keep it if it is the best, and add its scores to the row."""
        step, trainer = row["step"], self.trainer
        validation, scores = self.validate_and_keep_best(step)
        if not trainer.val:
            return
        row |= {
            "mean_iou": scores.mean_iou,
            "pixel_accuracy": scores.pixel_accuracy,
            "validation_loss": validation.loss if math.isfinite(validation.loss) else None,
        }
        picture = self._picture_path(step)
        if picture and validation.predictions:
            draw_validation(trainer.val, validation.predictions, trainer.model.classes, picture)
        ious = {each.name: each.iou for each in scores.classes}
        self.recorder.record_validation(step, ious, picture)
        row["seconds"] = self.stopwatch.seconds_now()
        if self.budget:
            self.budget.validated()
            if picture and step < self.schedule.steps:
                self.update_report_seconds()
        self.progress.validated(row)
        self.warn(self.monitor.check_validation(step, validation.counts, row["validation_loss"]))

    def validate_and_keep_best(self, step: int) -> tuple[Validation, Scores]:
        """Validate the model, and write the model file if it is the best so far."""
        trainer, state = self.trainer, self.recorder.state
        validation = validate(trainer, trainer.val)
        scores = score_counts(trainer, validation.counts)
        best = None if state.best is None else score_counts(trainer, state.best).mean_iou
        # NaN (no pixel counts) compares as not worse: a later model is kept.
        if best is None or not scores.mean_iou <= best:
            state.best = torch.from_numpy(validation.counts)
            _save_best_model(trainer, self.out, self.dataset, step, scores)
        return validation, scores

    def _picture_path(self, step: int) -> Path | None:
        """Draw the first, second, fourth, eighth, ... and last validation."""
        epoch = step * self.batch // self.num_train
        is_power_of_two = (epoch // self.validate_every).bit_count() == 1
        if step < self.schedule.steps and not is_power_of_two:
            return None
        return self.out / "pictures" / f"epoch_{epoch:04d}.jpg"

    def update_report_seconds(self) -> None:
        """Measure how long the report would take now, and what else follows training."""
        assert self.budget
        if self.predict_report_seconds:
            model = self.trainer.model
            model.eval()
            comparison = self.unlabelled.comparison_seconds if self.unlabelled else 0.0
            mixing = self.budget.validation_seconds if _choose_start_share(self.trainer) else 0.0
            self.budget.report_measured(self.predict_report_seconds(model) + comparison + mixing)
            self.trainer.set_training_mode()
        self.budget.restart_clock()

    def store_recount(self, step: int) -> None:
        """Write the new number of steps into ``run.toml``."""
        schedule = self.schedule
        self.set_and_store({"train.steps": schedule.steps, "train.recounts": schedule.recounts})
        if abs(schedule.steps - self.reported_steps) > MIN_REPORTED_CHANGE * self.reported_steps:
            self.reported_steps = schedule.steps
            self.progress.say(
                f"train.steps = {schedule.steps}: recounted after step {step} to finish on time"
            )

    def set_and_store(self, changes: dict[str, Any]) -> None:
        """Change settings, here and in ``run.toml``."""
        self.trainer.settings = self.trainer.settings.with_(changes)
        if distributed.process_rank() == 0:
            write_settings(self.out / "run.toml", self.trainer.settings, self.provenance)

    def seconds_left(self, row: LogRow) -> float:
        """Estimate the rest of the run: of its time, or from the time of the steps so far."""
        if self.budget:
            return self.budget.seconds_left()
        work = self.schedule.work
        return float(row["seconds"] * (work(self.schedule.steps) / work(row["step"]) - 1))


def _plan_estimate(session: TrainingSession) -> None:
    """Plan an early estimate of the score, if the first validation of a timed run is late."""
    budget, schedule, num_val = session.budget, session.schedule, len(session.trainer.val)
    if not budget or not num_val:
        return
    steps = range(1, schedule.steps + 1)
    first_validation = next(filter(session.is_validation_due, steps))
    whole = schedule.work(schedule.steps)
    if schedule.work(first_validation) <= 2 * ESTIMATE_AT_SHARE * whole:
        return
    seconds = MAX_ESTIMATE_SHARE * budget.seconds_left()
    affordable = int(seconds * num_val / max(1e-9, budget.validation_seconds))
    count = distributed.broadcast_from_main(min(num_val, affordable))
    if count >= min(MIN_ESTIMATE_IMAGES, num_val):
        is_reached = [schedule.work(step) >= ESTIMATE_AT_SHARE * whole for step in steps]
        session.estimate_step, session.estimate_images = 1 + is_reached.index(True), count


def _estimate_score(session: TrainingSession) -> None:
    """Print the score on a few validation images; it changes nothing in the run."""
    trainer, count = session.trainer, session.estimate_images
    num_val = len(trainer.val)
    samples = [trainer.val[k * num_val // count] for k in range(count)]
    scores = score_counts(trainer, validate(trainer, samples).counts)
    session.progress.say(
        f"step {session.estimate_step} of {session.schedule.steps}: mIoU about "
        f"{100 * scores.mean_iou:.0f} %, an early estimate from {count} of {num_val} validation "
        "images"
    )
    session.update_report_seconds()


def _score_start(session: TrainingSession, start: WarmStart) -> None:
    """Score the model that the run starts from: it is kept if training makes nothing better.

    It is only scored if the held-out images are few, which do not show what is better for others,
    or if they must not choose the model that is kept.
    """
    trainer, val = session.trainer, session.trainer.val
    # It may have been trained on images that would score it.
    if not start.keeps_all_classes or start.num_seen or not val:
        return
    note = ""
    if len(val) < MIN_HELD_OUT_TO_KEEP_START:
        note = ", too few to decide between it and the trained model"
    elif session.validate_every == VALIDATE_AT_END:
        note = ", which do not decide between it and the trained model"
    if note:
        scores = score_counts(trainer, validate(trainer, val).counts)
    else:
        _, scores = session.validate_and_keep_best(0)
    session.progress.say(
        f"the initial model scores mIoU {100 * scores.mean_iou:.1f} % on the "
        f"{format_count(len(val), 'held-out image')}{note}"
    )


def _compare_colours(session: TrainingSession, unlabelled: Unlabelled, row: LogRow) -> None:
    """Score the model in the colours of images without masks; later crops may take them."""
    session.progress.say(unlabelled.compare(session.trainer, row, session.schedule))
    session.set_and_store({"train.unlabelled_from": unlabelled.from_step})
    if session.budget:
        session.budget.restart_clock()


def _explain_infinite_loss(session: TrainingSession, taken: TakenStep) -> UsageError:
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


def mix_with_start(session: TrainingSession, start: WarmStart, scores: Scores) -> Scores:
    """Mix weights of the start into the kept model, and return the scores of the result.

    It knows more of the old place than a model that was only trained on the new one
    (Wortsman and others 2022, "Robust fine-tuning of zero-shot models").

    Args:
        session: The run, after its last step.
        start: The model that the run started from.
        scores: Scores of the model that the run has kept.
    """
    trainer = session.trainer
    share = _choose_start_share(trainer)
    if not share:
        return scores
    # Every process waits until the file is written.
    distributed.broadcast_from_main(None)
    kept = load_model(session.out)
    share_before = kept.provenance["start"].get("share")
    # The model before training, or one that an earlier version of useg has kept.
    if not kept.provenance["step"] or share_before is None:
        return scores
    trainer.model.load_state_dict(kept.state_dict())
    if share_before:
        # The run had ended before.
        return score_counts(trainer, validate(trainer, trainer.val).counts)
    start.mix_into(trainer.model, share)
    mixed = score_counts(trainer, validate(trainer, trainer.val).counts)
    is_checked = trainer.settings.model.start_share is None
    if is_checked and mixed.mean_iou < scores.mean_iou - MAX_MIXING_LOSS:
        return scores
    trainer.start = replace(start, share=share)
    _save_best_model(trainer, session.out, session.dataset, kept.provenance["step"], mixed)
    session.progress.say(
        f"mixed {100 * share:.0f} % of the initial model into the final weights, so that the model "
        "forgets less of what it had learned; model.start_share = 0 disables this"
    )
    return mixed


def _choose_start_share(trainer: Trainer) -> float:
    """Return the share of the weights of the start, if any, to mix into the trained model."""
    start, given = trainer.start, trainer.settings.model.start_share
    if start is None:
        return 0.0
    if not start.keeps_all_classes or given is not None:
        return given or 0.0
    is_alike = trainer.model.working == start.model.working
    return START_SHARE if start.is_new_place and is_alike and trainer.val else 0.0


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
        trainer.model.provenance["largest_object_side"] = round(trainer.objects.largest_side, 3)
        trainer.model.provenance["specks_grow"] = True
        if trainer.settings.train.class_weights == "sqrt":
            biases = choose_enlarged_biases(trainer.shares)
            trainer.model.provenance["enlarged_biases"] = biases
    if trainer.settings.train.unlabelled_from is not None:
        trainer.model.provenance["unlabelled_from"] = trainer.settings.train.unlabelled_from
    if trainer.start:
        trainer.model.provenance["start"] = trainer.start.provenance(trainer.model.classes)
    if distributed.process_rank() == 0:
        save_model(trainer.model, out / MODEL_NAME)


def score_counts(trainer: Trainer, counts: Confusion | Tensor) -> Scores:
    """Return the scores of confusion counts of the validation images."""
    return score(np.asarray(counts), trainer.model.classes.names, len(trainer.val))
