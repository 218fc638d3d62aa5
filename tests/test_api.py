"""Training from Python: arguments of useg.train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_training import (
    make_disc_dataset,
    quick_settings,
)

from useg import api
from useg.config import read_settings, write_settings


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
