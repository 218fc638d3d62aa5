"""Training learns, repeats to the bit, keeps the best model and leaves a complete run folder."""

from __future__ import annotations

import inspect
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_training import (
    Interrupter,
    make_disc_dataset,
    quick_settings,
    read_log,
    read_scores,
)
from torch import Tensor

from useg.classes import ClassTable
from useg.config import read_settings
from useg.data import cache
from useg.data.dataset import Dataset
from useg.errors import UsageError
from useg.models.segmenter import load_model
from useg.training import loop, schedule, trainer


def test_run_learns_and_writes_all_files(tmp_path: Path) -> None:
    run = loop.fit(
        make_disc_dataset(tmp_path / "data"), tmp_path / "run", quick_settings(train__epochs=20)
    )
    assert run.scores.mean_iou > 0.9
    assert not run.interrupted
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "model.safetensors",
        "run.toml",
        "split.csv",
        "log.jsonl",
        "state.pt",
        "curves.png",
        "pictures",
    }
    assert sorted(path.name for path in (tmp_path / "run/pictures").iterdir()) == [
        f"epoch_{k:04d}.jpg" for k in (1, 2, 4, 8, 16, 20)
    ]
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert {"step", "epoch", "loss", "mean_iou", "images_per_second", "seconds"} <= set(rows[0])
    assert [row["mean_iou"] is not None for row in rows] == [step % 2 == 0 for step in range(1, 41)]
    model = load_model(tmp_path / "run")
    assert model.provenance["validation"]["mean_iou"] == max(
        row["mean_iou"] for row in rows if row["mean_iou"] is not None
    )


def test_first_second_fourth_and_last_validation_are_drawn(tmp_path: Path) -> None:
    loop.fit(
        make_disc_dataset(tmp_path / "data"),
        tmp_path / "run",
        quick_settings(train__epochs=20, train__validate_every=3),
    )
    assert sorted(path.name for path in (tmp_path / "run/pictures").iterdir()) == [
        f"epoch_{k:04d}.jpg" for k in (3, 6, 12, 20)
    ]


def test_half_size_steps_are_not_validated_and_resume_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, settings = (
        make_disc_dataset(tmp_path / "data"),
        quick_settings(train__epochs=6, train__coarse=0.5),
    )
    seen = []
    learn = trainer.Trainer.train_step
    monkeypatch.setattr(
        trainer.Trainer,
        "train_step",
        lambda self, optimizer, x, target: (
            seen.append(x.shape[-1]) or learn(self, optimizer, x, target)
        ),
    )
    whole = loop.fit(dataset, tmp_path / "whole", settings)
    assert seen == [24] * 6 + [48] * 6
    assert [row["mean_iou"] is not None for row in whole.log] == [
        step in (8, 10, 12) for step in range(1, 13)
    ]
    loop.fit(dataset, tmp_path / "cut", settings, Interrupter(4))
    loop.fit(dataset, tmp_path / "cut", read_settings(tmp_path / "cut" / "run.toml"), resume=True)
    assert read_scores(tmp_path / "cut") == read_scores(tmp_path / "whole")


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_same_settings_give_the_same_run_to_the_bit(padding: str, tmp_path: Path) -> None:
    dataset = make_disc_dataset(tmp_path / "data")
    for name in "ab":
        loop.fit(
            dataset,
            tmp_path / name,
            quick_settings(train__epochs=2, model__padding=padding, model__dropout=0.2),
        )
    assert read_scores(tmp_path / "a") == read_scores(tmp_path / "b")
    loop.fit(
        dataset,
        tmp_path / "c",
        quick_settings(train__epochs=2, model__padding=padding, model__dropout=0.2, train__seed=1),
    )
    assert read_scores(tmp_path / "c") != read_scores(tmp_path / "a")


def test_run_toml_of_a_timed_run_repeats_it_exactly(tmp_path: Path) -> None:
    dataset = make_disc_dataset(tmp_path / "data")
    loop.fit(dataset, tmp_path / "a", quick_settings(train__epochs=None, train__minutes=0.07))
    settings = read_settings(tmp_path / "a" / "run.toml")
    assert settings.train.steps == len(read_log(tmp_path / "a"))
    loop.fit(dataset, tmp_path / "b", settings)
    assert read_scores(tmp_path / "a") == read_scores(tmp_path / "b")


