"""A run goes on to the bit after an interruption, a kill, or a full disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import log_of, make_set, numbers_of, quick

import useg
from useg import UsageError
from useg.config import read_settings
from useg.training import loop, state
from useg.training.state import Clock, Stop

SOAK = os.environ.get("USEG_SOAK") == "1"


@pytest.fixture(autouse=True)
def save_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "SECONDS", 0.0)
    monkeypatch.setattr(state, "SHARE", 1e9)


class Stopper(loop.Silent):
    """Asks the run to stop after a step, as a signal would."""

    def __init__(self, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at, self.stop = at, Stop()
        monkeypatch.setattr(loop, "interruptible", lambda: nullcontext(self.stop))

    def step(self, row: dict[str, Any], steps: int, seconds_left: float) -> None:
        self.stop.wanted = self.stop.wanted or row["step"] == self.at


def result(run: Path) -> tuple[bytes, list[tuple[float, float]], bytes]:
    return (run / "model.safetensors").read_bytes(), numbers_of(run), (run / "run.toml").read_bytes()


@pytest.mark.parametrize("seed", range(50 if SOAK else 5))
def test_an_interrupted_run_that_goes_on_equals_an_unbroken_one_to_the_bit(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    dataset = make_set(tmp_path / "data")
    settings = quick(
        model__dropout=0.3, train__epochs=5, train__precision=draw.choice(["fp32", "bf16"]), model__padding=draw.choice(["same", "valid"])
    )
    loop.train(dataset, tmp_path / "whole", settings)
    at = sorted(draw.sample(range(1, 9), 2))
    first = loop.train(dataset, tmp_path / "run", settings, Stopper(at[0], monkeypatch))
    assert first.interrupted
    assert len(log_of(tmp_path / "run")) == at[0] + 1  # the step after the signal was finished
    resolved = read_settings(tmp_path / "run" / "run.toml")
    second = loop.train(dataset, tmp_path / "run", resolved, Stopper(at[1] + 1, monkeypatch), resume=True)
    assert second.interrupted == (at[1] + 1 < 10)
    monkeypatch.undo()
    last = loop.train(dataset, tmp_path / "run", resolved, resume=True)
    assert not last.interrupted
    assert result(tmp_path / "run") == result(tmp_path / "whole")
    assert [row["step"] for row in last.log] == list(range(1, 11))


CHILD = """
import sys
from useg.training import state
state.SECONDS, state.SHARE = 0.0, 1e9
from useg.cli import main
main(sys.argv[1:])
"""


def command(data: Path, out: Path) -> list[str]:
    settings = ("model.width=4", "model.depth=2", "model.dropout=0.2", "train.batch=3", "train.precision=fp32", "data.size=48x32")
    words = ["--quiet", "train", str(data), "--out", str(out), "--epochs", "20", "--resume"]
    return [sys.executable, "-c", CHILD, *words, *(word for setting in settings for word in ("--set", setting))]


def scenes(folder: Path) -> Path:
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for k, pair in enumerate(make_set(folder / "made", 8, 0).pairs):
        pair.image.rename(folder / "images" / f"a{k}.png")
        pair.mask.rename(folder / "masks" / f"a{k}.png")
    return folder


def wait_for_step(log: Path, step: int, child: subprocess.Popen[bytes]) -> None:
    """Wait until a run has logged a step, or has ended."""
    while child.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < step):
        time.sleep(0.002)


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    data, log = scenes(tmp_path / "data"), tmp_path / "run" / "log.jsonl"
    subprocess.run(command(data, tmp_path / "whole"), check=True, capture_output=True)
    draw = random.Random(0)
    steps = len(log_of(tmp_path / "whole"))
    for kill in sorted(draw.sample(range(1, steps), 25 if SOAK else 3)) * (20 if SOAK else 1):
        if (tmp_path / "run" / "scores.json").exists():
            shutil.rmtree(tmp_path / "run")
        with subprocess.Popen(command(data, tmp_path / "run"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
            wait_for_step(log, kill, child)
            time.sleep(draw.uniform(0, 0.02))
            child.kill()
            _, errors = child.communicate()
        assert child.returncode in (0, -signal.SIGKILL), errors.decode()
    subprocess.run(command(data, tmp_path / "run"), check=True, capture_output=True)
    assert result(tmp_path / "run") == result(tmp_path / "whole")


def test_a_run_that_has_ended_says_so_and_keeps_a_small_state(tmp_path: Path) -> None:
    data = scenes(tmp_path / "data")
    settings = {"model.width": 2, "model.depth": 1, "train.batch": 3, "train.steps": 4, "data.size": "48x32"}
    run = useg.train(data, tmp_path / "run", settings=settings)
    before = result(tmp_path / "run")
    assert (tmp_path / "run" / "state.pt").stat().st_size < 4096
    (tmp_path / "run" / "report.html").unlink()
    again = useg.train(data, tmp_path / "run", resume=True)
    assert result(tmp_path / "run") == before
    assert (again.scores.mean_iou, len(again.log)) == (run.scores.mean_iou, 4)
    assert (tmp_path / "run" / "report.html").exists()


def test_resume_begins_a_run_that_has_not_begun(tmp_path: Path) -> None:
    data = scenes(tmp_path / "data")
    settings = {"model.width": 2, "model.depth": 1, "train.batch": 3, "train.steps": 2, "data.size": "48x32"}
    assert len(useg.train(data, tmp_path / "run", settings=settings, resume=True).log) == 2


def test_other_data_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_set(tmp_path / "data")
    first = loop.train(dataset, tmp_path / "run", quick(), Stopper(3, monkeypatch))
    dataset.pairs[0].mask.write_bytes(dataset.pairs[1].mask.read_bytes())
    with pytest.raises(UsageError, match=r"was saved with other data or settings \('6 training pictures, .*; give the data as it was"):
        loop.train(dataset, tmp_path / "run", first.settings, resume=True)
    other = first.settings.with_({"train.learning_rate": 0.5})
    with pytest.raises(UsageError, match=r"'train.learning_rate = 0.01' there, 'train.learning_rate = 0.5' here"):
        loop.train(make_set(tmp_path / "data"), tmp_path / "run", other, resume=True)


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-30], lambda content: b"", lambda content: b"x" * 100, lambda content: content[: len(content) // 2]]
)
def test_a_damaged_state_is_one_clear_sentence(damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_set(tmp_path / "data")
    first = loop.train(dataset, tmp_path / "run", quick(), Stopper(3, monkeypatch))
    path = tmp_path / "run" / "state.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match=r"state.pt is damaged, or no state of a run; remove it to start this run from its beginning"):
        loop.train(dataset, tmp_path / "run", first.settings, resume=True)


@pytest.mark.parametrize("at", range(1, 11))
def test_a_full_disk_leaves_the_last_good_state(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_set(tmp_path / "data")
    settings = quick(train__epochs=6, model__dropout=0.2)
    loop.train(dataset, tmp_path / "whole", settings)
    real, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 3 + at:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\); "):
        loop.train(dataset, tmp_path / "run", settings)
    monkeypatch.setattr(os, "fsync", real)
    resolved = read_settings(tmp_path / "run" / "run.toml")
    loop.train(dataset, tmp_path / "run", resolved, resume=True)
    assert result(tmp_path / "run")[:2] == result(tmp_path / "whole")[:2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_waits_for_the_step_and_saves(number: signal.Signals, tmp_path: Path) -> None:
    data, log = scenes(tmp_path / "data"), tmp_path / "run" / "log.jsonl"
    with subprocess.Popen(command(data, tmp_path / "run"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        wait_for_step(log, 3, child)
        child.send_signal(number)
        _, errors = child.communicate()
    assert (child.returncode, errors.decode()) == (130, "")
    saved = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert saved["step"] == len(log_of(tmp_path / "run")) < 60


TWICE = """
import os, signal
from useg.training.state import interruptible
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
before = signal.getsignal(signal.SIGINT)
with interruptible() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.wanted
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt:
        print("at once")
assert signal.getsignal(signal.SIGINT) is before
"""


def test_a_second_signal_acts_at_once_and_handlers_are_put_back() -> None:
    assert subprocess.run([sys.executable, "-c", TWICE], check=True, capture_output=True, text=True, timeout=60).stdout == "at once\n"


def test_saving_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "SHARE", 0.1)
    clock = Clock()
    assert clock.due()
    with clock.saving():
        time.sleep(0.02)
    assert not clock.due()  # 0.2 s must pass
    assert clock.cost >= 0.02


def test_states_hold_tensors_and_plain_values_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop.train(make_set(tmp_path / "data"), tmp_path / "run", quick(), Stopper(3, monkeypatch))
    content = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert {"step", "best", "seconds", "about", "model", "optimizer", "scheduler", "random"} <= set(content)
    assert json.dumps(content["about"])
