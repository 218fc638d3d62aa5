"""The mask doctor: every defect that is planted is found, by its kind and its files; nothing is found in clean sets; what can be mended is mended."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tifffile

from useg.classes import ClassTable, palette, write_classes
from useg.cli import main
from useg.data.layouts import find_dataset
from useg.doctor import fix
from useg.doctor.stored_values import voc_colors
from useg.doctor.survey import Survey
from useg.errors import UsageError
from useg.reporting.inspection import NUM_SAMPLES, inspect_dataset
from useg.scenes.scene import make_scene

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SIZE = (128, 96)
NUM = 22
STREET = ClassTable(("sky", "building", "ground", "green", "vehicle"), ignore=(9,))
_MERGED = np.array(
    [0, 1, 1, 9, 9, 9, 2, 2, 2, 3, 4, 1, 9], np.uint8
)  # of CARLA's classes, so that none is rare
CELL = ClassTable(("background", "cell"))


def called(k: int) -> str:
    """A name without numbers, so that nothing looks like a film."""
    return "".join(chr(97 + byte % 26) for byte in hashlib.sha256(str(k).encode()).digest()[:8])


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path)


def side(k: int, num: int) -> str:
    return "val" if k >= num - max(2, num // 4) else "train"


def streets(root: Path, num: int = NUM) -> Path:
    """Made streets with official splits."""
    for k in range(num):
        sample = make_scene(k, SIZE)
        save(root / side(k, num) / "images" / f"{called(k)}.png", sample.image)
        save(root / side(k, num) / "masks" / f"{called(k)}.png", _MERGED[sample.label])
    write_classes(root / "classes.toml", STREET)
    return root


def blobs(k: int, depth: int = 255) -> tuple[np.ndarray, np.ndarray]:
    """Bright discs on a noisy ground, and which pixels they cover."""
    rng = np.random.default_rng(k)
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    label = np.zeros(SIZE[::-1], np.uint8)
    image = 0.25 + 0.1 * np.sin(x / rng.uniform(15, 40) + rng.uniform(0, 6)) * np.sin(
        y / rng.uniform(15, 40) + rng.uniform(0, 6)
    )
    for _ in range(rng.integers(5, 10)):
        inside = (x - rng.uniform(0, SIZE[0])) ** 2 + (
            y - rng.uniform(0, SIZE[1])
        ) ** 2 < rng.uniform(5, 13) ** 2
        label[inside] = 1
        image[inside] = rng.uniform(0.5, 0.75)
    return np.clip((image + 0.03 * rng.standard_normal(image.shape)) * depth, 0, depth), label


def cells(root: Path, num: int = NUM) -> Path:
    """Binary masks 0/1 of blobs, without a class table."""
    for k in range(num):
        image, label = blobs(k)
        save(root / "images" / f"{called(k)}.png", image.astype(np.uint8))
        save(root / "masks" / f"{called(k)}.png", label)
    return root


def deep(root: Path, num: int = NUM) -> Path:
    """Grey 16-bit TIFFs with three classes: ground, blobs, and the blobs' lower halves."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for k in range(num):
        image, label = blobs(5000 + k, 4000)
        lower = (label == 1) & (np.arange(SIZE[1])[:, None] > SIZE[1] // 2)
        image[lower] += 1500
        tifffile.imwrite(root / "images" / f"{called(k)}.tif", image.astype(np.uint16))
        save(root / "masks" / f"{called(k)}.png", label + lower.astype(np.uint8))
    return root


def indexed(root: Path, num: int = NUM) -> Path:
    """Palette masks of ids 0 to 3 in Pascal VOC's colours, without a class table."""
    colors = palette(ClassTable(tuple("abcdefghijklmnopqrstu"), voc_colors()))
    for k in range(num):
        sample = make_scene(2000 + k, SIZE)
        save(root / "images" / f"{called(k)}.png", sample.image)
        mask = PIL.Image.fromarray(np.minimum(_MERGED[sample.label] % 9, 3))
        mask.putpalette(colors.tobytes())
        (root / "masks").mkdir(exist_ok=True)
        mask.save(root / "masks" / f"{called(k)}.png")
    return root


CLEAN: dict[str, Callable[..., Path]] = {
    "streets": streets,
    "cells": cells,
    "deep": deep,
    "indexed": indexed,
}


@pytest.fixture(scope="session")
def clean_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp("clean") / name) for name, make in CLEAN.items()}


