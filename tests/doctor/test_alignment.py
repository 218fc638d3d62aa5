"""Shifted, mirrored and exchanged masks, specks and unsupported labels are found."""

from pathlib import Path

import numpy as np
import pytest
from made_doctor import (
    Defect,
    Planted,
    assert_found_and_repaired,
    edit_all_masks,
    make_blobs,
    roll,
    save_picture,
    write_cells,
)

from useg.data.duplicates import ORIENTATIONS
from useg.doctor.alignment import orientation_change, shift_change
from useg.reporting.inspection import inspect_dataset


def shift_all_masks(root: Path) -> Planted:
    edit_all_masks(root, lambda mask: roll(mask, 2, -3))
    return "shifted masks", {path.name for path in root.rglob("masks/*")}


DEFECTS = {
    "all masks shifted": Defect("streets", shift_all_masks),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defect_alone_is_found_and_repaired(
    name: str, clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    assert_found_and_repaired(DEFECTS[name], clean_sets, tmp_path)


def test_pixels_that_become_free_are_ignored() -> None:
    assert shift_change((1, 0))(np.array([[1, 2, 3]], np.uint8)).tolist() == [[255, 1, 2]]


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_first_four_orientations_swap_width_and_height(name: str) -> None:
    label = np.arange(6, dtype=np.uint8).reshape(2, 3)
    changed = orientation_change(name)(label)
    swaps = list(ORIENTATIONS).index(name) < 4
    assert changed.shape == ((3, 2) if swaps else (2, 3))
    assert sorted(changed.ravel()) == list(range(6))
    assert changed.flags.c_contiguous


def test_masks_that_all_belong_to_other_images_are_found(tmp_path: Path) -> None:
    root = write_cells(tmp_path, 12)
    paths = sorted((root / "masks").iterdir())
    masks = [path.read_bytes() for path in paths]
    for path, mask in zip(paths, [*masks[1:], masks[0]], strict=True):
        path.write_bytes(mask)
    errors = [each for each in inspect_dataset(root).findings if each.severity == "error"]
    assert [each.kind for each in errors] == ["masks of other images"]
    image, mask_path = errors[0].files
    assert image.stem == paths[(paths.index(mask_path) + 1) % len(paths)].stem


def test_masks_without_any_relation_to_images_are_reported(tmp_path: Path) -> None:
    root = write_cells(tmp_path, 12)
    for k, path in enumerate(sorted((root / "masks").iterdir())):
        save_picture(path, make_blobs(700 + k)[1])
    kinds = {each.kind: each.severity for each in inspect_dataset(root).findings}
    assert kinds["masks fit no images"] == "warning"
