"""The training loop: a data set and settings in, a trained model in a run folder out.

:func:`fit` plans, decodes and builds; ``_loop`` trains. Everything that the loop does besides the
training step (validate, keep the best model, log, save) is in ``session.py``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from useg import distributed
from useg.config import Settings, TrainSettings, write_settings
from useg.data.dataset import Dataset
from useg.data.split_files import write_split_csv
from useg.errors import need
from useg.files import clear_drafts, make_folder, replacing
from useg.machine import describe_machine
from useg.models.segmenter import Segmenter
from useg.ownership import is_own_picture
from useg.parsing import printable
from useg.scoring.metrics import Scores
from useg.training.checkpoint import LogRow, check_run_folder, interruptible, run_folder
from useg.training.monitor import Notice
from useg.training.plan import Plan, make_plan, time_limit
from useg.training.schedule import TimeBudget, count_steps
from useg.training.session import (
    TakenStep,
    TrainingSession,
    mix_with_start,
    score_counts,
)
from useg.training.threads import ThreadControl
from useg.training.trainer import Progress, SilentProgress, Trainer, prepare_trainer
from useg.training.warm_start import WarmStart, read_start
from useg.visualization import draw_curves

if TYPE_CHECKING:
    from useg.training.unlabelled import Unlabelled


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
    predict_report_seconds: Callable[[Segmenter], float] | None = None,
) -> Run:
    """Train a U-Net and write the run into a folder.

    Args:
        dataset: Pairs with their splits assigned (:func:`useg.data.splits.assign_splits`).
        out: The run folder, new or empty. It receives ``run.toml`` (all settings), ``split.csv``,
            ``model.safetensors`` (the model with the best validation score), ``state.pt`` (the
            checkpoint), ``log.jsonl``, ``curves.png``, ``pictures`` and, if wanted,
            ``tensorboard``.
        settings: The settings; those that are None are planned.
        progress: Receives what happens.
        resume: Continue the run in ``out``, whose ``run.toml`` holds the settings.
        began: When the time began to count (``time.perf_counter``); by default now.
        predict_report_seconds: Returns how long the report will take, within the time of the run.

    Raises:
        UsageError: The data or settings cannot be used, or the folder cannot be written or
            contains a run already.
    """
    began = began or time.perf_counter()
    if progress is None or distributed.process_rank() > 0:
        progress = SilentProgress()
    check_run_folder(out, resume=resume)
    if settings.train.tensorboard:
        need("tensorboard", "tensorboard")
    if settings.train.deterministic:
        _make_deterministic()
    for note in dataset.notes:
        progress.say(note)
    threads = _control_threads(settings.train, progress, resume=resume)
    plan = make_plan(settings, dataset)
    start = read_start(plan, dataset) if plan.settings.model.start else None
    for line in (*plan.explain(), *(start.notes if start else ())):
        progress.say(line)
    trainer, unlabelled = _prepare_run(dataset, plan, start, out, progress)
    provenance = _describe_origin(dataset, plan, start)
    budget = None
    if not resume:
        changes = threads.changes if threads else ()
        trainer.settings = trainer.settings.with_({"train.thread_changes": changes})
        has_report = predict_report_seconds is not None
        budget = _start_run(trainer, began, progress, has_report=has_report)
        if distributed.process_rank() == 0:
            # The splits come last: a run that has none is started again.
            write_settings(out / "run.toml", trainer.settings, provenance)
            write_split_csv(out / "split.csv", dataset)
    session = TrainingSession(
        trainer,
        dataset,
        out,
        progress,
        threads,
        provenance,
        budget,
        unlabelled,
        predict_report_seconds,
    )
    session.begin()
    try:
        interrupted = _loop(session)
    except KeyboardInterrupt:
        interrupted = True
    return _close_session(session, interrupted)


def _loop(session: TrainingSession) -> bool:
    """Train until the last step or an interruption; return whether it was interrupted."""
    stopwatch = session.stopwatch
    if session.threads:
        session.threads.restart()
    with interruptible() as stop, session.recorder:
        stopwatch.start()
        previous: TakenStep | None = None
        for x, target in session.remaining_batches():
            stopwatch.batch_arrived()
            taken = session.take_step(x, target)
            is_overlapped = session.may_overlap_next(taken.step, stop)
            # The previous step is accounted for while a GPU computes this one.
            if previous:
                session.account_for(previous, stop, is_last_taken=False)
            previous = taken if is_overlapped else None
            if not is_overlapped and session.account_for(taken, stop, is_last_taken=True):
                return True
            stopwatch.start_step(is_overlapped=is_overlapped)
    return False


def _control_threads(
    train: TrainSettings, progress: Progress, *, resume: bool
) -> ThreadControl | None:
    """Choose the number of threads of a run with a time limit, or repeat that of an earlier run."""
    is_timed = not resume and time_limit(train) is not None
    if not is_timed and not train.thread_changes:
        return None
    threads = ThreadControl(train.thread_changes)
    if is_timed and threads.begin():
        progress.say(threads.describe())
    return threads


def _make_deterministic() -> None:
    """Make GPUs repeat results to the bit; an operation that cannot be deterministic warns."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def _prepare_run(
    dataset: Dataset, plan: Plan, start: WarmStart | None, out: Path, progress: Progress
) -> tuple[Trainer, Unlabelled | None]:
    """Make the run folder and the trainer; a new folder is removed if the data cannot be used."""
    unlabelled = None
    with run_folder(out):
        trainer = prepare_trainer(dataset, plan, progress, start)
        if trainer.settings.data.unlabelled:
            from useg.training.unlabelled import prepare_unlabelled

            unlabelled = prepare_unlabelled(trainer, plan)
        make_folder(out / "pictures")
    if distributed.process_rank() == 0:
        for folder in (out, out / "pictures"):
            clear_drafts(folder)
    return trainer, unlabelled


