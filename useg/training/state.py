"""A run in the middle <-> one file from which it goes on to the bit, whenever it was killed; and signals that wait for the end of a step."""

from __future__ import annotations

import io
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from useg.errors import UsageError
from useg.files import replacing

STATE_NAME = "state.pt"
FORMAT = 1
SHARE = 0.01  # of a run's time that saving may take
SECONDS = 10.0  # between two saves, at least
RATE = 2e8  # bytes in a second that a disk is supposed to take, until the first save has been measured


@dataclass
class State:
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


def save_state(path: Path, state: State, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Write everything that the next step depends on, whole or not at all (temporary file, flush, rename).

    Raises:
        UsageError: it cannot be written; the state written before is still there.
    """
    content = {
        "format": FORMAT, "about": state.about, "step": state.step, "best": state.best, "seconds": state.seconds,
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
        "random": torch.get_rng_state(), "random_gpu": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }  # fmt: skip
    _write(path, content)


def likely_cost(model: nn.Module) -> float:
    """Guess how many seconds saving takes: the weights, and two moments of each in the optimiser."""
    return 3 * sum(tensor.nbytes for tensor in model.parameters()) / RATE


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
        known = content["format"] == FORMAT
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}); make it readable and go on with --resume") from error
    except (RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(f"{path} is damaged, or no state of a run; remove it to start this run from its beginning") from error
    if not known:
        raise UsageError(f"{path} has format {content['format']}, this useg reads {FORMAT}; go on with the useg that wrote it")
    return content


def load_state(path: Path, about: str, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler) -> State:
    """Bring a model, its optimiser and schedule, and the random numbers to where a run stood; a run without a state starts at its beginning.

    Raises:
        UsageError: the file is damaged, or belongs to other settings or other data.
    """
    content = _read(path)
    if content is None:
        return State(about)
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
    return State(about, content["step"], content["best"], content["seconds"])


def _difference(there: str, here: str) -> str:
    """Return the first line in which two descriptions differ."""
    pairs = zip(there.splitlines(), here.splitlines(), strict=False)
    return next((f"{a!r} there, {b!r} here" for a, b in pairs if a != b), "one is longer")


@dataclass
class Clock:
    """When to save: not before ``SECONDS`` have passed, and so seldom that saving takes ``SHARE`` of the time.

    Args:
        cost: seconds that saving takes.
        saved: when it was done last.
    """

    cost: float
    saved: float = field(default_factory=time.perf_counter)

    def due(self) -> bool:
        """Tell whether it is time."""
        return time.perf_counter() - self.saved > max(SECONDS, self.cost / SHARE)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure a save."""
        began = time.perf_counter()
        yield
        self.saved = time.perf_counter()
        self.cost = self.saved - began


@dataclass
class Stop:
    """Whether somebody asked the run to stop."""

    wanted: bool = False


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Let the first Ctrl-C or SIGTERM wait until the step is done; a second one acts at once.

    Outside the main thread signals are left as they are: a library's user has the last word there.
    """
    stop = Stop()
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
