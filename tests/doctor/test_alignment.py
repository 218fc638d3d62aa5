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
    name_of,
    roll,
    save_picture,
    write_cells,
)

from useg.data.duplicates import ORIENTATIONS
from useg.doctor.alignment import orientation_change, shift_change
from useg.doctor.edges import (
    PLACEMENTS,
    MaskPlacement,
    describe_placement,
    measure_placements,
    place_label,
)
from useg.reporting.inspection import inspect_dataset


def shift_all_masks(root: Path) -> Planted:
    edit_all_masks(root, lambda mask: roll(mask, 2, -3))
    return "shifted masks", {path.name for path in root.rglob("masks/*")}


def letterbox_all_masks(root: Path) -> Planted:
    edit_all_masks(root, lambda mask: place_label(mask, MaskPlacement(down=0.75), 9))
    return "misplaced masks", {path.name for path in root.rglob("masks/*")}


DEFECTS = {
    "all masks shifted": Defect("streets", shift_all_masks),
    "all masks letterboxed": Defect("streets", letterbox_all_masks),
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


def test_outlines_around_single_objects_may_be_drawn_too_wide(tmp_path: Path) -> None:
    y, x = np.mgrid[:96, :128]
    for k in range(8):
        rng = np.random.default_rng(k)
        distance = np.hypot((y - 48) / rng.uniform(0.8, 1.2), (x - 64) / rng.uniform(0.8, 1.2))
        radius = rng.uniform(22, 30)
        image = 60 + 100 * (distance < radius) + rng.normal(0, 8, distance.shape)
        save_picture(tmp_path / "images" / f"{name_of(k)}.png", image.astype(np.uint8))
        mask = (distance < radius + 4).astype(np.uint8)
        save_picture(tmp_path / "masks" / f"{name_of(k)}.png", mask)
    found = inspect_dataset(tmp_path).findings
    outlines = [each for each in found if each.kind == "outlines too wide or too narrow"]
    assert [each.severity for each in outlines] == ["warning"]
    assert "the masks are larger than what the images show" in outlines[0].message
    assert all(each.severity != "error" for each in found)


def test_far_shift_is_measured() -> None:
    image, label = make_blobs(1)
    strength = measure_placements(image[..., None], roll(label, -12, 7))
    assert strength is not None
    assert PLACEMENTS[int(np.nanargmax(strength))].shift == pytest.approx((0.096, -0.072), abs=0.01)


def test_placed_mask_is_where_the_words_say() -> None:
    label = np.zeros((40, 40), np.uint8)
    label[10:20, 10:20] = 1
    larger = place_label(label, MaskPlacement(2, 2, 0), 7)
    assert (larger[20:40, 20:40] == 1).all()
    assert (larger == 1).sum() == 400
    smaller = place_label(label, MaskPlacement(across=0.5), 7)
    assert (smaller[10:20, 15:20] == 1).all()
    assert (smaller[:, :10] == 7).all()
    moved = place_label(label, MaskPlacement(shift=(0.25, -0.1)), 7)
    assert (moved[6:16, 20:30] == 1).all()
    words = {
        "enlarged to 115 %": MaskPlacement(1.15, 1.15),
        "stretched to 150 % in height, from the bottom": MaskPlacement(1, 1.5, 1),
        "squeezed to 50 % in width, from the left": MaskPlacement(0.5, 1, 0),
        "moved 6.0 % of the width right and 10.0 % of the height up": MaskPlacement(
            shift=(0.06, -0.1)
        ),
    }
    assert {text: describe_placement(placement) for text, placement in words.items()} == {
        text: text for text in words
    }


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


def test_tiles_whose_rows_and_columns_are_exchanged_are_found(tmp_path: Path) -> None:
    for row in range(4):
        for column in range(4):
            image, label = make_blobs(10 * row + column)
            name = f"tile_{row}_{column}.png"
            save_picture(tmp_path / "data" / "images" / name, image.astype(np.uint8))
            save_picture(tmp_path / "data" / "masks" / f"tile_{column}_{row}.png", label)
    (found,) = (
        each for each in inspect_dataset(tmp_path / "data", fix=tmp_path / "fixed").findings
    )
    assert (found.kind, found.severity) == ("rows and columns of tiles exchanged", "error")
    assert len(found.files) == 12
    assert inspect_dataset(tmp_path / "fixed").findings == ()


def test_masks_without_any_relation_to_images_are_reported(tmp_path: Path) -> None:
    root = write_cells(tmp_path, 12)
    for k, path in enumerate(sorted((root / "masks").iterdir())):
        save_picture(path, make_blobs(700 + k)[1])
    kinds = {each.kind: each.severity for each in inspect_dataset(root).findings}
    assert kinds["masks fit no images"] == "warning"
