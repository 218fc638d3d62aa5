"""The files that a run writes during training: checkpoint, log, and TensorBoard events.

A run that was killed at any moment resumes from its last checkpoint (``state.pt``) and gives
bit-identical results. The log is always on the disk before the checkpoint that counts its steps;
when a run resumes, the rows after the checkpoint are cut off. The first Ctrl-C or SIGTERM waits
until the step is done and saved.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from useg import distributed
from useg.device import get_random_states, set_random_states
from useg.errors import MachineError, ModelError, UsageError, need
from useg.files import locked_folder, make_folder, replacing
from useg.images.image_files import read_image
from useg.models.pretrained import load_pickled
from useg.models.segmenter import MODEL_NAME, check_weights
from useg.ownership import (
    Recognizer,
    is_own_checkpoint,
    is_own_json,
    is_own_log,
    is_own_markdown,
    is_own_model,
    is_own_page,
    is_own_picture,
    is_own_run_toml,
    is_own_split,
    refuse_foreign_files,
)
from useg.parsing import open_file, printable

CHECKPOINT_NAME = "state.pt"
CHECKPOINT_FORMAT = 1
MAX_STEPS = 10**9
# Exceptions of PyTorch and Python for a damaged file.
DAMAGE = RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError
LOG_NAME = "log.jsonl"
# A row takes some hundred bytes. What comes after a longer one, or after more other lines than a
# killed job leaves, is not a log.
_MAX_ROW_BYTES, _MAX_OTHER_LINES = 1 << 16, 100_000

# Saving may take this share of the training time, and happens at most this often.
MAX_SAVE_SHARE = 0.01
MIN_SAVE_INTERVAL_SECONDS = 10.0

# Assumed speed of the disk until the first save has been measured.
ASSUMED_DISK_BYTES_PER_SECOND = 2e8

# Columns of the log that TensorBoard shows, and their tags there.
TENSORBOARD_TAGS = {
    "loss": "train/loss",
    "learning_rate": "train/learning rate",
    "images_per_second": "train/images a second",
    "validation_loss": "validation/cross-entropy",
    "mean_iou": "validation/mean IoU",
    "pixel_accuracy": "validation/pixel accuracy",
}

# The files of a run, each with the function that recognises it.
RUN_FILES: dict[str, Recognizer] = {
    "run.toml": is_own_run_toml,
    "split.csv": is_own_split,
    MODEL_NAME: is_own_model,
    LOG_NAME: is_own_log,
    CHECKPOINT_NAME: is_own_checkpoint,
    "curves.png": is_own_picture,
    "scores.json": is_own_json,
    "report.html": is_own_page,
    "report.md": is_own_markdown,
}
_PICTURE_NAME = re.compile(r"(epoch_\d+\.jpg|step_\d+\.png)")

# A row of the log: step, epoch, loss, mean_iou (None without validation), seconds, ...
LogRow = dict[str, Any]


def check_run_folder(out: Path, *, resume: bool) -> None:
    """Refuse a folder in which a run would replace files of others.

    Raises:
        DataError: There are files of another run.
        UsageError: It contains a run that is not to be continued.
    """
    if not resume and any(os.path.lexists(out / name) for name in (MODEL_NAME, "run.toml")):
        raise UsageError(
            f"{out} already contains a run; continue it with --resume (resume=True in Python), "
            "choose another folder for the output, or remove it first"
        )
    pictures = out / "pictures"
    names = os.listdir(pictures) if pictures.is_dir() else []
    # A damaged checkpoint is reported by another error.
    fixed = [name for name in RUN_FILES if not (resume and name == CHECKPOINT_NAME)]
    refuse_foreign_files(
        [
            *((out / name, RUN_FILES[name]) for name in fixed),
            *((pictures / name, is_own_picture) for name in names if _PICTURE_NAME.match(name)),
        ]
    )


@contextmanager
def run_folder(out: Path, *, locked: bool = False) -> Iterator[None]:
    """Make a run folder; one that was not there and stays empty is removed at the end.

    With ``locked``, only this process and others of the same torchrun job can use it.

    Raises:
        MachineError: It cannot be written, or another process has locked it.
    """
    is_main, is_new = distributed.is_main_process(), not os.path.lexists(out)
    make_folder(out)
    try:
        with locked_folder(out) if locked and is_main else nullcontext():
            yield
    finally:
        if is_new and is_main:
            # It fails if the run has begun.
            with suppress(OSError):
                out.rmdir()


@dataclass
class RunState:
    """The progress of a run, without its weights.

    Args:
        identity: The settings and data of the run, one per line; a checkpoint of another identity
            is refused.
        step: Number of steps done.
        best: Confusion counts ``(K, K)`` of the best model on the validation images, or None before
            the first validation.
        seconds: Seconds trained so far.
    """

    identity: str
    step: int = 0
    best: Tensor | None = None
    seconds: float = 0.0


def save_checkpoint(
    path: Path,
    state: RunState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
) -> None:
    """Write everything that the next step depends on; a failure leaves the old file as it was.

    Raises:
        UsageError: The file cannot be written.
    """
    content = {
        "format": CHECKPOINT_FORMAT,
        "about": state.identity,
        "step": state.step,
        "best": state.best,
        "seconds": state.seconds,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random": torch.get_rng_state(),
        "random_gpu": get_random_states(_device_of(model)),
        "scaler": scaler.state_dict(),
    }
    _write(path, content)


def load_checkpoint(
    path: Path,
    identity: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
) -> RunState:
    """Restore model, optimizer, scheduler and random states; without a file, start at step 0.

    Raises:
        ModelError: The file is damaged, or belongs to other settings or data.
        MachineError: The file cannot be read.
    """
    content = _read(path)
    if content is None:
        return RunState(identity)
    if content["about"] != identity:
        raise ModelError(
            f"{path} was saved with other data or settings "
            f"({_first_difference(content['about'], identity)}); "
            "restore the data as they were, or choose another folder for the output"
        )
    if "model" in content:
        try:
            check_weights(content["model"], path)
            model.load_state_dict(content["model"])
            _restore_optimizer(optimizer, content["optimizer"])
            _restore_scheduler(scheduler, content["scheduler"])
            torch.set_rng_state(content["random"])
            set_random_states(content["random_gpu"], _device_of(model))
            if content.get("scaler"):
                scaler.load_state_dict(content["scaler"])
        except DAMAGE as error:
            raise _damaged(path) from error
    return RunState(identity, content["step"], content["best"], content["seconds"])


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def strip_checkpoint(path: Path) -> None:
    """Remove weights and optimizer from the checkpoint of a finished run; the model file has them.

    The rest marks the run as finished.
    """
    content = _read(path)
    assert content
    _write(path, {key: content[key] for key in ("format", "about", "step", "best", "seconds")})


def _write(path: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replacing(path, is_own_checkpoint) as draft:
        draft.write_bytes(buffer.getbuffer())


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with open_file(path) as file:
            content: dict[str, Any] = load_pickled(file)
        known = content["format"] == CHECKPOINT_FORMAT
        if known:
            _check_content(content)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MachineError(
            f"{path} cannot be read ({error.strerror or error}); "
            "make it readable and resume the run"
        ) from error
    except DAMAGE as error:
        raise _damaged(path) from error
    if not known:
        raise ModelError(
            f"{path} has format {content['format']}, but this useg reads format "
            f"{CHECKPOINT_FORMAT}; continue with the version of useg that wrote it"
        )
    return content


def _damaged(path: Path) -> ModelError:
    return ModelError(
        f"{path} is damaged or not a checkpoint; remove it to start this run again from step 0"
    )


def _check_content(content: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` if a checkpoint has other types of values than this module writes."""
    step, best, seconds = content["step"], content["best"], content["seconds"]
    right = (
        isinstance(content["about"], str),
        type(step) is int and 0 <= step <= MAX_STEPS,
        isinstance(seconds, float | int) and 0 <= seconds < math.inf,
        best is None or (best.dtype == torch.int64 and best.ndim == 2 and (best >= 0).all()),
        best is None or best.shape[0] == best.shape[1],
    )
    if not all(right):
        raise ValueError("a value has another type")


