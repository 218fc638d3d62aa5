"""Fixtures for the tests of data sets and their cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from useg.data import cache
from useg.data.dataset import Dataset, Pair


@pytest.fixture
def cache_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for this test alone."""
    monkeypatch.setenv("USEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that were decoded so far."""
    names: list[str] = []
    read_sample = cache.read_sample

    def count(pair: Pair, dataset: Dataset) -> Any:
        names.append(pair.image.name)
        return read_sample(pair, dataset)

    monkeypatch.setattr(cache, "read_sample", count)
    return names
