"""Measure the code path of an image: the modules and lines that run in one job.

    python scripts/measure_code_path.py             # print both
    python scripts/measure_code_path.py FILE.json   # write both: job -> module -> lines

The jobs are ``train``, from a folder to the first model file, and ``predict``, from images to label
maps.

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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest.mock import patch

import useg

PACKAGE = Path(useg.__file__).parent
FOUNDATIONS = (
    "errors.py", "files.py", "ownership.py", "parsing.py", "machine.py", "device.py",
    "config.py", "distributed.py",
)  # fmt: skip
MADE_SCENES = 8
# A code flag (CO_NEWLOCALS) of functions, which class bodies and modules lack.
IS_FUNCTION = 0x2


@dataclass(frozen=True)
class CodePath:
    """What ran in a job.

    Args:
        lines: path below the package -> lines of the module's functions and classes that ran.
    """

    lines: dict[str, int]

    @property
    def modules(self) -> list[str]:
        """The modules on the code path, without the foundations."""
        return sorted(name for name in self.lines if name not in FOUNDATIONS)

    @property
    def num_lines(self) -> int:
        """All lines on the code path, those of the foundations too."""
        return sum(self.lines.values())


class Tracer:
    """Records which functions of useg run, in all threads, until it is stopped."""

    def __init__(self) -> None:
        self.first_lines: dict[str, set[int]] = {}
        # By their ids: to hash a code object reads all of it.
        self.seen: dict[int, CodeType] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Note the function of a frame; the interpreter calls this for every call."""
        code = frame.f_code
        if event != "call" or id(code) in self.seen:
            return
        self.seen[id(code)] = code
        if code.co_flags & IS_FUNCTION:
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

    def stop(self) -> CodePath:
        """End, and count the lines."""
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        return CodePath({name: _count(name, lines) for name, lines in self.first_lines.items()})


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


def measure_training(folder: Path) -> CodePath:
    """Train the default network on made scenes; the code path ends with the first model file.

    The doctor's survey of the data, which `force` leaves out, is not part of it.
    """
    from useg import api, device
    from useg.scenes.generate import write_scenes
    from useg.training import session

    write_scenes(folder / "scenes", MADE_SCENES, (96, 64))
    write_model, code_paths = session.save_model, []

    def write_and_stop(*arguments: Any) -> None:
        write_model(*arguments)
        if not code_paths:
            code_paths.append(tracer.stop())

    tracer = Tracer()
    tracer.start()
    # The run ends with a model, which prediction needs; nobody needs its report.
    with (
        # bf16, whose layers are compiled, although other programs may disturb its measurement.
        patch.object(device, "MIN_SPEEDUP", 0.0),
        patch.object(session, "save_model", write_and_stop),
        patch.object(api, "evaluate_dataset", side_effect=KeyboardInterrupt),
        suppress(KeyboardInterrupt),
    ):
        api.train(folder / "scenes", folder / "run", settings={"train.steps": 2}, force=True)
    return code_paths[0]


def measure_prediction(folder: Path) -> CodePath:
    """Label images with the model that :func:`measure_training` has made."""
    from useg.inference.predict_files import predict

    tracer = Tracer()
    tracer.start()
    predict(folder / "run", folder / "scenes" / "CameraRGB", folder / "labels")
    return tracer.stop()


def main() -> None:
    """Print the code paths of both jobs, or write them as JSON to a file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["USEG_CACHE"] = str(folder / "cache")
        code_paths = {"train": measure_training(folder), "predict": measure_prediction(folder)}
    if len(sys.argv) > 1:
        lines = {job: code_path.lines for job, code_path in code_paths.items()}
        Path(sys.argv[1]).write_text(json.dumps(lines), "utf-8")
        return
    for job, code_path in code_paths.items():
        print(f"{job}:")
        for module, count in sorted(code_path.lines.items()):
            print(f"{count:6} {module}" + ("  (foundation)" if module in FOUNDATIONS else ""))
        num_modules, num_lines = len(code_path.modules), code_path.num_lines
        print(f"{num_modules} modules beside the foundations, {num_lines} lines in all")


if __name__ == "__main__":
    main()
