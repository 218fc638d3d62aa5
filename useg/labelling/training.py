"""``useg train`` on the labelled folder, started from the page: its progress and its report."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from useg.errors import DataError
from useg.labelling.folder import LabelFolder
from useg.labelling.rounds import Rounds

RUN_NAME = "useg-run"
_MAX_LINES = 200


class ProperTraining:
    """One ``useg train`` at a time; the rounds pause meanwhile."""

    def __init__(self, folder: LabelFolder, rounds: Rounds) -> None:
        self._folder = folder
        self._rounds = rounds
        self._process: subprocess.Popen[str] | None = None
        self._lines: list[str] = []
        self._out: Path | None = None
        self._began = 0.0
        self._minutes = 0.0
        self._lock = threading.Lock()

    def start(self, minutes: float) -> None:
        """Start to train for so many minutes.

        Raises:
            DataError: It runs already, or fewer than two pictures are painted.
        """
        with self._lock:
            if self._process and self._process.poll() is None:
                raise DataError("a training is in progress; stop it first, or wait for its end")
            painted = [each for each in self._folder.pictures if each.state != "empty"]
            if len(painted) < 2:
                raise DataError("training needs at least two painted pictures; paint more")
            root = self._folder.place.root
            number = next(n for n in range(1, 1 << 20) if not (root / f"{RUN_NAME}-{n}").exists())
            self._out = root / f"{RUN_NAME}-{number}"
            self._lines, self._began, self._minutes = [], time.monotonic(), minutes
            self._rounds.paused = True
            command = [sys.executable, "-m", "useg", "train", str(root), "--out", str(self._out)]
            self._process = subprocess.Popen(
                [*command, "--minutes", f"{minutes:g}", "--force"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            threading.Thread(target=self._follow, args=(self._process,), daemon=True).start()

    def _follow(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            self._lines = [*self._lines, line.rstrip()][-_MAX_LINES:]
        process.wait()
        self._rounds.paused = False
        self._rounds.changed()

    def stop(self) -> None:
        """End the training; what it has learnt so far is kept."""
        if self._process and self._process.poll() is None:
            self._process.terminate()

    def state(self) -> dict[str, Any] | None:
        """Return what the page shows; None before the first training."""
        if self._process is None or self._out is None:
            return None
        status = self._process.poll()
        elapsed = time.monotonic() - self._began
        return {
            "running": status is None,
            "failed": bool(status),
            "share": min(1.0, elapsed / (60 * self._minutes)) if status is None else 1.0,
            "line": next((line for line in reversed(self._lines) if line), ""),
            "out": str(self._out),
            "report": (self._out / "report.html").exists(),
        }

    def report(self) -> bytes:
        """Return the report of the last training.

        Raises:
            DataError: There is none.
        """
        if self._out is None or not (self._out / "report.html").exists():
            raise DataError("there is no report yet; train first")
        return (self._out / "report.html").read_bytes()
