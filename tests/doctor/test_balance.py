"""Classes that are rare, missing or at one place are named."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from made_doctor import (
    NUM_PAIRS,
    SIZE,
    TREES,
    Defect,
    Planted,
    assert_found_and_repaired,
    edit_all_masks,
    edit_picture,
    find_file,
    finding_of_kind,
    survey_folder,
    write_trees,
)

from useg.doctor.balance import describe_region
from useg.doctor.measure import THUMBNAIL_SHAPE
from useg.reporting.inspection import inspect_dataset

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def remove_class(root: Path) -> Planted:
    edit_all_masks(root, lambda mask: np.where(mask == 3, 9, mask).astype(np.uint8))
    return "class without pixels", set()


def make_validation_grey(root: Path) -> Planted:
    files = sorted((root / "val" / "images").iterdir())
    for path in files:
        edit_picture(path, lambda image: np.repeat(image[..., 1:2], 3, axis=2))
    return "colours of splits differ", {path.name for path in files}


def make_class_rare(root: Path) -> Planted:
    corner = np.add.outer(np.arange(SIZE[1]), np.arange(SIZE[0])) < 12
    edit_all_masks(root, lambda mask: np.where(mask == 4, 9, mask).astype(np.uint8))
    for k in (0, NUM_PAIRS - 1):
        path = find_file(root, k)
        edit_picture(path, lambda mask: np.where(corner, 4, mask).astype(np.uint8))
    return "rare class", set()


def relabel_validation(root: Path) -> Planted:
    for path in (root / "val" / "masks").iterdir():
        edit_picture(path, lambda mask: np.where(mask == 1, 3, mask).astype(np.uint8))
    return "splits differ", set()


def halve_validation(root: Path) -> Planted:
    for path in (root / "val").rglob("*.png"):
        edit_picture(path, lambda pixels: pixels[::2, ::2])
    return "sizes of splits differ", {path.name for path in (root / "val" / "images").iterdir()}


def add_frame(root: Path) -> Planted:
    edit_all_masks(root, lambda mask: np.pad(mask[2:-2, 2:-2], 2, constant_values=1))
    return "frame around masks", {path.name for path in root.rglob("masks/*")}


def empty_one(root: Path) -> Planted:
    return "mask of one class", {edit_picture(find_file(root, 18), np.zeros_like).name}


def add_hood(root: Path) -> Planted:
    is_hood = np.arange(SIZE[1])[:, None] >= 78

    def change(mask: np.ndarray) -> np.ndarray:
        return np.where(is_hood, 4, np.where(mask == 4, 1, mask)).astype(np.uint8)

    edit_all_masks(root, change)
    return "constant region", set()


DEFECTS = {
    "mask of background only": Defect("streets", empty_one),
    "class without pixels": Defect("streets", remove_class),
    "tiny class": Defect("streets", make_class_rare),
    "splits of different class shares": Defect(
        "streets",
        relabel_validation,
        frozenset({"class missing from validation", "class not drawn everywhere"}),
    ),
    "constant region": Defect("streets", add_hood),
    "grey images for validation": Defect("streets", make_validation_grey),
    "images of half the size for validation": Defect(
        "streets", halve_validation, frozenset({"mixed sizes"})
    ),
    "frame": Defect("streets", add_frame),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defect_alone_is_found_and_repaired(
    name: str, clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    assert_found_and_repaired(DEFECTS[name], clean_sets, tmp_path)


@pytest.mark.parametrize("width", [3, 12])
def test_a_thin_band_between_two_classes_is_mentioned(tmp_path: Path, width: int) -> None:
    y, x = np.mgrid[:72, :96]
    for k in range(8):
        distance = np.hypot(y - 36, x - 40 - k)
        mask = np.searchsorted([20, 20 + width], distance).astype(np.uint8)
        # 0 is the object, 1 the band and 2 what is outside.
        for folder, pixels in (("images", 80 * mask + 3 * (x % 7)), ("masks", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / folder / f"{k}.png")
    kinds = [each.kind for each in inspect_dataset(tmp_path).findings]
    assert ("thin band" in kinds) == (width == 3)


def test_objects_in_the_middle_have_no_frame(tmp_path: Path) -> None:
    y, x = np.mgrid[:72, :96]
    for k in range(8):
        mask = (np.hypot(y - 35.5, x - 40 - k) < 20).astype(np.uint8)
        for folder, pixels in (("images", 80 * mask + 3 * (x % 7)), ("masks", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / folder / f"{k}.png")
    assert "frame around masks" not in {each.kind for each in inspect_dataset(tmp_path).findings}


def write_mask(root: Path, name: str, mask: np.ndarray) -> None:
    PIL.Image.fromarray(mask).save(root / "masks" / f"{name}.png")


def test_absent_and_rare_classes_are_named(tmp_path: Path) -> None:
    write_trees(tmp_path)
    empty = np.zeros((15, 20), np.uint8)
    for name in TREES:
        write_mask(tmp_path, name, empty)
    label = empty.copy()
    label[0, 0] = 1
    write_mask(tmp_path, "ash", label)
    survey = survey_folder(tmp_path)
    absent = finding_of_kind(survey, "class without pixels")
    assert absent.message == "no mask contains sign"
    rare = finding_of_kind(survey, "rare class")
    assert rare.message == "rare classes (below 0.5 % of the pixels): road (0.06 %)"


def test_classes_missing_in_one_split_are_named(tmp_path: Path) -> None:
    write_trees(tmp_path)
    rows = "".join(f"{name},{'val' if name == 'fir' else 'train'}\n" for name in TREES)
    (tmp_path / "split.csv").write_text("image,split\n" + rows)
    empty = np.zeros((15, 20), np.uint8)
    write_mask(tmp_path, "fir", empty)
    finding = finding_of_kind(survey_folder(tmp_path), "class missing from validation")
    assert finding.message == (
        "the split val has no pixel of road and sign, so there is no score for them"
    )
    write_trees(tmp_path)
    for name in TREES[:-1]:
        write_mask(tmp_path, name, empty)
    finding = finding_of_kind(survey_folder(tmp_path), "class missing from training")
    assert finding.message == "the split train has no pixel of road and sign"


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        (slice(20, None), slice(None), "at the bottom"),
        (slice(0, 3), slice(28, None), "at the top right"),
        (slice(None), slice(0, 2), "at the left"),
        (slice(None), slice(None), "all over it"),
    ],
)
def test_region_is_described_by_its_place(rows: slice, columns: slice, expected: str) -> None:
    region = np.zeros(THUMBNAIL_SHAPE, bool)
    region[rows, columns] = True
    assert describe_region(region) == expected


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is missing")
def test_hood_of_the_camera_car_is_found_in_carla() -> None:
    survey = inspect_dataset(SHARED / "carla_800x600")
    hood = finding_of_kind(survey, "constant region")
    assert re.match(
        r"9[345] % of all Vehicles pixels .* \(at the bottom, 1[4-6] % of the image\)", hood.message
    )
    assert all(finding.severity != "error" for finding in survey.findings)
