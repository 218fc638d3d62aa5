"""Shifted, mirrored and exchanged masks, specks and unsupported labels are found."""

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
    edit_all_masks,
    edit_picture,
    exchange_masks,
    find_file,
    make_blobs,
    roll,
    save_picture,
    shift_one_mask,
    write_cells,
)

from useg.doctor.alignment import (
    ORIENTATIONS,
    describe_shift,
    find_unsupported_boundaries,
    orientation_change,
    shift_change,
    shift_label,
)
from useg.reporting.inspection import inspect_dataset
from useg.scenes.scene import make_scene


def mirror_mask(root: Path) -> Planted:
    path = edit_picture(find_file(root, 11), lambda mask: mask[:, ::-1])
    return "turned mask", {path.name}


def shift_all_masks(root: Path) -> Planted:
    edit_all_masks(root, lambda mask: roll(mask, 2, -3))
    return "shifted masks", {path.name for path in root.rglob("masks/*")}


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


DEFECTS = {
    "mask mirrored": Defect("streets", mirror_mask),
    "all masks shifted": Defect("streets", shift_all_masks),
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


@pytest.mark.parametrize("shift", [(0, 0), (3, 0), (-2, 5), (4, -1)])
def test_shifting_back_restores_all_pixels_that_stayed_inside(shift: tuple[int, int]) -> None:
    label = np.arange(12 * 10, dtype=np.uint8).reshape(12, 10)
    right, down = shift
    back = shift_label(shift_label(label, shift, 255), (-right, -down), 255)
    inside = back != 255
    assert (back[inside] == label[inside]).all()
    assert inside.sum() == (12 - abs(down)) * (10 - abs(right))


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


def test_shift_is_described_in_words() -> None:
    assert describe_shift((3, -2)) == "3 pixels right and 2 pixels up"
    assert describe_shift((-1, 0)) == "1 pixel left"


def test_boundaries_are_unsupported_only_where_the_image_is_flat() -> None:
    image = np.zeros((60, 60, 1), np.uint8)
    image[:, 20:] = 100
    image[:, 40:] += np.random.default_rng(0).integers(0, 50, (60, 20, 1), np.uint8)
    codes = np.zeros((60, 60), np.uint8)
    codes[:, 20:] = 1
    codes[:, 30:] = 2
    marked = find_unsupported_boundaries(image, codes)
    assert marked[:, 30].all()
    assert not marked[:, 20].any()


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
