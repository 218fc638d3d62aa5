"""A run that is killed at any moment continues as if it had not been."""

from __future__ import annotations

import json
import os
import pickle
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from made_training import (
    read_log,
    read_scores,
)

from useg.config import read_settings
from useg.errors import UsageError
from useg.models import segmenter

SOAK = os.environ.get("USEG_SOAK") == "1"


class Forks:
    """Runs ``useg train`` in processes of their own, one at a time.

    Args:
        folder: For the cache and the errors.
    """

    def __init__(self, folder: Path) -> None:
        self.errors, self.cache = folder / "errors.txt", folder / "cache"
        environment = {**os.environ, "USEG_CACHE": str(self.cache), "OMP_NUM_THREADS": "1"}
        with self.errors.open("wb") as errors:
            program = [sys.executable, str(Path(__file__).parent.parent / "forked.py")]
            self.server = subprocess.Popen(
                program,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *problem: object) -> None:
        self.server.kill()
        self.server.communicate()

    def start(self, data: Path, out: Path, epochs: int = 8, *, plain: bool = False) -> int:
        """Start a run or continue it; return the id of the process.

        A ``plain`` run writes its checkpoint straight onto the file.
        """
        settings = (
            "model.width=4",
            "model.depth=2",
            "model.dropout=0.2",
            "train.batch=3",
            "train.precision=fp32",
            "data.size=48x32",
        )
        words = [
            *["plain"] * plain,
            "--quiet",
            "train",
            str(data),
            "--out",
            str(out),
            "--epochs",
            str(epochs),
            "--resume",
        ]
        self.server.stdin.write(
            json.dumps([*words, *(word for setting in settings for word in ("--set", setting))])
            + "\n"
        )
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def ended(self, seconds: float) -> bool:
        """Wait for the process for so many seconds; return whether it has ended."""
        assert self.server.stdout
        return bool(select.select([self.server.stdout], [], [], seconds)[0])

    def status(self) -> int:
        """Wait for the process; return its exit status, or minus the signal that killed it."""
        return int(self.server.stdout.readline())


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("forks")) as started:
        yield started


def everything(run: Path) -> dict[str, Any]:
    """What a run leaves, but for what tells the time."""
    exact = {
        path.name: path.read_bytes()
        for path in [
            *run.glob("*.toml"),
            *run.glob("*.csv"),
            *run.glob("*.safetensors"),
            *run.glob("pictures/*"),
        ]
    }
    scores = json.loads((run / "scores.json").read_text())
    left = sorted(path.name for path in run.iterdir())
    return {
        **exact,
        "scores": (scores["mean_iou"], scores["classes"]),
        "log": read_scores(run),
        "files": left,
    }


READERS = {
    "state.pt": partial(torch.load, weights_only=True),
    "model.safetensors": segmenter.load_model,
    "run.toml": read_settings,
    "scores.json": lambda path: json.loads(path.read_text()),
}
# An empty file is an OSError.
DAMAGE = UsageError, RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError


def damaged(run: Path) -> list[str]:
    """Names of the files that nobody can read."""
    found = []
    for name in READERS:
        try:
            if (run / name).exists():
                READERS[name](run / name)
        except DAMAGE:
            found.append(name)
    return found


PHASES = ("start", "training", "report")


def kills(
    forks: Forks, data: Path, run: Path, life: float, seed: int, *, plain: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """Kill a run five times, and continue it each time.

    A kill comes at a random moment after the run has begun to start, to train, or to report.

    Yields:
        What the run was doing (``"start"``, ``"training"``, ``"report"``), and which of its files
        are damaged.
    """
    draw = random.Random(seed)
    for wanted in ("start", "training", "training", "training", "report"):
        status = 0
        # It may end before it is killed.
        while status == 0:
            pid = forks.start(data, run, plain=plain)
            while PHASES.index(phase_of(run)) < PHASES.index(wanted) and not forks.ended(0.002):
                pass
            if not forks.ended(draw.uniform(0, 0.2 * life)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            status = forks.status()
            assert status in (0, -signal.SIGKILL), forks.errors.read_text()
        yield phase_of(run), damaged(run)


def phase_of(run: Path) -> str:
    log = run / "log.jsonl"
    has_steps = log.exists() and log.stat().st_size > 0
    return "report" if (run / "curves.png").exists() else "training" if has_steps else "start"


def finish(forks: Forks, data: Path, run: Path, *, plain: bool = False) -> float:
    """Let a run continue to its end; return how many seconds that took."""
    began = time.perf_counter()
    forks.start(data, run, plain=plain)
    assert forks.status() == 0, forks.errors.read_text()
    return time.perf_counter() - began


def test_run_killed_at_any_moment_ends_as_if_it_had_not_been(
    forks: Forks, disc_folder: Path, tmp_path: Path
) -> None:
    finish(forks, disc_folder, tmp_path / "whole")
    life, phases = finish(forks, disc_folder, tmp_path / "again"), set()
    for seed in range(100 if SOAK else 2):
        run = tmp_path / f"run {seed}"
        # So that it is killed while it decodes, too.
        shutil.rmtree(forks.cache)
        for phase, names in kills(forks, disc_folder, run, life, seed):
            phases.add(phase)
            assert names == []
        finish(forks, disc_folder, run)
        assert everything(run) == everything(tmp_path / "whole")
    assert {"training", "report"} <= phases


def test_kills_reveal_a_checkpoint_written_without_replacing(
    forks: Forks, disc_folder: Path, tmp_path: Path
) -> None:
    life = finish(forks, disc_folder, tmp_path / "whole", plain=True)
    found = (
        names
        for seed in range(10)
        for _, names in kills(forks, disc_folder, tmp_path / f"run {seed}", life, seed, plain=True)
    )
    assert any("state.pt" in names for names in found)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_waits_for_the_step_and_saves(
    number: signal.Signals, forks: Forks, disc_folder: Path, tmp_path: Path
) -> None:
    # So many epochs that it still trains when the signal comes.
    log, pid = tmp_path / "run" / "log.jsonl", forks.start(disc_folder, tmp_path / "run", 200)
    while not forks.ended(0.01) and (not log.exists() or log.read_bytes().count(b"\n") < 3):
        pass
    os.kill(pid, number)
    assert (forks.status(), forks.errors.read_text()) == (130, "")
    saved = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert 3 <= saved["step"] == len(read_log(tmp_path / "run")) < 400
