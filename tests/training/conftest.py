"""Fixtures of the training tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_training import (
    make_disc_dataset,
)

from useg.training import checkpoint


@pytest.fixture(autouse=True, scope="module")
def no_test_draws_charts(blank_charts: None) -> None:
    pass


@pytest.fixture
def save_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MIN_SAVE_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "MAX_SAVE_SHARE", 1e9)


@pytest.fixture(scope="module")
def disc_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images and masks of a data set of discs, in a folder whose layout is recognised."""
    folder = tmp_path_factory.mktemp("discs") / "data"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for k, pair in enumerate(make_disc_dataset(folder / "made", 8, 0).pairs):
        pair.image.rename(folder / "images" / f"a{k}.png")
        pair.mask.rename(folder / "masks" / f"a{k}.png")
    return folder
