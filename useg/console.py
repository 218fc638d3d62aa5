"""What the commands share: global options, common arguments, progress bars, tables and JSON."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from useg.errors import DeviceWarning
from useg.machine import DEVICE_VARIABLE
from useg.parsing import printable

SECONDS_BETWEEN_LINES = 30
# Share of a training run between two printed scores.
SHARE_BETWEEN_SCORES = 0.02
TIMED_STEPS = 100

Data = Annotated[
    Path,
    typer.Argument(metavar="DATA", help="Folder of images and masks, or a dataset.toml"),
]
Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="Run folder, model.safetensors, .onnx or .xml; several, separated by commas, "
        "form an ensemble",
    ),
]
TrainedModel = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Run folder or model.safetensors")
]


def runtime_option(default: str) -> Any:
    """Return the option ``--runtime`` of a command; ``default`` says what it does without."""
    return typer.Option(
        "--runtime",
        metavar="NAME",
        help="Runtime: torch, torch-bf16, gpu, onnx, openvino, openvino-bf16, or auto, the fastest "
        f"that gives the same labels (default: {default})",
    )


def use_device(name: str | None) -> str | None:
    """Let PyTorch compute on this device, here and in the processes that are started."""
    if name:
        os.environ[DEVICE_VARIABLE] = name
    return name


Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        envvar=DEVICE_VARIABLE,
        callback=use_device,
        help="Device of PyTorch: cpu, cuda, cuda:1, mps or xpu; auto uses a GPU if there is one "
        "(default: auto)",
    ),
]
Augmentation = Annotated[
    str,
    typer.Option(
        "--augment",
        metavar="NAME",
        help="Test-time augmentation, the mean of several predictions: flip (mirrored), flips (4 "
        "flips), turns (8 flips and rotations) or scales (3 sizes)",
    ),
]


def finite(value: float | None) -> float | None:
    """Refuse a number that is NaN or infinite."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def _check_json_file(path: Path | None) -> Path | None:
    """Refuse a file that cannot or must not be written, before the command begins."""
    if path is not None and path != Path("-"):
        from useg.files import check_writable
        from useg.ownership import is_own_json

        check_writable(path, is_own_json)
    return path


Out = Annotated[Path, typer.Option("--out", help="Folder to write to")]
Assignments = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting; repeatable (useg train --settings lists all settings)",
    ),
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=_check_json_file,
        help="Write the result as JSON ('-' for standard output)",
    ),
]
HtmlFile = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        help="Write a report with images, and the same text as a Markdown file",
    ),
]


@dataclass
class GlobalOptions:
    """Options given before or after any command: ``--quiet``."""

    quiet: bool = False


global_options = GlobalOptions()


def show(text: object = "", file: TextIO | None = None) -> None:
    """Print a line; what would command the terminal is escaped."""
    print(printable(str(text)), file=file, flush=True)


def print_device_warnings() -> None:
    """Print warnings about devices as sentences; other warnings stay as they are."""
    show_others = warnings.showwarning

    def show_sentence(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, DeviceWarning):
            show(f"useg: {message}", sys.stderr)
        else:
            show_others(message, category, *place)

    warnings.showwarning = show_sentence  # type: ignore[assignment]


def print_json(path: Path, content: dict[str, Any]) -> None:
    """Write a command's result as JSON to a file, or to standard output for ``-``."""
    if path == Path("-"):
        print(json.dumps(content, indent=2))
    else:
        from useg.files import write_json

        write_json(path, content)


def format_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lay out a table for a terminal: the first column to the left, all others to the right.

    Args:
        headings: one per column.
        rows: cells as text, one per column.

    Returns:
        Lines without trailing spaces; no line is wrapped.

    >>> format_table(("class", "IoU"), [("road", "93.1 %"), ("car", "8.0 %")])
    ['class     IoU', 'road   93.1 %', 'car     8.0 %']
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    text = io.StringIO()
    Console(file=text, width=10_000, color_system=None, highlight=False).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]


class _Console(Console):
    """Standard error, whose reader may go away: the work continues."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Reporter:
    """Shows the progress of a job on standard error, so that standard output holds only results.

    On a terminal it draws bars; elsewhere it prints a line now and then; with ``quiet`` nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = _Console(file=sys.stderr, quiet=quiet, highlight=False)
        self.bars = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(40),
            TextColumn("{task.completed}/{task.total}  {task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        self.live = self.console.is_terminal and not quiet
        self.tasks: dict[str, TaskID] = {}
        self.mean_iou: float | None = None
        self.num_steps = 0
        self.printed_step = 0

    def __enter__(self) -> Reporter:
        if self.live:
            self.bars.start()
        return self

    def __exit__(self, *problem: object) -> None:
        if self.live:
            self.bars.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        try:
            self.console.print(printable(text), markup=False, soft_wrap=True)
        except OSError:
            # A full disk, for example: a message is not worth the job.
            self.console.quiet = True

    def count(self, what: str, done: int, total: int, note: str = "") -> None:
        """Move a bar; a full bar disappears."""
        if not self.live:
            return
        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(what, total=total, note=note)
        self.bars.update(self.tasks[what], completed=done, total=total, note=note)
        if done >= total:
            self.bars.remove_task(self.tasks.pop(what))

    def timed(self, what: str) -> Callable[[int, int], None]:
        """Return a callback that counts images and estimates the time that is left.

        Off a terminal it prints a line every half minute.
        """
        times = deque([time.perf_counter()], TIMED_STEPS)
        printed = times[0]

        def count(done: int, total: int) -> None:
            nonlocal printed
            times.append(time.perf_counter())
            speed = (len(times) - 1) / max(times[-1] - times[0], 1e-6)
            note = f"{speed:.1f} images/s  {_clock((total - done) / speed)} left"
            self.count(what, done, total, note)
            if not self.live and times[-1] - printed >= SECONDS_BETWEEN_LINES:
                printed = times[-1]
                self.say(f"{what} {done}/{total}  {note}")

        return count

    def decoded(self, done: int, total: int) -> None:
        """Show how many images are decoded."""
        self.count("decoding", done, total)

    def step(self, row: dict[str, Any], steps: int, seconds_left: float) -> None:
        """Show one training step."""
        self.num_steps = steps
        score = f"mIoU {100 * self.mean_iou:.1f} %  " if self.mean_iou is not None else ""
        speed = f"{row['images_per_second']:.1f} images/s"
        note = f"loss {row['loss']:.3f}  {score}{speed}  {_clock(seconds_left)} left"
        self.count("training", row["step"], steps, note)

    def validated(self, row: dict[str, Any]) -> None:
        """Print the scores of a validation, at most once in ``SHARE_BETWEEN_SCORES`` of a run.

        The bar shows the latest score, and log.jsonl has all of them.
        """
        self.mean_iou = row["mean_iou"]
        since = row["step"] - self.printed_step
        if row["step"] < self.num_steps and since < SHARE_BETWEEN_SCORES * self.num_steps:
            return
        self.printed_step = row["step"]
        self.say(
            f"epoch {row['epoch']:6.1f}  step {row['step']:6d}  loss {row['loss']:.4f}  "
            f"mIoU {100 * row['mean_iou']:4.1f} %  {_clock(row['seconds'])}"
        )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
