"""Masks whose classes are exchanged are found and repaired."""

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

from useg.doctor.exchanged_classes import swap_foreground


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
