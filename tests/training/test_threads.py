"""A run with a time limit uses the cores that other programs leave free, and can be repeated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_training import (
    StopAfter,
    make_disc_dataset,
    quick_settings,
    read_scores,
    restored_threads,
)
from torch import Tensor

from useg.config import read_settings
from useg.training import loop, threads
from useg.training.threads import OtherPrograms, ThreadControl, fitting_threads
from useg.training.trainer import Trainer


@pytest.fixture
def two_threads() -> Iterator[None]:
    with restored_threads():
        torch.set_num_threads(2)
        yield


@pytest.mark.parametrize(
    ("now", "most", "cores", "others", "expected"),
    [
        (2, 2, 2, 0.1, 2),
        (2, 2, 2, 0.49, 2),
        (2, 2, 2, 0.67, 1),
        (2, 2, 2, 2.2, 1),
        (1, 2, 2, 1.0, 1),
        (1, 2, 2, 0.3, 1),
        (1, 2, 2, 0.2, 2),
        (16, 16, 16, 3.1, 13),
        (13, 16, 16, 2.9, 13),
        (8, 8, 16, 3.0, 8),
    ],
)
def test_threads_are_as_many_as_other_programs_leave_cores(
    now: int, most: int, cores: int, others: float, expected: int
) -> None:
    assert fitting_threads(now, most, cores, others) == expected


def test_the_cores_that_other_programs_use_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds in which a core was busy for 1.5 s, of which this process had 0.5 s."""
    seen = iter([(10.0, 100.0, 3.0), (12.0, 101.5, 3.5), None])
    monkeypatch.setattr("useg.training.threads._read_processor_seconds", lambda: next(seen))
    programs = OtherPrograms()
    assert programs.cores() == 0.5
    assert programs.cores() is None


def test_busy_cores_are_those_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = "cpu 9 9 9 9\ncpu0 1 2 3 40 5 6 7 8 0 0\ncpu1 100 0 0 0 0 0 0 0 0 0\nintr 5\n"
    monkeypatch.setattr(Path, "read_text", lambda path: rows)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    monkeypatch.setattr(
        "useg.training.threads.time",
        SimpleNamespace(perf_counter=lambda: 1.0, process_time=lambda: 2.0),
    )
    monkeypatch.setattr("os.times", lambda: (2.0, 0.0, 0.5, 0.25, 9.0))
    from useg.training.threads import _read_processor_seconds

    assert _read_processor_seconds() == (1.0, 0.27, 2.75)


def test_unknown_system_keeps_its_threads(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OtherPrograms, "cores", lambda programs: None)
    assert not ThreadControl().begin()
    assert torch.get_num_threads() == 2


def test_run_beside_other_programs_uses_fewer_threads_and_repeats_exactly(
    two_threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, learn = make_disc_dataset(tmp_path / "data"), Trainer.train_step
    others, used = iter([0.0, 0.0, 1.9, 1.8, 1.9, 0.1]), []

    def look(trainer: Trainer, *batch: Any) -> Tensor:
        used.append(torch.get_num_threads())
        return learn(trainer, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(threads, "WATCH_SECONDS", 0.0)
        patch.setattr(threads, "count_cores", lambda: 2)
        patch.setattr(OtherPrograms, "cores", lambda programs: next(others, 0.0))
        loop.fit(
            dataset,
            tmp_path / "a",
            quick_settings(train__epochs=None, train__minutes=0.1),
        )
    settings = read_settings(tmp_path / "a" / "run.toml")
    assert [changed for _, changed in settings.train.thread_changes] == [1, 2]
    monkeypatch.setattr(Trainer, "train_step", look)
    loop.fit(dataset, tmp_path / "b", settings)
    (first, _), (second, _) = settings.train.thread_changes
    assert used == [2] * first + [1] * (second - first) + [2] * (len(used) - second)
    assert read_scores(tmp_path / "a") == read_scores(tmp_path / "b")
    used.clear()
    with monkeypatch.context() as patch:
        loop.fit(dataset, tmp_path / "c", settings, StopAfter(first + 1, patch))
    torch.set_num_threads(2)
    loop.fit(dataset, tmp_path / "c", read_settings(tmp_path / "c" / "run.toml"), resume=True)
    assert used[first + 1] == 1
    assert read_scores(tmp_path / "a") == read_scores(tmp_path / "c")
