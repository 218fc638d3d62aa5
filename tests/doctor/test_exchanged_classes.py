"""Masks whose classes are exchanged are found and repaired."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made_doctor import (
    Defect,
    Planted,
    assert_found_and_repaired,
    edit_all_masks,
    edit_picture,
    find_file,
    invert_masks,
)
from made_strangers import save, yard

from useg.doctor.exchanged_classes import RENUMBERED_KIND, swap_foreground
from useg.doctor.measure import Finding
from useg.reporting.inspection import inspect_dataset


def exchange_two_classes(root: Path) -> Planted:
    order = np.arange(256, dtype=np.uint8)
    order[[1, 2]] = 2, 1
    return "classes exchanged", {edit_picture(find_file(root, 12), lambda mask: order[mask]).name}


def exchange_two_classes_of_validation(root: Path) -> Planted:
    """Exchange them in ten of 22 masks, which are more than a third."""
    for folder in ("images", "masks"):
        for k in range(5):
            path = find_file(root, k, folder)
            path.rename(root / "val" / folder / path.name)
    order = np.arange(256, dtype=np.uint8)
    order[[1, 2]] = 2, 1
    files = sorted((root / "val" / "masks").iterdir())
    for path in files:
        edit_picture(path, lambda mask: order[mask])
    return "classes exchanged", {path.name for path in files}


def exchange_red_and_blue(root: Path) -> Planted:
    """Store every class as a colour whose reversed colour is a class too."""
    (root / "classes.toml").unlink()
    colors = np.zeros((256, 3), np.uint8)
    colors[:5] = (255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 0), (0, 255, 255)
    edit_all_masks(root, lambda mask: colors[mask])
    paths = [edit_picture(find_file(root, k), lambda mask: mask[..., ::-1]) for k in (3, 12)]
    return "red and blue exchanged", {path.name for path in paths}


DEFECTS = {
    "two classes exchanged": Defect("streets", exchange_two_classes),
    "two classes exchanged in a split": Defect(
        "streets", exchange_two_classes_of_validation, frozenset({"splits differ"})
    ),
    "red and blue exchanged": Defect("streets", exchange_red_and_blue, frozenset({"colour masks"})),
    "inverted masks": Defect("cells", invert_masks),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defect_alone_is_found_and_repaired(
    name: str, clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    assert_found_and_repaired(DEFECTS[name], clean_sets, tmp_path)


def test_swapping_foreground_keeps_ignored_pixels() -> None:
    assert swap_foreground(np.array([[0, 1, 255]], np.uint8)).tolist() == [[1, 0, 255]]


def save_yards(root: Path, split: str, seeds: range, change: Callable[..., np.ndarray]) -> None:
    for k in seeds:
        image, label = yard(k)
        save(root / split / "images" / f"{k}.png", image)
        save(root / split / "masks" / f"{k}.png", change(label, k).astype(np.uint8))


def test_classes_exchanged_in_a_whole_split_are_found(tmp_path: Path) -> None:
    save_yards(tmp_path, "train", range(10), lambda label, _: label)
    save_yards(tmp_path, "val", range(30, 38), lambda label, _: np.array([0, 2, 1, 3])[label])
    (found,) = (each for each in inspect_dataset(tmp_path).findings if each.severity == "error")
    assert found.kind == "classes exchanged"
    assert {path.parent.parent.name for path in found.files} == {"val"}
    assert len(found.files) == 8


def find_renumbered(root: Path) -> list[Finding]:
    return [each for each in inspect_dataset(root).findings if each.kind == RENUMBERED_KIND]


@pytest.mark.parametrize(("lacking", "is_stretched"), [((1, 3), False), ((2, 3), True)])
def test_masks_that_were_renumbered_one_by_one_are_found(
    tmp_path: Path, lacking: tuple[int, ...], is_stretched: bool
) -> None:
    def renumber(label: np.ndarray, k: int) -> np.ndarray:
        absent = lacking if k % 2 else (3,) * is_stretched
        label = np.where(np.isin(label, absent), 0, label)
        values, place = np.unique(label, return_inverse=True)
        return place.reshape(label.shape) * (255 / (len(values) - 1) if is_stretched else 1)

    save_yards(tmp_path, "data", range(14), renumber)
    (found,) = find_renumbered(tmp_path)
    assert found.severity == "warning"
    assert {int(path.stem) % 2 for path in found.files} == {1}


def test_masks_that_lack_the_last_classes_are_only_mentioned(tmp_path: Path) -> None:
    save_yards(tmp_path, "data", range(14), lambda label, k: label * (label < 2 + k % 3))
    (found,) = find_renumbered(tmp_path)
    assert (found.severity, found.files) == ("note", ())
    save_yards(tmp_path, "data", range(1, 2), lambda label, _: np.where(label == 2, 0, label))
    assert not find_renumbered(tmp_path)
