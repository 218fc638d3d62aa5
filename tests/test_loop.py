"""Training: it learns, repeats to the bit, keeps the best, and leaves a run folder that says everything."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from useg import api
from useg.classes import ClassTable
from useg.config import Settings, read_settings, write_settings
from useg.data import cache
from useg.data.dataset import Dataset, Pair
from useg.errors import UsageError
from useg.models.segmenter import load_model
from useg.training import loop, schedule, trainer


def make_set(
    folder: Path, num_train: int = 6, num_val: int = 2, size: tuple[int, int] = (48, 32)
) -> Dataset:
    """Bright discs on dark noise: two classes that a few steps tell apart."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    pairs = []
    for k in range(num_train + num_val):
        pairs.append(
            Pair(folder / f"{k}.png", folder / f"{k}_mask.png", "train" if k < num_train else "val")
        )
        y, x = np.mgrid[: size[1], : size[0]]
        disc = (
            (y - rng.integers(8, size[1] - 8)) ** 2 + (x - rng.integers(8, size[0] - 8)) ** 2 < 64
        ).astype(np.uint8)
        image = rng.integers(0, 60, (size[1], size[0], 3)) + 150 * disc[..., None]
        Image.fromarray(image.astype(np.uint8)).save(pairs[-1].image)
        Image.fromarray(disc).save(pairs[-1].mask)
    return Dataset(folder, "folders", tuple(pairs), ClassTable(("ground", "disc")))


def quick(**changes: Any) -> Settings:
    base = {
        "model.width": 4,
        "model.depth": 2,
        "train.epochs": 8,
        "train.batch": 3,
        "train.learning_rate": 1e-2,
        "train.precision": "fp32",
    }
    return Settings().with_(
        {**base, **{key.replace("__", "."): value for key, value in changes.items()}}
    )


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def numbers_of(run: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["mean_iou"]) for row in log_of(run)]


def test_learns_and_leaves_a_complete_run(tmp_path: Path) -> None:
    run = loop.fit(make_set(tmp_path / "data"), tmp_path / "run", quick(train__epochs=20))
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
    rows = log_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert {"step", "epoch", "loss", "mean_iou", "images_per_second", "seconds"} <= set(rows[0])
    assert [row["mean_iou"] is not None for row in rows] == [step % 2 == 0 for step in range(1, 41)]
    model = load_model(tmp_path / "run")
    assert model.provenance["validation"]["mean_iou"] == max(
        row["mean_iou"] for row in rows if row["mean_iou"] is not None
    )


def test_pictures_follow_the_course_of_a_run_however_seldom_it_is_scored(tmp_path: Path) -> None:
    loop.fit(
        make_set(tmp_path / "data"),
        tmp_path / "run",
        quick(train__epochs=20, train__validate_every=3),
    )
    assert sorted(path.name for path in (tmp_path / "run/pictures").iterdir()) == [
        f"epoch_{k:04d}.jpg" for k in (3, 6, 12, 20)
    ]