def _restore_optimizer(optimizer: torch.optim.Optimizer, content: Any) -> None:
    """Load the state of an optimizer; its moments must have the shapes of their weights."""
    optimizer.load_state_dict(content)
    for weights, state in optimizer.state.items():
        for value in state.values():
            if isinstance(value, Tensor) and value.ndim and value.shape != weights.shape:
                raise ValueError("a moment of the optimizer differs in shape from its weights")


def _restore_scheduler(scheduler: torch.optim.lr_scheduler.LRScheduler, content: Any) -> None:
    """Load the state of a scheduler, which takes any attribute; only its own numbers are known."""
    current = scheduler.state_dict()
    for key, value in content.items():
        kinds = (
            (float, int) if isinstance(current.get(key), float | int) else type(current.get(key))
        )
        if callable(getattr(scheduler, key, None)) or (
            key in current and not isinstance(value, kinds)
        ):
            raise ValueError(f"the scheduler's {key} has another type")
    scheduler.load_state_dict(content)


def _first_difference(saved: str, current: str) -> str:
    """Return the first line in which two identities differ."""
    pairs = zip(saved.splitlines(), current.splitlines(), strict=False)
    different = (f"{a!r} in the checkpoint, {b!r} now" for a, b in pairs if a != b)
    return next(different, "one has more settings than the other")


