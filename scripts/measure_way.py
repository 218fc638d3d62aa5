"""Measure how much code an image passes through: the modules and lines that run in one job.

    python scripts/measure_way.py train      # from a folder to the first model file
    python scripts/measure_way.py predict    # from images to label maps

A module counts when one of its functions runs. Of its lines those count that somebody who follows
the job has to read: the functions and classes that run, whole, with their docstrings but without
blank lines. Modules that serve every job and know nothing of images (FOUNDATIONS) are listed apart;
their lines count.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import pkgutil
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import useg

PACKAGE = Path(useg.__file__).parent
FOUNDATIONS = (
    "errors.py", "files.py", "ownership.py", "parsing.py", "machine.py", "device.py", "config.py",
    "distributed.py",
)  # fmt: skip
MADE_SCENES = 8
# A code flag (CO_NEWLOCALS) of functions, which class bodies and modules lack.
IS_FUNCTION = 0x2


@dataclass(frozen=True)
class Way:
    """What ran in a job.

    Args:
        lines: path below the package -> lines of the module's functions and classes that ran.
    """

    lines: dict[str, int]

    @property
    def modules(self) -> list[str]:
        """The modules on the way, without the foundations."""
        return sorted(name for name in self.lines if name not in FOUNDATIONS)

    @property
    def num_lines(self) -> int:
        """All lines on the way, those of the foundations too."""
        return sum(self.lines.values())


class Tracer:
    """Records which functions of useg run, in all threads, until it is stopped."""

    def __init__(self) -> None:
        self.first_lines: dict[str, set[int]] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Note the function of a frame; the interpreter calls this for every call."""
        code = frame.f_code
        if event == "call" and code.co_flags & IS_FUNCTION:
            path = Path(code.co_filename)
            if path.is_relative_to(PACKAGE):
                name = path.relative_to(PACKAGE).as_posix()
                self.first_lines.setdefault(name, set()).add(code.co_firstlineno)

    def start(self) -> None:
        """Begin; what runs while modules are imported does not count, so all are imported first."""
        for module in pkgutil.walk_packages(useg.__path__, "useg."):
            if module.name != "useg.__main__":
                importlib.import_module(module.name)
        threading.setprofile(self)
        sys.setprofile(self)

    def stop(self) -> Way:
        """End, and count the lines."""
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        return Way({name: _count(name, lines) for name, lines in self.first_lines.items()})


def _count(name: str, first_lines: set[int]) -> int:
    """Count the lines of the functions and classes of a module in which a function began."""
    total, text = 0, (PACKAGE / name).read_text("utf-8")
    source = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            assert node.end_lineno is not None
            if any(first <= line <= node.end_lineno for line in first_lines):
                total += sum(bool(line.strip()) for line in source[first - 1 : node.end_lineno])
    return total


class _Ended(Exception):  # noqa: N818 - not an error
    """The first model file is there: the way of training ends."""


def measure_training(folder: Path) -> Way:
    """Train the default network on made scenes, until the first model file is written.

    The doctor's survey of the data, which `force` leaves out, stands beside this way.
    """
    from useg.api import train
    from useg.scenes.scene import write_scenes
    from useg.training import loop

    write_scenes(folder / "scenes", MADE_SCENES, (96, 64))
    write_model = loop.save_model

    def write_and_end(*arguments: Any) -> None:
        write_model(*arguments)
        raise _Ended

    tracer = Tracer()
    loop.save_model = write_and_end
    tracer.start()
    try:
        train(folder / "scenes", folder / "run", settings={"train.steps": 2}, force=True)
    except _Ended:
        return tracer.stop()
    finally:
        loop.save_model = write_model
    raise AssertionError("training wrote no model file")


def measure_prediction(folder: Path) -> Way:
    """Label images with a model of the default network."""
    from useg.inference.files import predict
    from useg.scenes.scene import write_scenes

    write_scenes(folder / "scenes", MADE_SCENES, (96, 64))
    useg.train(folder / "scenes", folder / "run", settings={"train.steps": 1})
    tracer = Tracer()
    tracer.start()
    predict(folder / "run", folder / "scenes" / "CameraRGB", folder / "labels")
    return tracer.stop()


JOBS = {"train": measure_training, "predict": measure_prediction}


def main() -> None:
    """Print the way of a job, or write it as JSON to the file named second."""
    job = sys.argv[1] if len(sys.argv) > 1 else ""
    if job not in JOBS:
        sys.exit(f"give one of {', '.join(JOBS)}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["USEG_CACHE"] = str(Path(folder) / "cache")
        way = JOBS[job](Path(folder))
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(way.lines), "utf-8")
        return
    for name, lines in sorted(way.lines.items()):
        print(f"{lines:6} {name}" + ("  (foundation)" if name in FOUNDATIONS else ""))
    print(f"{len(way.modules)} modules beside the foundations, {way.num_lines} lines in all")


if __name__ == "__main__":
    main()
