"""A run in the middle <-> one file from which it goes on to the bit, whenever it was killed; and signals that wait for the end of a step."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from useg import distributed
from useg.errors import UsageError, need
from useg.files import clear_leftovers, replacing
from useg.images.files import read_size

STATE_NAME = "state.pt"


CHECKPOINT_FORMAT = 1


SAVE_SHARE = 0.01  # of a run's time that saving may take


SAVE_SECONDS = 10.0  # between two saves, at least


DISK_RATE = (
    2e8  # bytes in a second that a disk is supposed to take, until the first save has been measured
)


@dataclass
class RunState:
    """Where a run stands, beside the weights.

    Args:
        step: steps done.
        best: confusion counts ``(K, K)`` of the kept model on the validation pictures, or None before the first validation.
        seconds: of training so far.
        about: what the run is of (settings, data); a state that differs in it belongs to another run.
    """

    about: str
    step: int = 0
    best: Tensor | None = None
    seconds: float = 0.0


def save_state(
    path: Path,
    state: RunState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Write everything that the next step depends on, whole or not at all (temporary file, flush, rename).

    Raises:
        UsageError: it cannot be written; the state written before is still there.
    """
    content = {
        "format": CHECKPOINT_FORMAT, "about": state.about, "step": state.step, "best": state.best, "seconds": state.seconds,
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
        "random": torch.get_rng_state(), "random_gpu": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }  # fmt: skip
    _write(path, content)


def likely_cost(model: nn.Module) -> float:
    """Guess how many seconds saving takes: the weights, and two moments of each in the optimiser."""
    return 3 * sum(tensor.nbytes for tensor in model.parameters()) / DISK_RATE


def close_state(path: Path) -> None:
    """Leave of the state of a run that has ended just that it has ended: the weights are in the model file."""
    content = _read(path)
    assert content
    _write(path, {key: content[key] for key in ("format", "about", "step", "best", "seconds")})


