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
