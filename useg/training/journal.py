"""What a run writes step by step, and reads when it goes on: its log, its state, what TensorBoard shows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from useg import ranks
from useg.errors import UsageError
from useg.files import clear_leftovers, replacing
from useg.training.board import Board
from useg.training.state import Clock, State

LOG_NAME = "log.jsonl"

Row = dict[str, Any]


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

    def __init__(self, out: Path, state: State, save: Callable[[], None], clock: Clock, tensorboard: bool) -> None:
        self.out, self.state, self.save, self.clock = out, state, save, clock
        self.writes = ranks.rank() == 0
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
            with suppress(OSError):  # what is not on the disk by now comes after the last state, and does not count
                if file:
                    file.close()

    def scored(self, step: int, ious: Mapping[str, float], picture: Path | None) -> None:
        """Note how well each class is found, by its name, and a picture of that."""
        if self.board:
            with _writable(self.out):
                self.board.numbers(step, {f"IoU/{name}": iou for name, iou in ious.items()})
                if picture:
                    self.board.picture(step, picture)

    def step(self, row: Row, last: bool) -> None:
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


def clear(*folders: Path) -> None:
    """Remove the unfinished files that a killed run has left in its folders."""
    for folder in folders:
        clear_leftovers(folder, {path.stem[1:-13] for path in folder.iterdir()})


def _begin(path: Path, steps: int) -> list[Row]:
    """Return the rows of the first ``steps`` steps, and cut the others off."""
    with _writable(path.parent):
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
    rows = [row for row in map(_parsed, lines) if row and row["step"] <= steps]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return rows


def _parsed(line: str) -> Row | None:
    """Read a row; None of one that was half written."""
    try:
        row: Row = json.loads(line)
    except ValueError:
        return None
    return row


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror or error}); free it and go on with --resume") from error