def _write(path: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        known = content["format"] == CHECKPOINT_FORMAT
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror or error}); make it readable and go on with --resume"
        ) from error
    except (
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise UsageError(
            f"{path} is damaged, or no state of a run; remove it to start this run from its beginning"
        ) from error
    if not known:
        raise UsageError(
            f"{path} has format {content['format']}, this useg reads {CHECKPOINT_FORMAT}; go on with the useg that wrote it"
        )
    return content


def load_state(
    path: Path,
    about: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> RunState:
    """Bring a model, its optimiser and schedule, and the random numbers to where a run stood; a run without a state starts at its beginning.

    Raises:
        UsageError: the file is damaged, or belongs to other settings or other data.
    """
    content = _read(path)
    if content is None:
        return RunState(about)
    if content["about"] != about:
        raise UsageError(
            f"{path} was saved with other data or settings ({_difference(content['about'], about)}); give the data as it was, or a new --out"
        )
    if "model" in content:
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        scheduler.load_state_dict(content["scheduler"])
        torch.set_rng_state(content["random"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(content["random_gpu"])
    return RunState(about, content["step"], content["best"], content["seconds"])


def _difference(there: str, here: str) -> str:
    """Return the first line in which two descriptions differ."""
    pairs = zip(there.splitlines(), here.splitlines(), strict=False)
    return next((f"{a!r} there, {b!r} here" for a, b in pairs if a != b), "one is longer")


@dataclass
class SaveClock:
    """When to save: not before ``SECONDS`` have passed, and so seldom that saving takes ``SHARE`` of the time.

    Args:
        cost: seconds that saving takes.
        saved: when it was done last.
    """

    cost: float
    saved: float = field(default_factory=time.perf_counter)

    def due(self) -> bool:
        """Tell whether it is time."""
        return time.perf_counter() - self.saved > max(SAVE_SECONDS, self.cost / SAVE_SHARE)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure a save."""
        began = time.perf_counter()
        yield
        self.saved = time.perf_counter()
        self.cost = self.saved - began


@dataclass
class StopRequest:
    """Whether somebody asked the run to stop."""

    wanted: bool = False


@contextmanager
def interruptible() -> Iterator[StopRequest]:
    """Let the first Ctrl-C or SIGTERM wait until the step is done; a second one acts at once.

    Outside the main thread signals are left as they are: a library's user has the last word there.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop.wanted = True
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


SHOWN = {"loss": "train/loss", "learning_rate": "train/learning rate", "images_per_second": "train/images a second",
         "validation_loss": "validation/cross-entropy", "mean_iou": "validation/mean IoU", "pixel_accuracy": "validation/pixel accuracy"}  # fmt: skip


class Board:
    """Writes one event file; of a run that went on there is one for each process that has trained it.

    Args:
        folder: where, beside the files of earlier processes.
        step: of the state from which the run goes on: what an earlier process has written of later steps counts no more.

    Raises:
        UsageError: the package is not installed.
        OSError: the folder cannot be written; also by the methods.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.proto = need("tensorboard.compat.proto.event_pb2", "tensorboard")
        folder.mkdir(exist_ok=True)
        self.file = open(folder / f"events.out.tfevents.{time.time_ns()}", "xb")  # noqa: SIM115 - they are read in the order of their names
        self.records = need("tensorboard.summary.writer.record_writer", "tensorboard").RecordWriter(
            self.file
        )
        self._write(self.proto.Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = self.proto.SessionLog(status=self.proto.SessionLog.START)
        self._write(self.proto.Event(wall_time=time.time(), step=step + 1, session_log=start))

    def step(self, row: Mapping[str, Any]) -> None:
        """Note a row of the log."""
        self.numbers(
            row["step"], {SHOWN[key]: row[key] for key in SHOWN if row.get(key) is not None}
        )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Note values by their names; those that are no numbers are left out."""
        self._summary(
            step,
            [
                {"tag": tag, "simple_value": value}
                for tag, value in values.items()
                if math.isfinite(value)
            ],
        )

    def picture(self, step: int, path: Path) -> None:
        """Note a PNG or JPEG file."""
        width, height = read_size(path)
        image = {
            "width": width,
            "height": height,
            "colorspace": 3,
            "encoded_image_string": path.read_bytes(),
        }
        self._summary(step, [{"tag": "validation/pictures", "image": image}])

    def flush(self) -> None:
        """Bring all to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Write no more."""
        self.file.close()

    def _summary(self, step: int, values: list[dict[str, Any]]) -> None:
        self._write(self.proto.Event(wall_time=time.time(), step=step, summary={"value": values}))

    def _write(self, event: Any) -> None:
        self.records.write(event.SerializeToString())


LOG_NAME = "log.jsonl"


LogRow = dict[str, Any]


class Journal:
    """The notes of a run; of several processes only the first one writes.

    Args:
        out: the run folder. What a run that was killed has noted after its last state is cut off.
        state: where the run stands; brought up to date with every step.
        save: writes it.
        clock: when to save.
        tensorboard: show the same in TensorBoard.

    Raises:
        UsageError: the folder cannot be read or written; also by the methods.
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
        self.rows = _begin(out / LOG_NAME, state.step) if self.writes else []
        self.board: Board | None = None
        with _writable(out):
            self.file = open(out / LOG_NAME if self.writes else os.devnull, "a", encoding="utf-8")  # noqa: SIM115
            if tensorboard and self.writes:
                self.board = Board(out / "tensorboard", state.step)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *problem: object) -> None:
        for file in (self.file, self.board):
            with suppress(
                OSError
            ):  # what is not on the disk by now comes after the last state, and does not count
                if file:
                    file.close()

    def scored(self, step: int, ious: Mapping[str, float], picture: Path | None) -> None:
        """Note how well each class is found, by its name, and a picture of that."""
        if self.board:
            with _writable(self.out):
                self.board.numbers(step, {f"IoU/{name}": iou for name, iou in ious.items()})
                if picture:
                    self.board.picture(step, picture)

    def step(self, row: LogRow, last: bool) -> None:
        """Note a step, and save the state after the last one of this process and whenever it is time."""
        self.state.step, self.state.seconds = row["step"], row["seconds"]
        self.rows.append(row)
        with _writable(self.out):
            self.file.write(json.dumps(row) + "\n")
            if self.board:
                self.board.step(row)
            if self.writes and (last or self.clock.due()):
                self._flush()  # a state never stands on the disk without the log of its steps
                with self.clock.saving():
                    self.save()

    def _flush(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        if self.board:
            self.board.flush()


def clear_unfinished_run(*folders: Path) -> None:
    """Remove the unfinished files that a killed run has left in its folders."""
    for folder in folders:
        clear_leftovers(folder, {path.stem[1:-13] for path in folder.iterdir()})


def _begin(path: Path, steps: int) -> list[LogRow]:
    """Return the rows of the first ``steps`` steps, and cut the others off."""
    with _writable(path.parent):
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
    rows = [row for row in map(_parsed, lines) if row and row["step"] <= steps]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return rows


def _parsed(line: str) -> LogRow | None:
    """Read a row; None of one that was half written."""
    try:
        row: LogRow = json.loads(line)
    except ValueError:
        return None
    return row


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{out} cannot be written ({error.strerror or error}); free it and go on with --resume"
        ) from error


TrainerRow = dict[str, Any]
