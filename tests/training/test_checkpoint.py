"""A run continues from its checkpoint to the bit; checkpoints that do not fit are refused."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_training import (
    StopAfter,
    make_disc_dataset,
    quick_settings,
    read_log,
    run_results,
)

import useg
from useg.config import read_settings
from useg.errors import MachineError, ModelError, UsageError
from useg.training import checkpoint, loop
from useg.training.checkpoint import (
    RunState,
    SaveClock,
    _open_log,
    _parse_row,
    _read_log,
    load_checkpoint,
    save_checkpoint,
)

pytestmark = pytest.mark.usefixtures("save_after_every_step")

SOAK = os.environ.get("USEG_SOAK") == "1"


KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"model__padding": "valid"},
    {"train__precision": "bf16"},
    {"train__accumulate": 3},
    {
        "model__encoder": "lite0",
        "model__pretrained": False,
        "model__depth": None,
        "train__accumulate": 2,
    },
)
TINY = {"model.width": 2, "model.depth": 1, "train.batch": 3, "data.size": "48x32"}


@pytest.mark.parametrize("seed", range(50 if SOAK else 5))
def test_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_disc_dataset(tmp_path / "data")
    settings = quick_settings(model__dropout=0.3, train__epochs=5, **KINDS[seed % len(KINDS)])
    loop.fit(dataset, tmp_path / "whole", settings)
    at = sorted(random.Random(seed).sample(range(1, 9), 2))
    # Even steps end an epoch: a stop during their validation takes effect there; a stop after an
    # odd step takes effect at the next one.
    ends = [step + step % 2 for step in (at[0], at[1] + 1)]
    run = loop.fit(dataset, tmp_path / "run", settings, StopAfter(at[0], monkeypatch))
    assert (run.interrupted, len(read_log(tmp_path / "run"))) == (True, ends[0])
    resolved = read_settings(tmp_path / "run" / "run.toml")
    run = loop.fit(
        dataset, tmp_path / "run", resolved, StopAfter(at[1] + 1, monkeypatch), resume=True
    )
    assert (run.interrupted, len(read_log(tmp_path / "run"))) == (ends[1] < 10, ends[1])
    monkeypatch.undo()
    run = loop.fit(dataset, tmp_path / "run", resolved, resume=True)
    assert not run.interrupted
    assert run_results(tmp_path / "run") == run_results(tmp_path / "whole")
    assert [row["step"] for row in run.log] == list(range(1, 11))


def test_finished_run_keeps_a_small_checkpoint_and_its_report_is_renewed(
    disc_folder: Path, tmp_path: Path
) -> None:
    settings = {**TINY, "train.steps": 4}
    run = useg.train(disc_folder, tmp_path / "run", settings=settings)
    before = run_results(tmp_path / "run")
    assert (tmp_path / "run" / "state.pt").stat().st_size < 4096
    (tmp_path / "run" / "report.html").unlink()
    again = useg.train(disc_folder, tmp_path / "run", resume=True)
    assert run_results(tmp_path / "run") == before
    assert (again.scores.mean_iou, len(again.log)) == (run.scores.mean_iou, 4)
    assert (tmp_path / "run" / "report.html").exists()


def test_resume_starts_a_run_that_does_not_exist(disc_folder: Path, tmp_path: Path) -> None:
    settings = {**TINY, "train.steps": 2}
    assert len(useg.train(disc_folder, tmp_path / "run", settings=settings, resume=True).log) == 2


def test_resume_with_other_data_or_settings_names_the_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_disc_dataset(tmp_path / "data")
    first = loop.fit(dataset, tmp_path / "run", quick_settings(), StopAfter(3, monkeypatch))
    dataset.pairs[0].mask.write_bytes(dataset.pairs[1].mask.read_bytes())
    with pytest.raises(
        ModelError,
        match=r"was saved with other data or settings \('6 training pictures, .*; restore the data",
    ):
        loop.fit(dataset, tmp_path / "run", first.settings, resume=True)
    other = first.settings.with_({"train.learning_rate": 0.5})
    difference = "'train.learning_rate = 0.01' in the checkpoint, 'train.learning_rate = 0.5' now"
    with pytest.raises(ModelError, match=difference):
        loop.fit(make_disc_dataset(tmp_path / "data"), tmp_path / "run", other, resume=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-30],
        lambda content: b"",
        lambda content: b"x" * 100,
        lambda content: content[: len(content) // 2],
    ],
)
def test_damaged_checkpoint_is_refused(
    damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_disc_dataset(tmp_path / "data")
    first = loop.fit(dataset, tmp_path / "run", quick_settings(), StopAfter(3, monkeypatch))
    path = tmp_path / "run" / "state.pt"
    path.write_bytes(damage(path.read_bytes()))
    message = (
        "state.pt is damaged or not a checkpoint; remove it to start this run again from step 0"
    )
    with pytest.raises(ModelError, match=message):
        loop.fit(dataset, tmp_path / "run", first.settings, resume=True)


TWO_SIGNALS = """
import os, signal
from useg.training.checkpoint import interruptible

# A background job of a shell starts with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
before = signal.getsignal(signal.SIGINT)
with interruptible() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt:
        print("at once")
