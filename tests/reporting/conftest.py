"""Fixtures that the tests of the reporting package share."""

import pytest
from made_causes import SceneFiles, write_scene_files


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[SceneFiles]:
    """Made street scenes and their files."""
    return write_scene_files(tmp_path_factory.mktemp("scenes"))
