"""Unknown values and smeared masks are found; unusual encodings are described."""

import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from made_doctor import (
    SIZE,
    STREET_CLASSES,
    Defect,
    Planted,
    assert_found_and_repaired,
    edit_all_masks,
    edit_picture,
    find_file,
    finding_of_kind,
    mix_two_values,
    survey_folder,
    write_trees,
    write_unknown_ids,
)

from useg.classes import CAMVID, palette
from useg.data.layouts import find_dataset
from useg.data.published_classes import grey_levels, match_grey_palette, voc_colors
from useg.doctor.stored_values import fill_unsure_pixels
from useg.errors import UsageError


def paint(mask: np.ndarray) -> np.ndarray:
    return palette(STREET_CLASSES)[mask]


def smooth(mask: np.ndarray) -> np.ndarray:
    """Resize to half and back as a colour picture, which leaves anti-aliased edges."""
    sheet = PIL.Image.fromarray(paint(mask) if mask.ndim == 2 else mask)
    half = sheet.resize((SIZE[0] // 2, SIZE[1] // 2), PIL.Image.Resampling.BILINEAR)
    return np.asarray(half.resize(SIZE, PIL.Image.Resampling.BILINEAR))


def save_as_grey(path: Path) -> None:
    with PIL.Image.open(path) as opened:
        grey = opened.convert("L")
    grey.save(path)


def save_one_as_grey(root: Path) -> Planted:
    save_as_grey(find_file(root, 13))
    return "grey levels of a palette", {find_file(root, 13).name}


def save_all_as_grey(root: Path) -> Planted:
    for path in root.rglob("masks/*"):
        save_as_grey(path)
    return "grey levels of a palette", set()


def paint_all(root: Path) -> Planted:
    (root / "classes.toml").unlink()
    edit_all_masks(root, paint)
    return "colour masks", set()


def smooth_one(root: Path) -> Planted:
    paint_all(root)
    return "smeared mask", {edit_picture(find_file(root, 14), smooth).name}


def smooth_all(root: Path) -> Planted:
    (root / "classes.toml").unlink()
    edit_all_masks(root, smooth)
    return "smeared mask", {path.name for path in root.rglob("masks/*")}


def save_one_as_jpeg(root: Path) -> Planted:
    edit_all_masks(root, lambda mask: 255 * mask)
    path = find_file(root, 15)
    with PIL.Image.open(path) as opened:
        opened.save(path.with_suffix(".jpg"), "JPEG", quality=60)
    path.unlink()
    return "mask damaged by JPEG", {path.with_suffix(".jpg").name}


def stretch_values(root: Path) -> Planted:
    edit_all_masks(root, lambda mask: 255 * mask)
    return "two grey levels", set()


def skip_ids(root: Path) -> Planted:
    (root / "classes.toml").unlink()
    ids = np.array([0, 1, 2, 7, 9, 255, 255, 255, 255, 255], np.uint8)
    edit_all_masks(root, lambda mask: ids[mask])
    return "ids skipped", set()


DEFECTS = {
    "unknown ids": Defect("streets", write_unknown_ids),
    "one mask as grey levels of its palette": Defect("indexed", save_one_as_grey),
    "all masks as grey levels of their palette": Defect("indexed", save_all_as_grey),
    "RGB masks without a class table": Defect("streets", paint_all),
    "one anti-aliased mask": Defect("streets", smooth_one, frozenset({"colour masks"})),
    "all masks anti-aliased": Defect("streets", smooth_all, frozenset({"colour masks"})),
    "mask saved as JPEG": Defect("cells", save_one_as_jpeg, frozenset({"two grey levels"})),
    "0/1 mixed with 0/255": Defect("cells", mix_two_values),
    "0/255": Defect("cells", stretch_values),
    "ids skipped": Defect("streets", skip_ids),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defect_alone_is_found_and_repaired(
    name: str, clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    assert_found_and_repaired(DEFECTS[name], clean_sets, tmp_path)


def test_unknown_value_is_reported_as_training_reports_it(tmp_path: Path) -> None:
    write_trees(tmp_path)
    mask = np.full((15, 20), 17, np.uint8)
    PIL.Image.fromarray(mask).save(tmp_path / "masks" / "elm.png")
    finding = finding_of_kind(survey_folder(tmp_path), "unknown value")
    assert finding.severity == "error"
    assert finding.message.endswith(
        "has the value 17 at (row 0, column 0), but there are 3 classes (0-2; ignored: 9)"
    )
    assert finding.remedy == "map it in classes.toml or set ignore = [17]"


def test_training_refuses_two_values_for_one_class(
    clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(clean_sets["cells"], tmp_path / "data")
    mix_two_values(tmp_path / "data")
    with pytest.raises(
        UsageError, match=r"one class seems to have two values; run useg inspect DATA --fix"
    ):
        find_dataset(tmp_path / "data")


def test_voc_palette_equals_the_published_colours() -> None:
    assert voc_colors()[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert voc_colors()[15] == (192, 128, 128)
    assert voc_colors()[20] == (0, 64, 128)


def test_grey_levels_equal_those_of_pillow() -> None:
    colors = np.array(CAMVID.colors, np.uint8)[None]
    grey = np.asarray(PIL.Image.fromarray(colors).convert("L"))[0]
    assert grey_levels(CAMVID.colors).keys() == set(grey.tolist())


def test_palette_is_matched_by_its_grey_levels_but_not_by_few_or_small_values() -> None:
    assert match_grey_palette(frozenset({0, 38, 75, 113})) == "Pascal VOC"
    assert match_grey_palette(frozenset({0, 38})) == ""
    assert match_grey_palette(frozenset({0, 1, 2, 3})) == ""
    assert match_grey_palette(frozenset({0, 128, 255})) == ""
    assert match_grey_palette(frozenset({0, 38, 75, 114})) == ""


def test_unsure_pixels_take_the_class_of_their_neighbours() -> None:
    label = np.array([[1, 254, 254, 2], [1, 254, 254, 2]], np.uint8)
    assert fill_unsure_pixels(label).tolist() == [[1, 1, 2, 2]] * 2
    assert label[0, 1] == 254
