"""Single masks that do not fit their images are found and repaired."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from made_doctor import (
    MERGED_IDS,
    SIZE,
    Defect,
    Planted,
    add_specks,
    assert_found_and_repaired,
    edit_picture,
    exchange_masks,
    find_file,
    save_picture,
    shift_one_mask,
)

from useg.scenes.generate import make_scene


def mirror_mask(root: Path) -> Planted:
    path = edit_picture(find_file(root, 11), lambda mask: mask[:, ::-1])
    return "turned mask", {path.name}


def use_mask_of_a_missing_image(root: Path) -> Planted:
    save_picture(find_file(root, 14), MERGED_IDS[make_scene(900, SIZE).label])
    return "mask does not fit its image", {find_file(root, 14).name}


def invent_labels(root: Path) -> Planted:
    def change(mask: np.ndarray) -> np.ndarray:
        y, x = np.mgrid[: SIZE[1], : SIZE[0]]
        for k in range(5):
            mask[np.hypot(x - 14 - 25 * k, y - 15 - 33 * (k % 3)) < 8] = 1
        return mask

    return "labels to review", {edit_picture(find_file(root, 16), change).name}


def copy_mask_over_others(root: Path) -> Planted:
    copies = [find_file(root, k) for k in (3, 8, 13, 18)]
    for path in copies:
        shutil.copy(find_file(root, 0), path)
    return "copied masks", {path.name for path in copies}


DEFECTS = {
    "mask copied over others": Defect(
        "cells", copy_mask_over_others, frozenset({"mask does not fit its image"})
    ),
    "mask mirrored": Defect("streets", mirror_mask),
    "one mask shifted": Defect("streets", shift_one_mask),
    "masks of two images exchanged": Defect("streets", exchange_masks),
    "mask of an image that is not there": Defect("streets", use_mask_of_a_missing_image),
    "specks": Defect("streets", add_specks),
    "labels without edges": Defect("cells", invent_labels),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defect_alone_is_found_and_repaired(
    name: str, clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    assert_found_and_repaired(DEFECTS[name], clean_sets, tmp_path)
