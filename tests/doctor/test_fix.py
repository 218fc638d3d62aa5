"""The clean copy holds the repaired pairs and a log of every change; the data stay as they are."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tifffile
from made_doctor import (
    MERGED_IDS,
    NUM_PAIRS,
    SIZE,
    copy_pair,
    copy_pair_darker,
    describe_findings,
    find_file,
    invert_masks,
    make_blobs,
    name_of,
    overexpose,
    read_files,
    remove_mask,
    shift_one_mask,
)

from useg.classes import ClassTable
from useg.cli import main
from useg.data.dataset import Dataset, Pair
from useg.doctor import fix
from useg.errors import UsageError
from useg.files import comparable_name
from useg.reporting.inspection import inspect_dataset
from useg.scenes.generate import make_scene


def test_log_names_every_change_and_what_is_not_repaired(
    clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    root, clean = tmp_path / "data", tmp_path / "clean"
    shutil.copytree(clean_sets["streets"], root)
    shifted, unpaired = shift_one_mask(root)[1], remove_mask(root)[1]
    (overexposed,) = overexpose(root)[1]
    inspect_dataset(root, fix=clean)
    log = json.loads((clean / "changes.json").read_text())
    assert log["num_pairs"] == {"before": NUM_PAIRS - 1, "after": NUM_PAIRS - 1}
    assert {entry["because"] for entry in log["changes"]} == {"shifted mask", "image without mask"}
    logged = " ".join(entry["file"] + entry["change"] for entry in log["changes"])
    assert all(name in logged for name in shifted | unpaired)
    assert [entry["kind"] for entry in log["not_mended"]] == ["odd exposure"]
    assert overexposed in (clean / "changes.txt").read_text()


def test_shifted_mask_is_moved_back_and_images_are_copied(
    clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    root, clean = tmp_path / "data", tmp_path / "clean"
    shutil.copytree(clean_sets["streets"], root)
    (shifted,) = shift_one_mask(root)[1]
    inspect_dataset(root, fix=clean)
    with PIL.Image.open(clean / "masks" / shifted) as mask:
        assert mask.mode == "P"
        repaired = np.array(mask)
    original = MERGED_IDS[make_scene(11, SIZE).label]
    known = (repaired != 255) & (original != 9)
    assert (repaired[known] == original[known]).all()
    assert known.mean() > 0.8
    copied = clean / "images" / f"{name_of(2)}.png"
    assert copied.read_bytes() == find_file(root, 2, "images").read_bytes()


@pytest.mark.parametrize(("drop", "num_kept"), [(False, NUM_PAIRS + 1), (True, NUM_PAIRS)])
def test_near_duplicates_are_kept_and_listed_unless_asked(
    drop: bool, num_kept: int, clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    root, clean = tmp_path / "data", tmp_path / "clean"
    shutil.copytree(clean_sets["streets"], root)
    copy_pair_darker(root)
    inspect_dataset(root, fix=clean, drop_doubtful=drop)
    log = json.loads((clean / "changes.json").read_text())
    assert log["num_pairs"]["after"] == num_kept
    (change,) = log["changes"]
    assert change["change"].startswith("left out: " if drop else "kept, but check it: nearly")


def test_copies_equal_in_every_pixel_are_dropped(
    clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    root, clean = tmp_path / "data", tmp_path / "clean"
    shutil.copytree(clean_sets["streets"], root)
    copy_pair(root)
    inspect_dataset(root, fix=clean)
    assert json.loads((clean / "changes.json").read_text())["num_pairs"]["after"] == NUM_PAIRS


@pytest.mark.parametrize(
    ("folder", "sentence"),
    [("full", "is not empty"), ("data/clean", "lies inside"), ("file", "is a file")],
)
def test_clean_copy_needs_a_new_folder_outside_the_data(
    clean_sets: dict[str, Path], tmp_path: Path, folder: str, sentence: str
) -> None:
    shutil.copytree(clean_sets["cells"], tmp_path / "data")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=sentence):
        inspect_dataset(tmp_path / "data", fix=tmp_path / folder)
    assert read_files(tmp_path / "data") == read_files(clean_sets["cells"])


def test_failed_copy_leaves_nothing(
    clean_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fix, "_write_log", fail)
    with pytest.raises(UsageError, match="No space left on device"):
        inspect_dataset(clean_sets["cells"], fix=tmp_path / "clean")
    assert list(tmp_path.iterdir()) == []


def test_pages_of_a_stack_become_files(tmp_path: Path) -> None:
    stack = [make_blobs(100 + k) for k in range(8)]
    for folder in ("images", "masks"):
        (tmp_path / "stack" / folder).mkdir(parents=True)
    images = np.stack([image for image, _ in stack]).astype(np.uint8)
    labels = np.stack([label for _, label in stack])
    tifffile.imwrite(tmp_path / "stack/images/a.tif", images, photometric="minisblack")
    tifffile.imwrite(tmp_path / "stack/masks/a.tif", labels, photometric="minisblack")
    survey = inspect_dataset(tmp_path / "stack", fix=tmp_path / "clean")
    assert (survey.num_pairs, describe_findings(survey)) == (8, [])
    again = inspect_dataset(tmp_path / "clean")
    assert (again.num_pairs, again.pixels) == (8, survey.pixels)
    assert (tmp_path / "clean/images/a_0003.tif").is_file()


def test_command_repairs_once_and_refuses_a_folder_with_files(
    clean_sets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(clean_sets["cells"], tmp_path / "data")
    invert_masks(tmp_path / "data")
    for data, out, code in (("data", "clean", 1), ("clean", "cleaner", 0), ("clean", "data", 2)):
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", str(tmp_path / data), "--fix", str(tmp_path / out)])
        assert stopped.value.code == code
    assert str(tmp_path / "clean" / "changes.txt") in capsys.readouterr().out


def test_data_set_of_which_one_pair_remains_is_refused(
    clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(clean_sets["streets"], tmp_path / "data")
    for k in range(1, NUM_PAIRS):
        find_file(tmp_path / "data", k).write_bytes(b"")
    with pytest.raises(UsageError, match="only 1 pair of 22 can be repaired"):
        inspect_dataset(tmp_path / "data", fix=tmp_path / "clean")
    assert not (tmp_path / "clean").exists()


def test_copies_of_different_images_never_have_one_name(tmp_path: Path) -> None:
    names = ("a/b/c.png", "a_b/c.png", "A_b/c.png", "x/a_b_c.png", "y/d.png", "y/D.png", "y/d.jpg")
    names = (*names, "z/caf\u00e9.png", "z/cafe\u0301.png")
    pairs = [Pair(tmp_path / name, tmp_path / "masks" / name) for name in names]
    table = ClassTable(("ground", "square"))
    given = fix._unique_names(pairs, Dataset(tmp_path, "folders", tuple(pairs), table))
    assert len(set(map(comparable_name, given))) == len(given) == len(names)
    assert given[:3] == ["a_b_c", "a_b_c_2", "A_b_c_3"]
    alone = [pairs[0], pairs[4]]
    given = fix._unique_names(alone, Dataset(tmp_path, "folders", tuple(alone), table))
    assert given == ["c", "d"]