def _describe_origin(dataset: Dataset, plan: Plan, start: WarmStart | None) -> dict[str, Any]:
    """Return what ``run.toml`` says about a run besides its settings."""
    return {
        "dataset": printable(str(dataset.root)),
        "layout": dataset.layout,
        "splits_by": dataset.splits_by,
        **({"start_sha256": start.digest} if start else {}),
        **describe_machine(),
        "plan": plan.reasons,
    }


def _start_run(
    trainer: Trainer, began: float, progress: Progress, *, has_report: bool
) -> TimeBudget | None:
    """Set the number of steps of a new run; return its time, if it has a limit."""
    length = count_steps(trainer, began, has_report=has_report)
    trainer.settings = trainer.settings.with_(
        {"train.steps": length.steps, "train.validate_every": length.validate_every}
    )
    epochs = length.steps / trainer.batches.per_epoch
    num_train = len(trainer.batches.samples)
    progress.say(
        f"train.steps = {length.steps}: {epochs:.1f} epochs of {num_train} training images"
    )
    return length.budget


def _close_session(session: TrainingSession, interrupted: bool) -> Run:
    """Draw the curves and return the run."""
    trainer, recorder = session.trainer, session.recorder
    if interrupted:
        session.progress.say("interrupted: the best model is kept, and the run can be resumed")
    if recorder.state.best is None:
        # It was interrupted before the first validation.
        session.validate_and_keep_best(recorder.state.step)
    assert recorder.state.best is not None
    scores = score_counts(trainer, recorder.state.best)
    if trainer.start and not interrupted:
        scores = mix_with_start(session, trainer.start, scores)
    if recorder.rows and distributed.process_rank() == 0:
        with replacing(session.out / "curves.png", is_own_picture) as draft:
            draw_curves(recorder.rows, draft)
    return Run(
        session.out,
        trainer.settings,
        scores,
        tuple(recorder.rows),
        interrupted,
        tuple(session.monitor.notices.values()),
    )
