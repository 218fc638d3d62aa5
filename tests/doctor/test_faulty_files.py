"""Damaged, misnamed and unpaired files, wrong mask sizes and mixed images are found."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tifffile
from made_doctor import (
    Defect,
    Planted,
    assert_found_and_repaired,
    edit_picture,
    find_file,
    finding_of_kind,
    overexpose,
    remove_mask,
    survey_folder,
    write_trees,
)

from useg.doctor.faulty_files import detect_file_format


def remove_image(root: Path) -> Planted:
    find_file(root, 4, "images").unlink()
    return "mask without image", {find_file(root, 4).name}


def truncate_image(root: Path) -> Planted:
    path = find_file(root, 5, "images")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return "unreadable file", {path.name}


def empty_mask_file(root: Path) -> Planted:
    find_file(root, 6).write_bytes(b"")
    return "unreadable file", {find_file(root, 6).name}


def save_web_page_as_image(root: Path) -> Planted:
    find_file(root, 7, "images").write_text("<!DOCTYPE html><html>404</html>")
    return "unreadable file", {find_file(root, 7, "images").name}


def save_jpeg_as_png(root: Path) -> Planted:
    path = find_file(root, 8, "images")
    with PIL.Image.open(path) as opened:
        opened.save(path, "JPEG", quality=95)
    return "mislabelled file", {path.name}


def crop_mask(root: Path) -> Planted:
    path = edit_picture(find_file(root, 9), lambda mask: mask[:-7])
    return "size mismatch", {path.name}


def halve_mask(root: Path) -> Planted:
    path = edit_picture(find_file(root, 9), lambda mask: mask[::2, ::2])
    return "size mismatch", {path.name}


def transpose_mask(root: Path) -> Planted:
    path = edit_picture(find_file(root, 10), lambda mask: np.rot90(mask))
    return "transposed mask", {path.name}


def crop_pair(root: Path) -> Planted:
    for folder in ("images", "masks"):
        edit_picture(find_file(root, 0, folder), lambda pixels: pixels[:80, :100])
    return "odd size", {find_file(root, 0).name}


def keep_one_band(root: Path) -> Planted:
    path = edit_picture(find_file(root, 1, "images"), lambda image: image[..., 1])
    return "mixed bands", {path.name}


def reduce_depth(root: Path) -> Planted:
    path = find_file(root, 1, "images")
    tifffile.imwrite(path, (tifffile.imread(path) // 20).astype(np.uint8))
    return "mixed number types", {path.name}


def blacken_image(root: Path) -> Planted:
    path = edit_picture(find_file(root, 21, "images"), np.zeros_like)
    return "blank image", {path.name}


DEFECTS = {
    "image without mask": Defect("streets", remove_mask),
    "mask without image": Defect("streets", remove_image),
    "truncated image": Defect("streets", truncate_image),
    "empty file": Defect("streets", empty_mask_file),
    "web page with an image's name": Defect("streets", save_web_page_as_image),
    "JPEG called .png": Defect("streets", save_jpeg_as_png),
    "mask cropped": Defect("streets", crop_mask),
    "mask of half the size": Defect("streets", halve_mask),
    "mask transposed": Defect("streets", transpose_mask),
    "pair of another size": Defect("streets", crop_pair),
    "image with one band": Defect("streets", keep_one_band),
    "image of another depth": Defect("deep", reduce_depth),
    "black frame": Defect("streets", blacken_image),
    "overexposed frame": Defect("streets", overexpose),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defect_alone_is_found_and_repaired(
    name: str, clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    assert_found_and_repaired(DEFECTS[name], clean_sets, tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b" <!DOCTYPE html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"not found", "text"),
        (b"\x89PNG\r\n", "PNG"),
        (b"II+\0....", "TIFF"),
        (b"\0\1\2\3", ""),
    ],
)
def test_first_bytes_show_the_format(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "file.png").write_bytes(content)
    assert detect_file_format(tmp_path / "file.png") == expected


def test_unreadable_files_do_not_stop_the_survey(tmp_path: Path) -> None:
    write_trees(tmp_path)
    image, mask = tmp_path / "images" / "elm.png", tmp_path / "masks" / "fir.png"
    image.write_text("x")
    mask.write_bytes(mask.read_bytes()[:60])
    pointer = tmp_path / "images" / "ash.png"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    survey = survey_folder(tmp_path)
    found = [finding for finding in survey.findings if finding.kind == "unreadable file"]
    assert [finding.files for finding in found] == [(pointer,), (image,), (mask,)]
    assert survey.images == (3, 3, 3)
    assert found[0].message == "'images/ash.png' is a Git LFS pointer instead of the file itself"
    assert found[0].remedy == "run git lfs pull where you cloned the data"
    assert found[1].severity == "error"
    assert found[1].message == (
        "'images/elm.png' is a text file with the name of an image, as after a failed download"
    )
    assert found[1].remedy == "download it again, or remove it"


def test_size_mismatch_names_both_files_and_sizes(tmp_path: Path) -> None:
    write_trees(tmp_path)
    PIL.Image.fromarray(np.zeros((15, 19), np.uint8)).save(tmp_path / "masks" / "elm.png")
    finding = finding_of_kind(survey_folder(tmp_path), "size mismatch")
    assert finding.files == (tmp_path / "images" / "elm.png", tmp_path / "masks" / "elm.png")
    assert finding.message == (
        "image 'images/elm.png' is 20x15 pixels, but its mask 'masks/elm.png' is 19x15, "
        "with the same aspect ratio"
    )


def test_unpaired_files_are_counted_and_one_is_named(tmp_path: Path) -> None:
    write_trees(tmp_path)
    (tmp_path / "masks" / "elm.png").unlink()
    (tmp_path / "masks" / "fir.png").unlink()
    finding = finding_of_kind(survey_folder(tmp_path), "image without mask")
    assert (finding.severity, len(finding.files)) == ("error", 2)
    assert finding.message == "2 images have no mask, such as 'images/elm.png'"
    write_trees(tmp_path)
    (tmp_path / "images" / "fir.png").unlink()
    finding = finding_of_kind(survey_folder(tmp_path), "mask without image")
    assert finding.files == (tmp_path / "masks" / "fir.png",)


def test_grey_image_among_colour_images_is_a_warning(tmp_path: Path) -> None:
    write_trees(tmp_path)
    path = tmp_path / "images" / "ash.png"
    PIL.Image.fromarray(np.zeros((15, 20), np.uint8)).save(path)
    finding = finding_of_kind(survey_folder(tmp_path), "mixed bands")
    assert (finding.severity, finding.files) == ("warning", (path,))
    assert finding.message == "the images have 1 and 3 bands, such as 'images/ash.png'"


def test_different_sizes_in_a_small_set_are_a_note(tmp_path: Path) -> None:
    write_trees(tmp_path)
    write_trees(tmp_path, ("elm",), (18, 10))
    finding = finding_of_kind(survey_folder(tmp_path), "mixed sizes")
    assert finding.severity == "note"
    assert finding.message == "the images have 2 different sizes, from 18x10 to 20x15"


def test_mixed_number_types_are_an_error(tmp_path: Path) -> None:
    write_trees(tmp_path)
    (tmp_path / "images" / "fir.png").unlink()
    deep = np.zeros((15, 20, 3), np.uint16)
    tifffile.imwrite(tmp_path / "images" / "fir.tif", deep, photometric="rgb")
    finding = finding_of_kind(survey_folder(tmp_path), "mixed number types")
    assert finding.severity == "error"
    assert finding.message == "the images have uint16 and uint8 pixels, such as 'images/fir.tif'"
