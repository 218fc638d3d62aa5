"""Globs match files in a bounded time, and a glob for given files leaves out the others."""

import time
from pathlib import Path

import pytest
from made_data import write_folders

from useg.data import globs
from useg.data.globs import _compile_glob, common_glob
from useg.data.layouts import find_dataset
from useg.errors import DataError

pytestmark = pytest.mark.wheel


def test_a_glob_that_looks_through_a_whole_disk_is_refused(tmp_path, monkeypatch):
    write_folders(tmp_path)
    for pattern, refused in (("images/*.jpg", False), ("**/*_no.png", True), ("*/*.png", True)):
        (tmp_path / "dataset.toml").write_text(f'images = "{pattern}"\nmasks = "masks/*.png"\n')
        monkeypatch.setattr(globs, "MAX_GLOB_FILES", 3)
        if refused:
            with pytest.raises(DataError, match="more than 3 files in"):
                find_dataset(tmp_path)
        else:
            assert find_dataset(tmp_path).pairs
    # The control: without the check, the files are looked through.
    monkeypatch.setattr(globs, "_check_extent", lambda folder, pattern: None)
    assert globs.glob_files(tmp_path, "*/*.png")


def test_a_glob_that_links_multiply_is_refused(tmp_path, monkeypatch):
    write_folders(tmp_path)
    for k in range(4):
        (tmp_path / "images" / f"l{k}").symlink_to(".")
    assert globs.glob_files(tmp_path, "images/*/*.jpg")
    monkeypatch.setattr(globs, "MAX_GLOB_FOLDERS", 200)
    pattern = "images/*/*/*/*/*.jpg"
    with pytest.raises(DataError, match="reaches more than 200 folders in"):
        globs.glob_files(tmp_path, pattern)
    # The control: without the check, each file is found by hundreds of paths.
    monkeypatch.setattr(globs, "_check_extent", lambda folder, pattern: None)
    assert len(globs.glob_files(tmp_path, pattern)) > 200


def test_no_glob_that_is_allowed_takes_long():
    for pattern in ("*a*a*a", "*a*a*a/*a*a*a", "**/*a*a*a/**/*a*a*a"):
        began = time.process_time()
        _compile_glob(pattern).fullmatch("a" * 120 + "b/" + "a" * 120 + "b")
        assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("pattern", "name", "groups"),
    [
        ("**/a/*/*", "a/a/c", (None, "a", "c")),
        ("*_*", "a_b_c", ("a_b", "c")),
        ("[!ab]?/*", "cd/e", ("cd", "e")),
    ],
)
def test_the_text_for_the_wildcards(pattern, name, groups):
    assert _compile_glob(pattern).fullmatch(name).groups() == groups


def test_a_glob_leaves_out_a_folder_whose_name_begins_alike() -> None:
    files = [Path(f"d/label{k}/{n}.png") for k in (1, 2) for n in (3, 4)]
    assert common_glob(files, Path("d"), [*files, Path("d/label/3.png")]) == "label[12]/*.png"
    assert common_glob(files, Path("d"), [*files, Path("d/labels/old/3.png")]) == "label*/*.png"


def test_a_glob_names_the_folders_below_those_of_unequal_depth() -> None:
    files = [Path("d/train/gt/c1/a.png"), Path("d/test/easy/gt/c2/b.png")]
    assert common_glob(files, Path("d")) == "**/gt/c*/*.png"


def test_a_glob_names_what_files_share_in_the_middle() -> None:
    files = [Path(f"d/s_{k}_cl_{k}.tif") for k in (1, 2)]
    others = [Path(f"d/s_{k}_rep_{k}.tif") for k in (1, 2)]
    assert common_glob(files, Path("d"), [*files, *others]) == "s_*_cl_*.tif"


def test_a_glob_ends_with_a_number_only_if_that_leaves_other_files_out() -> None:
    files = [Path(f"d/s{k}_mask.tif") for k in (1, 2)]
    assert common_glob(files, Path("d"), [*files, Path("d/s1_old_mask.tif")]) == "*[0-9]_mask.tif"
    assert common_glob(files, Path("d"), [*files, Path("d/s13_mask.tif")]) == "s*_mask.tif"