def test_steps_at_half_the_size_are_not_scored_and_go_on_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, settings = make_set(tmp_path / "data"), quick(train__epochs=6, train__coarse=0.5)
    seen = []
    learn = trainer.Trainer.learn
    monkeypatch.setattr(
        trainer.Trainer,
        "learn",
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
    assert numbers_of(tmp_path / "cut") == numbers_of(tmp_path / "whole")


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_the_same_settings_give_the_same_run_to_the_bit(padding: str, tmp_path: Path) -> None:
    dataset = make_set(tmp_path / "data")
    for name in "ab":
        loop.fit(
            dataset,
            tmp_path / name,
            quick(train__epochs=2, model__padding=padding, model__dropout=0.2),
        )
    assert numbers_of(tmp_path / "a") == numbers_of(tmp_path / "b")
    loop.fit(
        dataset,
        tmp_path / "c",
        quick(train__epochs=2, model__padding=padding, model__dropout=0.2, train__seed=1),
    )
    assert numbers_of(tmp_path / "c") != numbers_of(tmp_path / "a")


def test_training_from_run_toml_repeats_a_run_that_was_given_minutes(tmp_path: Path) -> None:
    dataset = make_set(tmp_path / "data")
    loop.fit(dataset, tmp_path / "a", quick(train__epochs=None, train__minutes=0.07))
    settings = read_settings(tmp_path / "a" / "run.toml")
    assert settings.train.steps == len(log_of(tmp_path / "a"))
    loop.fit(dataset, tmp_path / "b", settings)
    assert numbers_of(tmp_path / "a") == numbers_of(tmp_path / "b")


@pytest.mark.parametrize("coarse", [0.0, 0.6])
def test_a_run_on_a_machine_that_got_slower_ends_in_its_time_and_repeats_to_the_bit(
    coarse: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, learn, told = make_set(tmp_path / "data"), trainer.Trainer.learn, []
    clock = count(0.0, 1e-4)  # of a machine that does nothing else; each look at it takes time

    def slow(self: trainer.Trainer, *batch: Any) -> float:
        nonlocal clock
        clock = count(next(clock) + (0.1 if told else 0.05), 1e-4)
        return learn(self, *batch)

    class Teller(trainer.SilentProgress):
        def step(self, row: dict[str, Any], steps: int, seconds_left: float) -> None:
            told.append(steps)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "learn", slow)
        for module in (schedule, loop, trainer):
            patch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        patch.setattr(trainer, "RESERVED_SECONDS", 0.0)
        loop.fit(
            dataset,
            tmp_path / "a",
            quick(train__epochs=None, train__minutes=0.2, train__coarse=coarse),
            Teller(),
        )
    assert 11.4 < next(clock) < 12.6
    settings = read_settings(tmp_path / "a" / "run.toml")
    assert settings.train.recounts
    assert settings.train.recounts[0][1] == told[0]
    assert settings.train.steps == len(log_of(tmp_path / "a")) == told[-1] < told[0]
    loop.fit(dataset, tmp_path / "b", settings)
    assert numbers_of(tmp_path / "a") == numbers_of(tmp_path / "b")
    loop.fit(dataset, tmp_path / "c", settings, Interrupter(settings.train.recounts[0][0] + 2))
    loop.fit(dataset, tmp_path / "c", read_settings(tmp_path / "c" / "run.toml"), resume=True)
    assert numbers_of(tmp_path / "a") == numbers_of(tmp_path / "c")


@pytest.mark.parametrize(("minutes", "settings"), [(None, {"train.steps": 4}), (0.01, {})])
def test_another_number_of_steps_has_not_been_counted_again(
    minutes: float | None, settings: dict[str, Any], tmp_path: Path
) -> None:
    make_set(tmp_path / "data")
    write_settings(
        tmp_path / "run.toml",
        quick(train__epochs=None, train__steps=9, train__recounts=((3, 12),)),
        {},
    )
    assert read_settings(tmp_path / "run.toml").train.recounts == ((3, 12),)
    run = api.train(
        tmp_path / "data",
        tmp_path / "run",
        minutes=minutes,
        settings=settings,
        config=tmp_path / "run.toml",
    )
    assert run.settings.train.recounts == ()


class Interrupter(trainer.SilentProgress):
    """Presses Ctrl-C at a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, row: dict[str, Any], steps: int, seconds_left: float) -> None:
        if row["step"] == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 5])
def test_interrupted_runs_keep_a_model(at: int, tmp_path: Path) -> None:
    run = loop.fit(make_set(tmp_path / "data"), tmp_path / "run", quick(), Interrupter(at))
    assert run.interrupted
    assert load_model(tmp_path / "run").provenance["step"] == (1 if at == 1 else 4)
    assert (tmp_path / "run/curves.png").exists()


def test_a_folder_with_a_run_is_left_alone(tmp_path: Path) -> None:
    dataset = make_set(tmp_path / "data")
    loop.fit(dataset, tmp_path / "run", quick(train__epochs=1))
    before = (tmp_path / "run/model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="holds a run already; go on with it by --resume"):
        loop.fit(dataset, tmp_path / "run", quick())
    assert (tmp_path / "run/model.safetensors").read_bytes() == before


def test_all_ignored_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    dataset = make_set(tmp_path / "data")
    ignoring = Dataset(
        dataset.root, dataset.layout, dataset.pairs, ClassTable(("a",), values=(9,), ignore=(0, 1))
    )
    with pytest.raises(UsageError, match=r"every pixel of the 6 training masks .* is ignored"):
        loop.fit(ignoring, tmp_path / "run", quick())
    assert not (tmp_path / "run").exists()


def test_the_second_run_decodes_nothing_and_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USEG_CACHE", str(tmp_path / "cache"))
    dataset = make_set(tmp_path / "data")
    loop.fit(dataset, tmp_path / "a", quick(train__epochs=2))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "read_sample", None)
        loop.fit(dataset, tmp_path / "b", quick(train__epochs=2))
    monkeypatch.setenv("USEG_CACHE", "off")
    loop.fit(dataset, tmp_path / "c", quick(train__epochs=2))
    assert numbers_of(tmp_path / "a") == numbers_of(tmp_path / "b") == numbers_of(tmp_path / "c")


def test_a_cache_that_cannot_be_used_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("USEG_CACHE", str(tmp_path / "file"))
    said: list[str] = []
    progress = trainer.SilentProgress()
    monkeypatch.setattr(progress, "say", said.append)
    loop.fit(make_set(tmp_path / "data"), tmp_path / "run", quick(train__epochs=1), progress)
    assert len([text for text in said if "cannot be used" in text]) == 1
