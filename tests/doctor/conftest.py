"""Clean data sets, made once, that tests copy before they plant a defect."""

from pathlib import Path

import pytest
from made_doctor import CLEAN_SETS


@pytest.fixture(scope="session")
def clean_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clean")
    return {name: write(folder / name) for name, write in CLEAN_SETS.items()}
