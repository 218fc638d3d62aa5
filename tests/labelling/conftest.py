"""Fixtures of the tests of labelling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from made_labelling import LabelSite, labelling, write_images


@pytest.fixture
def site(tmp_path: Path) -> Iterator[LabelSite]:
    with labelling(write_images(tmp_path)) as running:
        assert running.join()
        yield running


@pytest.fixture
def snapshot(tmp_path: Path) -> Callable[[], dict[str, bytes]]:
    """What is in every file below the test's folder."""

    def take() -> dict[str, bytes]:
        return {
            path.relative_to(tmp_path).as_posix(): path.read_bytes()
            for path in sorted(tmp_path.rglob("*"))
            if path.is_file()
        }

    return take
