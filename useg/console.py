"""What a job tells -> a bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

SECONDS_BETWEEN_LINES = 30


class Reporter:
    """Shows a job's progress on standard error, so that standard output holds results alone."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False)
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

    def __enter__(self) -> Reporter:
        if self.live:
            self.bars.start()
        return self

    def __exit__(self, *problem: object) -> None:
        if self.live:
            self.bars.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def count(self, what: str, done: int, total: int, note: str = "") -> None:
        """Move a bar; it goes away when it is full."""
        if not self.live:
            return
        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(what, total=total, note=note)
        self.bars.update(self.tasks[what], completed=done, total=total, note=note)
        if done >= total:
            self.bars.remove_task(self.tasks.pop(what))

    def timed(self, what: str) -> Callable[[int, int], None]:
        """Return a callback that counts pictures and says how fast it goes and when it will be done; off a terminal in a line every half minute."""
        times = deque([time.perf_counter()], 100)
        said = times[0]

        def count(done: int, total: int) -> None:
            nonlocal said
            times.append(time.perf_counter())
            speed = (len(times) - 1) / max(times[-1] - times[0], 1e-6)
            note = f"{speed:.1f} images/s  {_clock((total - done) / speed)} left"
            self.count(what, done, total, note)
            if not self.live and times[-1] - said >= SECONDS_BETWEEN_LINES:
                said = times[-1]
                self.say(f"{what} {done}/{total}  {note}")

        return count

    def decoded(self, done: int, total: int) -> None:
        """Pictures decoded so far."""
        self.count("decoding", done, total)

    def step(self, row: dict[str, Any], steps: int, seconds_left: float) -> None:
        """One training step done."""
        score = f"mIoU {100 * self.mean_iou:.1f} %  " if self.mean_iou is not None else ""
        self.count(
            "training",
            row["step"],
            steps,
            f"loss {row['loss']:.3f}  {score}{row['images_per_second']:.1f} images/s  {_clock(seconds_left)} left",
        )

    def validated(self, row: dict[str, Any]) -> None:
        """An epoch was scored."""
        self.mean_iou = row["mean_iou"]
        mean_iou = f"{100 * row['mean_iou']:4.1f} %"
        self.say(
            f"epoch {row['epoch']:6.1f}  step {row['step']:6d}  loss {row['loss']:.4f}  mIoU {mean_iou}  {_clock(row['seconds'])}"
        )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help="folder of images and masks whose layout is recognised, or a dataset.toml",
    ),
]


Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="run folder, model.safetensors, or exported .onnx or .xml; several with commas between: an ensemble",
    ),
]


Computed = Annotated[
    str | None,
    typer.Option(
        "--runtime",
        metavar="NAME",
        help="auto, torch, torch-bf16, gpu, onnx, openvino or openvino-bf16; by default the file's own",
    ),
]


Augmented = Annotated[
    str,
    typer.Option(
        "--augment",
        metavar="NAME",
        help="mean of several views of a picture: flip, flips, turns or scales",
    ),
]


Out = Annotated[Path, typer.Option("--out", help="folder to write")]


Set = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="change a setting; may be repeated (useg train --settings lists them)",
    ),
]


Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="write the result as JSON ('-': to standard output)"
    ),
]


Html = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        help="write a page with pictures, and the same in Markdown beside it",
    ),
]


@dataclass
class Said:
    """What was said before the command: ``--quiet``."""

    quiet: bool = False


said = Said()


def write_json_output(path: Path, content: dict[str, Any]) -> None:
    """Write a command's result to a file, or to standard output for ``-``."""
    if path == Path("-"):
        print(json.dumps(content, indent=2))
    else:
        from useg.files import write_json

        write_json(path, content)
