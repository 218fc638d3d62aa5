"""A file is there whole or not at all; errors say the way out."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from useg import files
from useg.errors import DataError, MachineError, UsageError, choose, need, suggest
from useg.files import (
    LOCK_NAME,
    clear_drafts,
    locked_folder,
    make_folder,
    natural_key,
    replacing,
    replacing_folder,
    write_json,
)
from useg.ownership import recognize_none

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


def test_the_test_sees_a_file_that_is_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    @contextlib.contextmanager
    def in_place(path: Path, is_own: object) -> Iterator[Path]:
        yield path

    monkeypatch.setitem(globals(), "replacing", in_place)
    with pytest.raises(KeyboardInterrupt):
        _interrupted(path)
    assert path.read_text() == "half"


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
        replacing(tmp_path / "missing" / "a.txt", recognize_none),
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


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(DataError, match="useg did not write"), replacing(path, recognize_none):
        path.write_text("somebody's")
    assert path.read_text() == "somebody's"
    assert list(tmp_path.iterdir()) == [path]


def test_disks_without_hard_links_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*paths: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    with replacing(tmp_path / "a.txt", recognize_none) as draft:
        draft.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new"


def test_drafts_of_a_live_job_stay_and_those_of_a_dead_one_go(tmp_path: Path) -> None:
    for name in (".useg-0123456789abcdef.png", ".useg-0123456789abcdef.txt.gz", ".useg-a.png"):
        (tmp_path / name).touch()
    (tmp_path / ".useg-fedcba9876543210" / "images").mkdir(parents=True)
    (tmp_path / ".useg-0000000000000000").symlink_to("nowhere")
    with (
        replacing(tmp_path / "a.png", recognize_none) as draft,
        replacing_folder(tmp_path / "b", recognize_none) as folder,
    ):
        clear_drafts(tmp_path)
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {
            *(draft.name, folder.name, ".useg-a.png"),
            *(".useg-0123456789abcdef.txt.gz", ".useg-0000000000000000"),
        }


def test_a_locked_folder_is_refused_until_the_lock_ends(tmp_path: Path) -> None:
    match = "another useg process is writing to"
    with locked_folder(tmp_path), pytest.raises(MachineError, match=match):
        locked_folder(tmp_path).__enter__()
    with locked_folder(tmp_path, wait=True):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("holds", ["nothing", "an empty folder", "a file in it"])
def test_a_folder_takes_the_place_of_an_empty_one_only(holds: str, tmp_path: Path) -> None:
    place = tmp_path / "out"
    if holds != "nothing":
        place.mkdir()
    if holds == "a file in it":
        (place / "mine.txt").touch()
        with pytest.raises(DataError), replacing_folder(place, recognize_none):
            pytest.fail("the block must not run")
        assert (place / "mine.txt").exists()
        return
    with replacing_folder(place, recognize_none) as draft:
        (draft / "a.txt").write_text("new")
    assert [path.name for path in place.iterdir()] == ["a.txt"]
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("problem", ["a file of somebody else", "a failure"])
def test_a_folder_stays_if_it_cannot_be_replaced_at_the_last_moment(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, rename, left = tmp_path / "out", Path.rename, ["ours.txt"]
    place.mkdir()
    (place / "ours.txt").touch()

    def interfere(path: Path, target: Path) -> Path:
        if path == place and problem == "a file of somebody else":
            (place / "thesis.tex").touch()
            left.append("thesis.tex")
        if target == place and path == draft and problem == "a failure":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    def is_own(path: Path) -> bool:
        return [each.name for each in path.iterdir()] == ["ours.txt"]

    monkeypatch.setattr(Path, "rename", interfere)
    with pytest.raises(UsageError), replacing_folder(place, is_own) as draft:
        (draft / "new.txt").touch()
    assert sorted(path.name for path in place.iterdir()) == left
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("length", [245, 255, 256])
def test_names_may_be_as_long_as_the_disk_allows(length: int, tmp_path: Path) -> None:
    path = tmp_path / ("x" * (length - 4) + ".txt")
    if length > 255:
        with pytest.raises(MachineError, match="is too long for this disk; shorten it"):
            replacing(path, recognize_none).__enter__()
        return
    with replacing(path, recognize_none) as draft:
        draft.touch()
    assert path.exists()


def test_names_that_a_disk_takes_for_one_are_refused_there_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "not" / "yet"
    alike = [out / "a.png", out / "A.png"]
    composed = [out / "caf\u00e9.png", out / "cafe\u0301.png"]
    for names in (alike, composed):
        # This disk, where the tests run, tells them apart, or it does not.
        if not files._ignores_case(out):
            files.refuse_same_names(names)
    monkeypatch.setattr(files, "_ignores_case", lambda _: True)
    for names in (alike, composed):
        with pytest.raises(DataError, match=r"would be one file in .*/not/yet"):
            files.refuse_same_names(names)
    files.refuse_same_names([out / "a.png", tmp_path / "A.png", out / "b.png", out / "a.png"])


def test_a_disk_that_folds_names_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list(tmp_path.iterdir())
    files._ignores_case(tmp_path / "later")
    assert not list(tmp_path.iterdir())
    exists = os.path.lexists
    ways: list[Callable[[str], str]] = [str.upper, functools.partial(unicodedata.normalize, "NFD")]
    for other in ways:

        def folding(path: Path, other: Callable[[str], str] = other) -> bool:
            return exists(path) or any(other(name) == path.name for name in os.listdir(tmp_path))

        monkeypatch.setattr(os.path, "lexists", folding)
        assert files._ignores_case(tmp_path)


@given(st.lists(st.integers(0, 10**6), unique=True))
def test_numbers_in_names_count_as_numbers(numbers: list[int]) -> None:
    names = [Path(f"f/a_{n}.png") for n in numbers]
    assert sorted(names, key=natural_key) == [Path(f"f/a_{n}.png") for n in sorted(numbers)]


@given(st.lists(st.text(max_size=6)))
def test_natural_order_is_a_total_order_of_any_names(names: list[str]) -> None:
    assert sorted(sorted(names, reverse=True), key=natural_key) == sorted(names, key=natural_key)
