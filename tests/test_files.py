"""A file is there whole or not at all; errors say the way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from useg.errors import UsageError, choose, need, suggest
from useg.files import make_folder, replacing, write_json
from useg.ownership import never

pytestmark = pytest.mark.wheel


def test_replaces_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path, Path.is_file) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"num_images": 1, "ranking": [], "failed": []}')
    before = path.read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": object()})
    with pytest.raises(KeyboardInterrupt):
        _interrupted(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def _interrupted(path: Path) -> None:
    with replacing(path, Path.is_file) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


def test_json_comes_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None]}


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        make_folder(tmp_path / "file" / "folder")
    with (
        pytest.raises(UsageError, match="cannot be written"),
        replacing(tmp_path / "missing" / "a.txt", never),
    ):
        pytest.fail("the block must not run")


def test_unknown_names_list_the_known_ones() -> None:
    assert choose("colour", "red", {"red": 1, "blue": 2}) == 1
    with pytest.raises(
        UsageError,
        match=r"colour 'rde' is not known; choose one of blue, red; did you mean 'red'\?",
    ):
        choose("colour", "rde", {"red": 1, "blue": 2})
    assert suggest("zzz", ["red"]) == ""


def test_a_missing_package_names_its_install_line() -> None:
    assert need("json", "dev") is json
    with pytest.raises(UsageError, match=r"pip install 'useg\[openvino\]'"):
        need("useg_no_such_package", "openvino")