@pytest.mark.parametrize("coarse", [0.0, 0.6])
def test_timed_run_on_a_slowing_machine_ends_on_time_and_repeats_exactly(
    coarse: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, learn, told = make_disc_dataset(tmp_path / "data"), trainer.Trainer.train_step, []
    clock = count(0.0, 1e-4)  # of a machine that does nothing else; each look at it takes time

    def slow(self: trainer.Trainer, *batch: Any) -> Tensor:
        nonlocal clock
        clock = count(next(clock) + (0.1 if told else 0.05), 1e-4)
        return learn(self, *batch)

    class Teller(trainer.SilentProgress):
        def step(self, row: dict[str, Any], steps: int, seconds_left: float) -> None:
            told.append(steps)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", slow)
        for module in (schedule, loop):
            patch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        patch.setattr(schedule, "RESERVED_SECONDS", 0.0)
        loop.fit(
            dataset,
            tmp_path / "a",
            quick_settings(train__epochs=None, train__minutes=0.2, train__coarse=coarse),
            Teller(),
            predict_report_seconds=lambda model: 1.0,
        )
    # A second is left for what follows.
    assert 10.4 < next(clock) < 11.5
    settings = read_settings(tmp_path / "a" / "run.toml")
    assert settings.train.recounts
    assert settings.train.recounts[0][1] == told[0]
    assert settings.train.steps == len(read_log(tmp_path / "a")) == told[-1] < told[0]
    loop.fit(dataset, tmp_path / "b", settings)
    assert read_scores(tmp_path / "a") == read_scores(tmp_path / "b")
    loop.fit(dataset, tmp_path / "c", settings, Interrupter(settings.train.recounts[0][0] + 2))
    loop.fit(dataset, tmp_path / "c", read_settings(tmp_path / "c" / "run.toml"), resume=True)
    assert read_scores(tmp_path / "a") == read_scores(tmp_path / "c")


@pytest.mark.parametrize("at", [1, 5])
def test_interrupted_run_keeps_a_model(at: int, tmp_path: Path) -> None:
    run = loop.fit(
        make_disc_dataset(tmp_path / "data"), tmp_path / "run", quick_settings(), Interrupter(at)
    )
    assert run.interrupted
    assert load_model(tmp_path / "run").provenance["step"] == (1 if at == 1 else 4)
    assert (tmp_path / "run/curves.png").exists()


def test_folder_with_a_run_is_refused_and_unchanged(tmp_path: Path) -> None:
    dataset = make_disc_dataset(tmp_path / "data")
    loop.fit(dataset, tmp_path / "run", quick_settings(train__epochs=1))
    before = (tmp_path / "run/model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="already contains a run; continue it with --resume"):
        loop.fit(dataset, tmp_path / "run", quick_settings())
    assert (tmp_path / "run/model.safetensors").read_bytes() == before


def test_data_without_counted_pixels_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    dataset = make_disc_dataset(tmp_path / "data")
    ignoring = Dataset(
        dataset.root, dataset.layout, dataset.pairs, ClassTable(("a",), values=(9,), ignore=(0, 1))
    )
    with pytest.raises(UsageError, match=r"every pixel of the 6 training masks .* is ignored"):
        loop.fit(ignoring, tmp_path / "run", quick_settings())
    assert not (tmp_path / "run").exists()


def test_second_run_uses_the_cache_and_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USEG_CACHE", str(tmp_path / "cache"))
    dataset = make_disc_dataset(tmp_path / "data")
    loop.fit(dataset, tmp_path / "a", quick_settings(train__epochs=2))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "read_sample", None)
        loop.fit(dataset, tmp_path / "b", quick_settings(train__epochs=2))
    monkeypatch.setenv("USEG_CACHE", "off")
    loop.fit(dataset, tmp_path / "c", quick_settings(train__epochs=2))
    assert read_scores(tmp_path / "a") == read_scores(tmp_path / "b") == read_scores(tmp_path / "c")


def test_unusable_cache_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("USEG_CACHE", str(tmp_path / "file"))
    said: list[str] = []
    progress = trainer.SilentProgress()
    monkeypatch.setattr(progress, "say", said.append)
    loop.fit(
        make_disc_dataset(tmp_path / "data"),
        tmp_path / "run",
        quick_settings(train__epochs=1),
        progress,
    )
    assert len([text for text in said if "cannot be used" in text]) == 1


def test_late_first_validation_is_preceded_by_an_estimate_that_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_disc_dataset(tmp_path / "data", num_val=6)
    budget = schedule.TimeBudget(time.perf_counter() + 1000, 1000, 0.1, 0.1, 2)
    budget.next_recount = 1000
    length = schedule.RunLength(20, 1, budget)
    monkeypatch.setattr(loop, "count_steps", lambda trainer, began, has_report: length)
    settings = quick_settings(train__epochs=None, train__minutes=17, train__coarse=0.6)
    said: list[str] = []
    progress = trainer.SilentProgress()
    monkeypatch.setattr(progress, "say", said.append)
    loop.fit(dataset, tmp_path / "timed", settings, progress)
    estimates = [text for text in said if "an early estimate" in text]
    assert len(estimates) == 1
    assert estimates[0].endswith("from 6 of 6 validation images")
    rows = read_log(tmp_path / "timed")
    estimated = int(estimates[0].split()[1])
    validated = next(row["step"] for row in rows if row["mean_iou"] is not None)
    assert (estimated, validated) == (4, 14)
    loop.fit(dataset, tmp_path / "again", read_settings(tmp_path / "timed" / "run.toml"))
    assert read_scores(tmp_path / "again") == read_scores(tmp_path / "timed")


def test_training_loop_fits_on_a_page() -> None:
    assert len(inspect.getsource(loop._loop).splitlines()) <= 40
