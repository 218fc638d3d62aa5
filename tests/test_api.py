"""Training from Python: arguments of useg.train."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_training import (
    make_disc_dataset,
    quick_settings,
)

import useg
from useg import api
from useg.config import read_settings, write_settings
from useg.training import plan_rules, trainer

pytestmark = pytest.mark.usefixtures("blank_charts")


@pytest.mark.parametrize(("minutes", "settings"), [(None, {"train.steps": 4}), (0.01, {})])
def test_new_number_of_steps_drops_old_recounts(
    minutes: float | None, settings: dict[str, Any], tmp_path: Path
) -> None:
    make_disc_dataset(tmp_path / "data")
    write_settings(
        tmp_path / "run.toml",
        quick_settings(train__epochs=None, train__steps=9, train__recounts=((3, 12),)),
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


def test_training_leaves_random_state_alone_and_its_run_is_a_model(tmp_path: Path) -> None:
    make_disc_dataset(tmp_path / "data")
    before = random.getstate(), np.random.get_state()[1], torch.get_rng_state()
    run = useg.train(tmp_path / "data", tmp_path / "run", settings={"train.steps": 2})
    after = random.getstate(), np.random.get_state()[1], torch.get_rng_state()
    assert before[0] == after[0]
    assert all(np.array_equal(one, other) for one, other in zip(before[1:], after[1:], strict=True))
    assert useg.load(run).name == str(run.out)


def test_a_loop_of_ones_own_reads_samples(tmp_path: Path) -> None:
    make_disc_dataset(tmp_path / "data")
    dataset = useg.open_dataset(tmp_path / "data")
    sample = useg.read_sample(dataset.of("train")[0], dataset)
    assert isinstance(sample, useg.Sample)
    assert sample.image.shape[:2] == sample.label.shape
    assert sample.label.max() < len(dataset.classes)


def test_images_that_are_left_out_stay_out_when_a_run_is_repeated(tmp_path: Path) -> None:
    make_disc_dataset(tmp_path / "data", 10, 0)
    data, settings = tmp_path / "data", {"data.train_every": 3, "train.steps": 2}
    api.train(data, tmp_path / "run", settings=settings)
    splits = (tmp_path / "run" / "split.csv").read_text()
    assert splits.count(",gap") > splits.count(",train") > 0
    assert read_settings(tmp_path / "run" / "run.toml").data.train_every == 3
    api.train(data, tmp_path / "again", config=tmp_path / "run" / "run.toml")
    assert (tmp_path / "again" / "split.csv").read_text() == splits
    # A finished run that is continued does not leave out more.
    api.train(data, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "split.csv").read_text() == splits


def test_a_short_run_on_many_images_uses_and_checks_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_disc_dataset(tmp_path / "data", 24, 0)
    for name, number in (("CHECKED", 6), ("TRAINING", 5), ("VALIDATION", 2)):
        monkeypatch.setattr(plan_rules, f"MIN_{name}_IMAGES", number)
    monkeypatch.setattr(plan_rules, "measure_decoding", lambda _: 9.0)
    said: list[str] = []
    monkeypatch.setattr(trainer.SilentProgress, "say", lambda _, text: said.append(text))
    run = api.train(
        tmp_path / "data", tmp_path / "run", minutes=0.01, progress=trainer.SilentProgress()
    )
    assert run.settings.data.train_every == 3
    assert run.settings.data.val_every == 2
    for sentence in (
        "6 of 24 images were checked",
        "data.train_every = 3: reading all",
        "data.val",
    ):
        assert sum(sentence in text for text in said) == 1, said
    page = (tmp_path / "run" / "report.html").read_text()
    assert "one in 3 training images and one in 2 validation images" in page
    # With a number of steps, there is time for all of them.
    run = api.train(tmp_path / "data", tmp_path / "all", settings={"train.steps": 1})
    assert run.settings.data.train_every is None
    assert (tmp_path / "all" / "split.csv").read_text().count(",train") > 15