def path_of(root: Path, k: int, what: str = "masks") -> Path:
    return next(root.rglob(f"{what}/{called(k)}.*"))


def edit(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """Change the pixels of a picture file; palette files lose their palette."""
    with PIL.Image.open(path) as opened:
        pixels = np.array(opened)
    save(path, np.ascontiguousarray(change(pixels)))
    return path


def moved(pixels: np.ndarray, right: int, down: int) -> np.ndarray:
    return np.roll(pixels, (down, right), (0, 1))


def painted(mask: np.ndarray) -> np.ndarray:
    return palette(STREET)[mask]


def smoothed(mask: np.ndarray) -> np.ndarray:
    """Resized to half and back as a colour picture: anti-aliased edges."""
    sheet = PIL.Image.fromarray(painted(mask) if mask.ndim == 2 else mask)
    return np.asarray(
        sheet.resize((SIZE[0] // 2, SIZE[1] // 2), PIL.Image.Resampling.BILINEAR).resize(
            SIZE, PIL.Image.Resampling.BILINEAR
        )
    )


def all_masks(root: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for path in root.rglob("masks/*"):
        edit(path, change)


# Each plants one defect and returns (kind, names of the files to be found; none when the finding is about the whole set).
Planted = tuple[str, set[str]]


def image_without_mask(root: Path) -> Planted:
    path_of(root, 3).unlink()
    return "image without mask", {path_of(root, 3, "images").name}


def mask_without_image(root: Path) -> Planted:
    path_of(root, 4, "images").unlink()
    return "mask without image", {path_of(root, 4).name}


def truncated_image(root: Path) -> Planted:
    path = path_of(root, 5, "images")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return "unreadable file", {path.name}


def empty_file(root: Path) -> Planted:
    path_of(root, 6).write_bytes(b"")
    return "unreadable file", {path_of(root, 6).name}


def web_page_as_picture(root: Path) -> Planted:
    path_of(root, 7, "images").write_text("<!DOCTYPE html><html>404</html>")
    return "unreadable file", {path_of(root, 7, "images").name}


def jpeg_called_png(root: Path) -> Planted:
    path = path_of(root, 8, "images")
    with PIL.Image.open(path) as opened:
        opened.save(path, "JPEG", quality=95)
    return "mislabelled file", {path.name}


def size_mismatch(root: Path) -> Planted:
    path = edit(path_of(root, 9), lambda mask: mask[:-7])
    return "size mismatch", {path.name}


def half_size_mask(root: Path) -> Planted:
    path = edit(path_of(root, 9), lambda mask: mask[::2, ::2])
    return "size mismatch", {path.name}


def transposed_mask(root: Path) -> Planted:
    path = edit(path_of(root, 10), lambda mask: np.rot90(mask))
    return "transposed mask", {path.name}


def mirrored_mask(root: Path) -> Planted:
    path = edit(path_of(root, 11), lambda mask: mask[:, ::-1])
    return "turned mask", {path.name}


def unknown_ids(root: Path) -> Planted:
    def spoil(mask: np.ndarray) -> np.ndarray:
        mask[40:50, 30:60] = 17
        return mask

    return "unknown value", {edit(path_of(root, 12), spoil).name}


def one_mask_of_grey_levels(root: Path) -> Planted:
    path = path_of(root, 13)
    with PIL.Image.open(path) as opened:
        grey = opened.convert("L")
    grey.save(path)
    return "grey levels of a palette", {path.name}


def all_masks_of_grey_levels(root: Path) -> Planted:
    for path in root.rglob("masks/*"):
        with PIL.Image.open(path) as opened:
            grey = opened.convert("L")
        grey.save(path)
    return "grey levels of a palette", set()


def colour_masks(root: Path) -> Planted:
    (root / "classes.toml").unlink()
    all_masks(root, painted)
    return "colour masks", set()


def one_smoothed_mask(root: Path) -> Planted:
    (root / "classes.toml").unlink()
    all_masks(root, painted)
    return "smeared mask", {edit(path_of(root, 14), smoothed).name}


def all_masks_smoothed(root: Path) -> Planted:
    (root / "classes.toml").unlink()
    all_masks(root, smoothed)
    return "smeared mask", {path.name for path in root.rglob("masks/*")}


def jpeg_mask(root: Path) -> Planted:
    all_masks(root, lambda mask: 255 * mask)
    path = path_of(root, 15)
    with PIL.Image.open(path) as opened:
        opened.save(path.with_suffix(".jpg"), "JPEG", quality=60)
    path.unlink()
    return "mask damaged by JPEG", {path.with_suffix(".jpg").name}


def two_values_for_one_class(root: Path) -> Planted:
    paths = [edit(path_of(root, k), lambda mask: 255 * mask) for k in (1, 16, 17)]
    return "two values for one class", {path.name for path in paths}


def two_grey_levels(root: Path) -> Planted:
    all_masks(root, lambda mask: 255 * mask)
    return "two grey levels", set()


def mask_of_one_class(root: Path) -> Planted:
    return "mask of one class", {edit(path_of(root, 18), np.zeros_like).name}


def class_without_pixels(root: Path) -> Planted:
    all_masks(root, lambda mask: np.where(mask == 3, 9, mask).astype(np.uint8))
    return "class without pixels", set()


def rare_class(root: Path) -> Planted:
    corner = np.add.outer(np.arange(SIZE[1]), np.arange(SIZE[0])) < 12
    all_masks(root, lambda mask: np.where(mask == 4, 9, mask).astype(np.uint8))
    for k in (0, NUM - 1):
        edit(path_of(root, k), lambda mask: np.where(corner, 4, mask).astype(np.uint8))
    return "rare class", set()


def ids_skipped(root: Path) -> Planted:
    (root / "classes.toml").unlink()
    all_masks(root, lambda mask: np.array([0, 1, 2, 7, 9, 255, 255, 255, 255, 255], np.uint8)[mask])
    return "ids skipped", set()


def inverted_masks(root: Path) -> Planted:
    return "inverted mask", {edit(path_of(root, k), lambda mask: 1 - mask).name for k in (19, 20)}


def exact_duplicate(root: Path) -> Planted:
    for what in ("images", "masks"):
        path = path_of(root, 2, what)
        shutil.copy(path, path.with_stem("copy"))
    return "exact duplicate", {"copy.png", path_of(root, 2).name}


def near_duplicate(root: Path) -> Planted:
    shutil.copy(path_of(root, 2), path_of(root, 2).with_stem("again"))
    path = path_of(root, 2, "images")
    with PIL.Image.open(path) as opened:
        opened.point(lambda value: value * 0.9 + 10).save(
            path.with_stem("again").with_suffix(".jpg"), quality=80
        )
    return "near duplicate", {"again.jpg", path.name}


def near_duplicates_across_splits(root: Path) -> Planted:
    first, val = path_of(root, 2, "images"), path_of(root, NUM - 1, "images").parent.parent
    with PIL.Image.open(first) as opened:
        opened.save(val / "images" / "again.jpg", quality=80)
    shutil.copy(path_of(root, 2), val / "masks" / "again.png")
    return "near duplicates across splits", {"again.jpg", first.name}


def same_image_with_different_masks(root: Path) -> Planted:
    image, mask = path_of(root, 2, "images"), path_of(root, 2)
    shutil.copy(image, image.with_stem("copy"))
    shutil.copy(mask, mask.with_stem("copy"))
    edit(mask.with_stem("copy"), lambda pixels: np.where(pixels == 2, 1, pixels))
    return "same image, different masks", {"copy.png", image.name}


def splits_differ(root: Path) -> Planted:
    for path in (root / "val" / "masks").iterdir():
        edit(path, lambda mask: np.where(mask == 1, 3, mask).astype(np.uint8))
    return "splits differ", set()


def black_frame(root: Path) -> Planted:
    return "blank image", {edit(path_of(root, 21, "images"), np.zeros_like).name}


def overexposed(root: Path) -> Planted:
    return "odd exposure", {
        edit(path_of(root, 20, "images"), lambda image: (235 + image // 13).astype(np.uint8)).name
    }


def odd_size(root: Path) -> Planted:
    for what in ("images", "masks"):
        edit(path_of(root, 0, what), lambda pixels: pixels[:80, :100])
    return "odd size", {path_of(root, 0).name}


def other_bands(root: Path) -> Planted:
    path = edit(path_of(root, 1, "images"), lambda image: image[..., 1])
    return "mixed bands", {path.name}


def other_depth(root: Path) -> Planted:
    path = path_of(root, 1, "images")
    tifffile.imwrite(path, (tifffile.imread(path) // 20).astype(np.uint8))
    return "mixed number types", {path.name}


def all_masks_shifted(root: Path) -> Planted:
    all_masks(root, lambda mask: moved(mask, 2, -3))
    return "shifted masks", {path.name for path in root.rglob("masks/*")}


def one_mask_shifted(root: Path) -> Planted:
    return "shifted mask", {edit(path_of(root, 11), lambda mask: moved(mask, 5, 3)).name}


def masks_exchanged(root: Path) -> Planted:
    one, two = path_of(root, 12), path_of(root, 13)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    return "mask of another image", {one.name, two.name}


def mask_of_a_missing_image(root: Path) -> Planted:
    save(path_of(root, 14), _MERGED[make_scene(900, SIZE).label])
    return "mask does not fit its image", {path_of(root, 14).name}


def specks(root: Path) -> Planted:
    def spoil(mask: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(0)
        for y, x in zip(
            rng.integers(8, SIZE[1] - 8, 200), rng.integers(8, SIZE[0] - 8, 200), strict=True
        ):
            mask[y, x] = (mask[y, x] + 1) % 5
        return mask

    return "labels to review", {edit(path_of(root, 15), spoil).name}


def invented_labels(root: Path) -> Planted:
    def spoil(mask: np.ndarray) -> np.ndarray:
        y, x = np.mgrid[: SIZE[1], : SIZE[0]]
        for k in range(5):
            mask[np.hypot(x - 14 - 25 * k, y - 15 - 33 * (k % 3)) < 8] = 1
        return mask

    return "labels to review", {edit(path_of(root, 16), spoil).name}


def constant_region(root: Path) -> Planted:
    all_masks(
        root,
        lambda mask: np.where(
            np.arange(SIZE[1])[:, None] >= 78, 4, np.where(mask == 4, 1, mask)
        ).astype(np.uint8),
    )
    return "constant region", set()


def film(root: Path) -> Planted:
    shutil.rmtree(root)
    base = make_scene(77, (256, 192))
    for k in range(24):
        top, left = k // 2, 2 * k
        save(root / "images" / f"f{k:03}.png", base.image[top : top + 96, left : left + 128])
        save(
            root / "masks" / f"f{k:03}.png", _MERGED[base.label[top : top + 96, left : left + 128]]
        )
    write_classes(root / "classes.toml", STREET)
    return "looks like a film", set()


def validation_goes_on_where_training_stops(root: Path) -> Planted:
    film(root)
    rows = "".join(f"f{k:03},{'val' if k >= 18 else 'train'}\n" for k in range(24))
    (root / "split.csv").write_text("image,split\n" + rows)
    return "validation beside training", {"f018.png"}


# name of the defect -> (clean set, what plants it, further kinds that truly come with it)
DEFECTS: dict[str, tuple[str, Callable[[Path], Planted], set[str]]] = {
    "image without mask": ("streets", image_without_mask, set()),
    "mask without image": ("streets", mask_without_image, set()),
    "truncated image": ("streets", truncated_image, set()),
    "zero-byte file": ("streets", empty_file, set()),
    "web page under a picture's name": ("streets", web_page_as_picture, set()),
    "JPEG called .png": ("streets", jpeg_called_png, set()),
    "mask cropped": ("streets", size_mismatch, set()),
    "mask of half the size": ("streets", half_size_mask, set()),
    "mask transposed": ("streets", transposed_mask, set()),
    "mask mirrored": ("streets", mirrored_mask, set()),
    "unknown ids": ("streets", unknown_ids, set()),
    "one mask as grey levels of its palette": ("indexed", one_mask_of_grey_levels, set()),
    "all masks as grey levels of their palette": ("indexed", all_masks_of_grey_levels, set()),
    "RGB masks without a class table": ("streets", colour_masks, set()),
    "one anti-aliased mask": ("streets", one_smoothed_mask, {"colour masks"}),
    "all masks anti-aliased": ("streets", all_masks_smoothed, {"colour masks"}),
    "mask saved as JPEG": ("cells", jpeg_mask, {"two grey levels"}),
    "0/1 mixed with 0/255": ("cells", two_values_for_one_class, set()),
    "0/255": ("cells", two_grey_levels, set()),
    "all-background mask": ("streets", mask_of_one_class, set()),
    "class without pixels": ("streets", class_without_pixels, set()),
    "tiny class": ("streets", rare_class, set()),
    "ids skipped": ("streets", ids_skipped, set()),
    "inverted masks": ("cells", inverted_masks, set()),
    "exact duplicate": ("streets", exact_duplicate, set()),
    "near duplicate": ("streets", near_duplicate, set()),
    "near duplicates across splits": ("streets", near_duplicates_across_splits, set()),
    "same image with different masks": ("streets", same_image_with_different_masks, set()),
    "splits of different class shares": (
        "streets",
        splits_differ,
        {"class missing from validation"},
    ),
    "black frame": ("streets", black_frame, set()),
    "overexposed frame": ("streets", overexposed, set()),
    "image of another size": ("streets", odd_size, set()),
    "image of other bands": ("streets", other_bands, set()),
    "image of another depth": ("deep", other_depth, set()),
    "all masks shifted": ("streets", all_masks_shifted, set()),
    "one mask shifted": ("streets", one_mask_shifted, set()),
    "masks of two images exchanged": ("streets", masks_exchanged, set()),
    "mask of an image that is not there": ("streets", mask_of_a_missing_image, set()),
    "specks": ("streets", specks, set()),
    "labels that no edge supports": ("cells", invented_labels, set()),
    "constant region": ("streets", constant_region, set()),
    "film": ("streets", film, set()),
    "validation goes on where training stops": (
        "streets",
        validation_goes_on_where_training_stops,
        {"looks like a film"},
    ),
}


def plant(name: str, clean_sets: dict[str, Path], folder: Path) -> tuple[Path, Planted]:
    clean, spoil, _ = DEFECTS[name]
    root = folder / "data"
    shutil.copytree(clean_sets[clean], root)
    return root, spoil(root)


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def told(report: Survey) -> list[str]:
    return [f"{finding.severity}: {finding.kind}: {finding.message}" for finding in report.findings]


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found_and_nothing_else_and_mended(
    name: str, clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    root, (kind, files) = plant(name, clean_sets, tmp_path)
    before = contents(root)
    report = inspect_dataset(root)
    found = [finding for finding in report.findings if finding.kind == kind]
    assert found, told(report)
    assert {path.name for finding in found for path in finding.files} >= files, told(report)
    masks = {path.stem for finding in found for path in finding.files}
    assert masks <= {Path(file).stem for file in files} or not files, told(report)
    assert {finding.kind for finding in report.findings} - {kind} <= DEFECTS[name][2], told(report)
    assert all(str(root) not in finding.message for finding in report.findings)
    if not any(finding.cures for finding in report.findings):
        assert (
            report.findings[0].severity != "error"
        )  # nothing that stops training is left without a cure
        return
    fix.write_clean_copy(report, tmp_path / "clean")
    assert contents(root) == before
    again = inspect_dataset(tmp_path / "clean")
    assert [finding for finding in again.findings if finding.severity == "error"] == [], told(again)
    if any(finding.cures for finding in found):
        assert kind not in {finding.kind for finding in again.findings}, told(again)


@pytest.mark.parametrize("name", CLEAN)
def test_nothing_is_found_in_a_clean_set(
    name: str, clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    root = (
        CLEAN[name](tmp_path / "data", 1000)
        if os.environ.get("USEG_SOAK") == "1"
        else clean_sets[name]
    )
    assert told(inspect_dataset(root)) == []


def test_the_copy_names_every_change_and_what_is_left(
    clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "data"
    shutil.copytree(clean_sets["streets"], root)
    shifted, gone, black = (
        one_mask_shifted(root)[1],
        image_without_mask(root)[1],
        overexposed(root)[1],
    )
    inspect_dataset(root, fix=tmp_path / "clean")
    log = json.loads((tmp_path / "clean" / "changes.json").read_text())
    assert log["num_pairs"] == {"before": NUM - 1, "after": NUM - 1}
    assert {entry["because"] for entry in log["changes"]} == {"shifted mask", "image without mask"}
    assert shifted | gone == {
        name
        for entry in log["changes"]
        for name in shifted | gone
        if name in entry["file"] + entry["change"]
    }
    assert [entry["kind"] for entry in log["not_mended"]] == ["odd exposure"]
    assert black.pop() in (tmp_path / "clean" / "changes.txt").read_text()
    with PIL.Image.open(tmp_path / "clean" / "masks" / shifted.pop()) as mask:
        assert mask.mode == "P"
        pixels = np.array(mask)
    original = _MERGED[make_scene(11, SIZE).label]
    known = (pixels != 255) & (original != 9)
    assert (pixels[known] == original[known]).all()
    assert known.mean() > 0.8
    name = f"{called(2)}.png"
    assert (tmp_path / "clean" / "images" / name).read_bytes() == path_of(
        root, 2, "images"
    ).read_bytes()


@pytest.mark.parametrize(
    ("where", "sentence"),
    [("full", "is not empty"), ("data/clean", "lies inside"), ("file", "is a file")],
)
def test_the_copy_goes_into_a_new_folder_beside(
    clean_sets: dict[str, Path], tmp_path: Path, where: str, sentence: str
) -> None:
    shutil.copytree(clean_sets["cells"], tmp_path / "data")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=sentence):
        inspect_dataset(tmp_path / "data", fix=tmp_path / where)
    assert contents(tmp_path / "data").keys() == {
        tmp_path / "data" / path.relative_to(clean_sets["cells"])
        for path in contents(clean_sets["cells"])
    }


def test_a_copy_that_fails_leaves_nothing(
    clean_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fix, "_write_log", full)
    with pytest.raises(UsageError, match="No space left on device"):
        inspect_dataset(clean_sets["cells"], fix=tmp_path / "clean")
    assert list(tmp_path.iterdir()) == []


def test_stacks_and_single_things_are_looked_at_too(tmp_path: Path) -> None:
    stack = [blobs(100 + k) for k in range(8)]
    for folder in ("images", "masks"):
        (tmp_path / "stack" / folder).mkdir(parents=True)
    tifffile.imwrite(
        tmp_path / "stack/images/a.tif",
        np.stack([image for image, _ in stack]).astype(np.uint8),
        photometric="minisblack",
    )
    tifffile.imwrite(
        tmp_path / "stack/masks/a.tif",
        np.stack([label for _, label in stack]),
        photometric="minisblack",
    )
    report = inspect_dataset(tmp_path / "stack", fix=tmp_path / "clean")
    assert (report.num_pairs, told(report)) == (8, [])
    again = inspect_dataset(tmp_path / "clean")
    assert (again.num_pairs, again.pixels) == (8, report.pixels)


def test_the_page_shows_the_findings(clean_sets: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "<b>data"
    shutil.copytree(clean_sets["streets"], root)
    for spoil in (
        one_mask_shifted,
        specks,
        masks_exchanged,
        near_duplicates_across_splits,
        unknown_ids,
    ):
        spoil(root)
    report = inspect_dataset(root, html=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Not ready to train" in page
    assert all(f"finding-{k + 1}" in page for k in range(len(report.findings)))
    assert page.count("<img ") == 2 * len(report.findings) + 2 * NUM_SAMPLES - 1
    assert "<b>data" not in page
    assert "http:" not in page
    assert "https:" not in page


def test_the_command_line(
    clean_sets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(clean_sets["cells"], tmp_path / "data")
    inverted_masks(tmp_path / "data")
    for data, out, code in (("data", "clean", 1), ("clean", "cleaner", 0), ("clean", "data", 2)):
        with pytest.raises(SystemExit) as exit_:
            main(["inspect", str(tmp_path / data), "--fix", str(tmp_path / out)])
        assert exit_.value.code == code
    assert str(tmp_path / "clean" / "changes.txt") in capsys.readouterr().out


def test_training_refuses_two_values_for_one_class(
    clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(clean_sets["cells"], tmp_path / "data")
    two_values_for_one_class(tmp_path / "data")
    with pytest.raises(
        UsageError,
        match="one class has two values; let useg inspect DATA --fix OUT write a clean copy",
    ):
        find_dataset(tmp_path / "data")


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data are not beside this checkout")
def test_the_hood_of_the_camera_car_is_named() -> None:
    report = inspect_dataset(SHARED / "carla_800x600")
    hood = next(finding for finding in report.findings if finding.kind == "constant region")
    assert re.match(
        r"9[345]% of all Vehicles pixels are one region .* \(at the bottom, 1[4-6]% of it\)",
        hood.message,
    )
    assert [finding.kind for finding in report.findings if finding.severity == "error"] == []