@dataclass
class SaveClock:
    """Decides when to save.

    Saving happens at most every ``MIN_SAVE_INTERVAL_SECONDS``, and takes at most
    ``MAX_SAVE_SHARE`` of the time.

    Args:
        save_seconds: How long saving takes.
        last_save: Time of the last save (``time.perf_counter``).
    """

    save_seconds: float
    last_save: float = field(default_factory=time.perf_counter)

    def is_due(self) -> bool:
        """Return whether it is time to save."""
        interval = max(MIN_SAVE_INTERVAL_SECONDS, self.save_seconds / MAX_SAVE_SHARE)
        return time.perf_counter() - self.last_save > interval

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measure how long a save takes."""
        began = time.perf_counter()
        yield
        self.last_save = time.perf_counter()
        self.save_seconds = self.last_save - began


def estimate_save_seconds(model: nn.Module) -> float:
    """Estimate how long saving takes: the weights, and the optimizer's two moments of each."""
    num_bytes = 3 * sum(tensor.nbytes for tensor in model.parameters())
    return num_bytes / ASSUMED_DISK_BYTES_PER_SECOND


@dataclass
class StopRequest:
    """Whether a signal has asked the run to stop."""

    requested: bool = False


@contextmanager
def interruptible() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; a second one acts at once.

    Outside the main thread, signal handlers stay as they are: a program that uses the library
    decides about its signals itself.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()


class TensorBoardLog:
    """Writes TensorBoard events, through torch's ``SummaryWriter``.

    Args:
        folder: The folder for the events; each process that continues a run adds a file.
        step: The step of the checkpoint from which the run continues; TensorBoard does not show
            what an earlier process has written of later steps.

    Raises:
        MissingPackageError: TensorBoard is not installed.
        OSError: The folder cannot be written; also raised by the methods.
    """

    def __init__(self, folder: Path, step: int) -> None:
        module = need("torch.utils.tensorboard", "tensorboard")
        self.writer = module.SummaryWriter(str(folder), purge_step=step + 1)

    def log_row(self, row: LogRow) -> None:
        """Write a row of the log."""
        shown = {tag: row[key] for key, tag in TENSORBOARD_TAGS.items() if row.get(key) is not None}
        self.log_values(row["step"], shown)

    def log_values(self, step: int, values: Mapping[str, float]) -> None:
        """Write values by their tags; NaN and infinity are left out."""
        for tag, value in values.items():
            if math.isfinite(value):
                self.writer.add_scalar(tag, value, step)

    def log_picture(self, step: int, path: Path) -> None:
        """Write an image file as an event."""
        picture = read_image(path)
        self.writer.add_image("validation/pictures", picture, step, dataformats="HWC")

    def flush(self) -> None:
        """Pass everything to the system; a power failure may lose events, but not the log."""
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


