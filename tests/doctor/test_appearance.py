"""Images whose classes look otherwise than in the others are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_doctor import Defect, Planted, assert_found_and_repaired, edit_picture, find_file


def invert_some_images(root: Path) -> Planted:
    files = [find_file(root, k, "images") for k in (2, 7, 8, 15)]
    return "negative images", {edit_picture(path, lambda image: 255 - image).name for path in files}


def exchange_red_and_blue_of_validation(root: Path) -> Planted:
    files = sorted((root / "val" / "images").iterdir())
    names = {edit_picture(path, lambda image: image[..., ::-1]).name for path in files}
    return "red and blue of images exchanged", names


def leave_out_buildings_in_validation(root: Path) -> Planted:
    files = sorted((root / "val" / "masks").iterdir())
    for path in files:
        edit_picture(path, lambda mask: np.where(mask == 1, 0, mask).astype(np.uint8))
    return "class not drawn everywhere", {path.name for path in files}


DEFECTS = {
    "some images inverted": Defect("cells", invert_some_images),
    "validation images in BGR": Defect("streets", exchange_red_and_blue_of_validation),
    "no buildings in validation": Defect(
        "streets",
        leave_out_buildings_in_validation,
        frozenset(["class missing from validation", "splits differ"]),
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defect_alone_is_found_and_repaired(
    name: str, clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    assert_found_and_repaired(DEFECTS[name], clean_sets, tmp_path)