assert signal.getsignal(signal.SIGINT) is before
"""


def test_second_signal_acts_at_once_and_handlers_are_restored() -> None:
    program = [sys.executable, "-c", TWO_SIGNALS]
    done = subprocess.run(program, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "at once\n"


def test_saving_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_SAVE_SHARE", 0.1)
    monkeypatch.setattr(checkpoint, "ASSUMED_DISK_BYTES_PER_SECOND", 4e4)
    # 100 parameters: 1200 bytes with their moments, so saving is estimated to take 0.03 s.
    model, now = torch.nn.Linear(9, 10), 100.0
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(perf_counter=lambda: now))
    clock = SaveClock(checkpoint.estimate_save_seconds(model), now)
    for needed in (0.3, 0.2):
        now += needed - 0.01
        assert not clock.is_due()
        now += 0.02
        assert clock.is_due()
        with clock.measure():
            now += 0.02


def test_checkpoint_holds_only_tensors_and_plain_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_disc_dataset(tmp_path / "data")
    loop.fit(dataset, tmp_path / "run", quick_settings(), StopAfter(3, monkeypatch))
    content = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    keys = {"step", "best", "seconds", "about", "model", "optimizer", "scheduler", "random"}
    assert keys <= set(content)
    assert json.dumps(content["about"])


def small_training() -> tuple[Any, ...]:
    """A network of one layer with its optimizer, scheduler and scaler, after one step."""
    model = torch.nn.Conv2d(1, 2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model(torch.ones(1, 1, 2, 2)).sum().backward()
    optimizer.step()
    scheduler.step()
    return model, optimizer, scheduler, scaler


FORGERIES: dict[str, Any] = {
    "step": lambda c: {**c, "step": "x"},
    "negative step": lambda c: {**c, "step": -1},
    "seconds": lambda c: {**c, "seconds": math.nan},
    "best": lambda c: {**c, "best": torch.ones(2, 3)},
    "no identity": lambda c: {**c, "about": 5},
    "a list": lambda c: [1],
    "no optimizer": lambda c: {k: v for k, v in c.items() if k != "optimizer"},
    "optimizer": lambda c: {**c, "optimizer": {"state": 1, "param_groups": []}},
    "NaN": lambda c: {**c, "model": {k: v * math.nan for k, v in c["model"].items()}},
    "shape": lambda c: {**c, "model": {k: v.flatten() for k, v in c["model"].items()}},
    "method": lambda c: {**c, "scheduler": {**c["scheduler"], "step": 5}},
    "scheduler": lambda c: {**c, "scheduler": {**c["scheduler"], "last_epoch": "x"}},
    "random": lambda c: {**c, "random": torch.zeros(3, dtype=torch.uint8)},
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    path, state = tmp_path / "state.pt", RunState("same", 1)
    save_checkpoint(path, state, *small_training())
    assert load_checkpoint(path, "same", *small_training()).step == 1
    torch.save(FORGERIES[name](torch.load(path, weights_only=True)), path)
    before = torch.get_rng_state()
    with pytest.raises(ModelError):
        load_checkpoint(path, "same", *small_training())
    torch.set_rng_state(before)


def test_the_test_sees_a_reader_without_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "check_weights", lambda weights, path: None)
    monkeypatch.setattr(checkpoint, "_check_content", lambda content: None)
    for name in ("negative step", "seconds", "NaN"):
        path = tmp_path / f"{name}.pt"
        save_checkpoint(path, RunState("same", 1), *small_training())
        torch.save(FORGERIES[name](torch.load(path, weights_only=True)), path)
        load_checkpoint(path, "same", *small_training())


def test_a_checkpoint_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "state.pt")
    with pytest.raises(MachineError, match="a pipe or a device"):
        load_checkpoint(tmp_path / "state.pt", "same", *small_training())


def test_rows_of_a_log_that_are_no_rows_are_left_out() -> None:
    row = {"step": 1, "loss": 0.5, "seconds": 2.0, "mean_iou": None}
    assert _parse_row(json.dumps(row)) == row
    for line in ("[1]", "5", '{"step": 1}', "[" * 10_000, json.dumps({**row, "loss": "x"})):
        assert _parse_row(line) is None
    assert _parse_row(json.dumps({**row, "step": None})) is None


def test_a_log_has_one_row_for_each_step_and_a_row_without_end_is_none(tmp_path: Path) -> None:
    rows = [{"step": k, "loss": 0.5, "seconds": 2.0, "learning_rate": 0.1} for k in range(1, 6)]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in (*rows[:3], *rows)) + "x" * 1_000_000)
    assert _read_log(log, 4) == rows[:4]
    assert log.read_text().count("\n") == 4


def test_a_log_ends_at_a_line_longer_than_any_row_or_at_very_many_other_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"loss": 0.5, "seconds": 2.0, "learning_rate": 0.1}
    rows = [json.dumps({"step": k} | row) + "\n" for k in (1, 2)]
    log = tmp_path / "log.jsonl"
    monkeypatch.setattr(checkpoint, "_MAX_OTHER_LINES", 9)
    # Zeros may stand for many gigabytes that take no space.
    for other, count in (("\0" * 1000, 2), ("\0" * 70_000, 1), ("\n" * 8, 2), ("\n" * 9, 1)):
        log.write_text(rows[0] + other + "\n" + rows[1])
        assert len(_read_log(log, 4)) == count


def test_a_link_in_place_of_a_log_is_not_written_through(tmp_path: Path) -> None:
    log, foreign = tmp_path / "log.jsonl", tmp_path / "foreign.txt"
    foreign.write_text("mine")
    log.symlink_to(foreign)
    with pytest.raises(OSError, match="symbolic links"):
        _open_log(log)
    with pytest.raises(UsageError, match="would replace a file that useg did not write"):
        _read_log(log, 4)
    # The control: a plain open follows it.
    with open(log, "a") as file:
        file.write(".")
    assert foreign.read_text() == "mine."