class RunRecorder:
    """Writes the log, the TensorBoard events and the checkpoints of a run.

    With several processes, only the main one writes.

    Args:
        out: The run folder. Log rows of steps after the checkpoint are cut off.
        state: How far the run is; updated with every step.
        save: Writes the checkpoint.
        clock: Decides when to save.
        tensorboard: Whether to write TensorBoard events too.

    Raises:
        MachineError: The folder cannot be read or written; also raised by the methods.
    """

    def __init__(
        self,
        out: Path,
        state: RunState,
        save: Callable[[], None],
        clock: SaveClock,
        tensorboard: bool,
    ) -> None:
        self.out, self.state, self.save, self.clock = out, state, save, clock
        self.writes = distributed.process_rank() == 0
        self.rows = _read_log(out / LOG_NAME, state.step) if self.writes else []
        self.tensorboard: TensorBoardLog | None = None
        with _explain_write_errors(out):
            self.file = _open_log(out / LOG_NAME if self.writes else Path(os.devnull))
            if tensorboard and self.writes:
                self.tensorboard = TensorBoardLog(out / "tensorboard", state.step)

    def __enter__(self) -> RunRecorder:
        return self

    def __exit__(self, *problem: object) -> None:
        for file in (self.file, self.tensorboard):
            # Rows that are not on disk yet are newer than the last checkpoint and can be lost.
            with suppress(OSError):
                if file:
                    file.close()

    def record_validation(self, step: int, ious: Mapping[str, float], picture: Path | None) -> None:
        """Write the IoU of each class, by its name, and a picture, for TensorBoard."""
        if self.tensorboard:
            with _explain_write_errors(self.out):
                values = {f"IoU/{printable(name)}": iou for name, iou in ious.items()}
                self.tensorboard.log_values(step, values)
                if picture:
                    self.tensorboard.log_picture(step, picture)

    def record_step(self, row: LogRow, last: bool, may_save: bool = True) -> None:
        """Write the row of a step; save if it is the last step of this process or time to save.

        Args:
            row: The row.
            last: Whether it is the last step of this process.
            may_save: Whether the weights are still those after this step.
        """
        self.state.step, self.state.seconds = row["step"], row["seconds"]
        self.rows.append(row)
        with _explain_write_errors(self.out):
            self.file.write(json.dumps(row) + "\n")
            if self.tensorboard:
                self.tensorboard.log_row(row)
            if self.writes and may_save and (last or self.clock.is_due()):
                # The log of its steps is always on the disk before a checkpoint.
                self._flush()
                with self.clock.measure():
                    self.save()

    def _flush(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        if self.tensorboard:
            self.tensorboard.flush()


def _open_log(path: Path) -> TextIO:
    """Open a log to append to it; a link that has taken its place is an error."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, 0o666), "a", encoding="utf-8")


def _read_log(path: Path, num_steps: int) -> list[LogRow]:
    """Return the rows of the first ``num_steps`` steps, one each, and cut off the others."""
    rows: list[LogRow] = []
    num_others = 0
    with _explain_write_errors(path.parent), suppress(FileNotFoundError), open_file(path) as file:
        while 0 < len(line := file.readline(_MAX_ROW_BYTES)) < _MAX_ROW_BYTES:
            row = _parse_row(line.decode("utf-8", "replace"))
            if row and (rows[-1]["step"] if rows else 0) < row["step"] <= num_steps:
                rows.append(row)
            elif (num_others := num_others + 1) > _MAX_OTHER_LINES:
                break
    with replacing(path, is_own_log) as draft:
        draft.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return rows


def _parse_row(line: str) -> LogRow | None:
    """Read a row; None for one that was written in part."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    numbers = isinstance(row, dict) and all(
        value is None or isinstance(value, float | int) for value in row.values()
    )
    is_row = numbers and {"step", "loss", "seconds"} <= row.keys() and type(row["step"]) is int
    return row if is_row else None


@contextmanager
def _explain_write_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"{out} cannot be written ({error.strerror or error}); "
            "make it writable and resume the run"
        ) from error
