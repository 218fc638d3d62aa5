"""Data sets that tests make: clean ones, and defects that are planted in a copy of them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import tifffile

from useg.classes import ClassTable, palette, write_classes
from useg.data.layouts import find_dataset
from useg.data.published_classes import voc_colors
from useg.data.splits import assign_splits
from useg.doctor.fix import write_clean_copy
from useg.doctor.measure import Finding
from useg.doctor.survey import Survey, defer_classes, survey_dataset
from useg.reporting.inspection import inspect_dataset
from useg.scenes.generate import make_scene

SIZE = (128, 96)
NUM_PAIRS = 22
STREET_CLASSES = ClassTable(("sky", "building", "ground", "green", "vehicle"), ignore=(9,))

# CARLA's classes, merged so that none is rare.
MERGED_IDS = np.array([0, 1, 1, 9, 9, 9, 2, 2, 2, 3, 4, 1, 9], np.uint8)

TREE_CLASSES = ClassTable(("sky", "road", "sign"), ignore=(9,))
TREES = ("ash", "beech", "cedar", "daisy", "elm", "fir")


def name_of(k: int) -> str:
    """A name without numbers, so that nothing looks like a video."""
    return "".join(chr(97 + byte % 26) for byte in hashlib.sha256(str(k).encode()).digest()[:8])


def save_picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path)


def write_streets(root: Path, num: int = NUM_PAIRS) -> Path:
    """Made streets with official splits."""
    for k in range(num):
        split = "val" if k >= num - max(2, num // 4) else "train"
        sample = make_scene(k, SIZE)
        save_picture(root / split / "images" / f"{name_of(k)}.png", sample.image)
        save_picture(root / split / "masks" / f"{name_of(k)}.png", MERGED_IDS[sample.label])
    write_classes(root / "classes.toml", STREET_CLASSES)
    return root


def make_blobs(seed: int, depth: int = 255) -> tuple[np.ndarray, np.ndarray]:
    """Bright discs on noisy ground, and a mask of the discs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    label = np.zeros(SIZE[::-1], np.uint8)
    wave_x = np.sin(x / rng.uniform(15, 40) + rng.uniform(0, 6))
    wave_y = np.sin(y / rng.uniform(15, 40) + rng.uniform(0, 6))
    image = 0.25 + 0.1 * wave_x * wave_y
    for _ in range(rng.integers(5, 10)):
        from_center = (x - rng.uniform(0, SIZE[0])) ** 2 + (y - rng.uniform(0, SIZE[1])) ** 2
        inside = from_center < rng.uniform(5, 13) ** 2
        label[inside] = 1
        image[inside] = rng.uniform(0.5, 0.75)
    return np.clip((image + 0.03 * rng.standard_normal(image.shape)) * depth, 0, depth), label


def write_cells(root: Path, num: int = NUM_PAIRS) -> Path:
    """Binary masks 0/1 of blobs, without a class table."""
    for k in range(num):
        image, label = make_blobs(k)
        save_picture(root / "images" / f"{name_of(k)}.png", image.astype(np.uint8))
        save_picture(root / "masks" / f"{name_of(k)}.png", label)
    return root


def write_deep(root: Path, num: int = NUM_PAIRS) -> Path:
    """Grey 16-bit TIFFs with three classes: ground, blobs, and the blobs' lower halves."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for k in range(num):
        image, label = make_blobs(5000 + k, 4000)
        lower = (label == 1) & (np.arange(SIZE[1])[:, None] > SIZE[1] // 2)
        image[lower] += 1500
        tifffile.imwrite(root / "images" / f"{name_of(k)}.tif", image.astype(np.uint16))
        save_picture(root / "masks" / f"{name_of(k)}.png", label + lower.astype(np.uint8))
    return root


def write_indexed(root: Path, num: int = NUM_PAIRS) -> Path:
    """Palette masks of ids 0 to 3 in Pascal VOC's colours, without a class table."""
    colors = palette(ClassTable(tuple("abcdefghijklmnopqrstu"), voc_colors()))
    for k in range(num):
        sample = make_scene(2000 + k, SIZE)
        save_picture(root / "images" / f"{name_of(k)}.png", sample.image)
        mask = PIL.Image.fromarray(np.minimum(MERGED_IDS[sample.label] % 9, 3))
        mask.putpalette(colors.tobytes())
        (root / "masks").mkdir(exist_ok=True)
        mask.save(root / "masks" / f"{name_of(k)}.png")
    return root


CLEAN_SETS: dict[str, Callable[..., Path]] = {
    "streets": write_streets,
    "cells": write_cells,
    "deep": write_deep,
    "indexed": write_indexed,
}


def write_trees(
    root: Path, names: tuple[str, ...] = TREES, size: tuple[int, int] = (20, 15)
) -> Path:
    """Pairs of noise; a tenth of each mask is ignored, the rest has three classes in columns."""
    columns = np.repeat(np.array([0, 1, 2, 9], np.uint8), (6, 6, 6, 2))
    label = np.tile(columns, (size[1], 1))[:, : size[0]]
    for name in names:
        rng = np.random.default_rng([ord(letter) for letter in name])
        noise = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        save_picture(root / "images" / f"{name}.png", noise)
        save_picture(root / "masks" / f"{name}.png", label)
    write_classes(root / "classes.toml", TREE_CLASSES)
    return root


def write_noise_video(root: Path, num: int = 20) -> Path:
    """Frames f000, f001, ... of noise; each is much like the one before."""
    write_trees(root, tuple(f"f{k:03}" for k in range(num)))
    rng = np.random.default_rng(0)
    frame = rng.normal(0, 1, (15, 20, 3))
    for k in range(num):
        pixels = (128 + 30 * frame).clip(0, 255).astype(np.uint8)
        save_picture(root / "images" / f"f{k:03}.png", pixels)
        frame = 0.92 * frame + 0.4 * rng.normal(0, 1, frame.shape)
    return root


def survey_folder(root: Path, split: str = "auto") -> Survey:
    return survey_dataset(
        find_dataset(root, strict=False, infer=defer_classes),
        split=lambda dataset: assign_splits(dataset, split),
    )


def finding_of_kind(survey: Survey, kind: str) -> Finding:
    found = [finding for finding in survey.findings if finding.kind == kind]
    assert found, f"no finding {kind!r} among {describe_findings(survey)}"
    return found[0]


def describe_findings(survey: Survey) -> list[str]:
    return [f"{finding.severity}: {finding.kind}: {finding.message}" for finding in survey.findings]


def read_files(root: Path) -> dict[Path, bytes]:
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def find_file(root: Path, k: int, folder: str = "masks") -> Path:
    return next(root.rglob(f"{folder}/{name_of(k)}.*"))


def edit_picture(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """Change the pixels of a picture file; palette files lose their palette."""
    with PIL.Image.open(path) as opened:
        pixels = np.array(opened)
    save_picture(path, np.ascontiguousarray(change(pixels)))
    return path


def edit_all_masks(root: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for path in root.rglob("masks/*"):
        edit_picture(path, change)


def roll(pixels: np.ndarray, right: int, down: int) -> np.ndarray:
    return np.roll(pixels, (down, right), (0, 1))


# The kind of a planted defect, and the names of the files in which it must be found; none if the
# finding concerns the whole data set.
Planted = tuple[str, set[str]]


@dataclass(frozen=True)
class Defect:
    """A defect: the clean set, what plants it, and kinds of findings that truly come with it."""

    clean_set: str
    plant: Callable[[Path], Planted]
    also_found: frozenset[str] = frozenset()


def assert_found_and_repaired(defect: Defect, clean_sets: dict[str, Path], folder: Path) -> None:
    """Plant a defect: it alone is found, in its files alone, and ``--fix`` repairs it."""
    root = folder / "data"
    shutil.copytree(clean_sets[defect.clean_set], root)
    kind, files = defect.plant(root)
    before = read_files(root)
    survey = inspect_dataset(root)
    described = describe_findings(survey)
    found = [finding for finding in survey.findings if finding.kind == kind]
    assert found, described
    found_paths = {path for finding in found for path in finding.files}
    assert {path.name for path in found_paths} >= files, described
    stems = {path.stem for path in found_paths}
    assert not files or stems <= {Path(file).stem for file in files}, described
    other_kinds = {finding.kind for finding in survey.findings} - {kind}
    assert other_kinds <= defect.also_found, described
    assert all(str(root) not in finding.message for finding in survey.findings)
    if not any(finding.repairs for finding in survey.findings):
        assert survey.findings[0].severity != "error", "every error has a repair"
        return
    write_clean_copy(survey, folder / "clean", drop_doubtful=True)
    assert read_files(root) == before
    again = inspect_dataset(folder / "clean")
    errors = [finding for finding in again.findings if finding.severity == "error"]
    assert errors == [], describe_findings(again)
    if any(finding.repairs for finding in found):
        assert kind not in {finding.kind for finding in again.findings}, describe_findings(again)


# Defects that tests of several modules plant


def remove_mask(root: Path) -> Planted:
    find_file(root, 3).unlink()
    return "image without mask", {find_file(root, 3, "images").name}


def shift_one_mask(root: Path) -> Planted:
    path = edit_picture(find_file(root, 11), lambda mask: roll(mask, 5, 3))
    return "shifted mask", {path.name}


def overexpose(root: Path) -> Planted:
    path = find_file(root, 20, "images")
    edit_picture(path, lambda image: (235 + image // 13).astype(np.uint8))
    return "odd exposure", {path.name}


def write_unknown_ids(root: Path) -> Planted:
    def change(mask: np.ndarray) -> np.ndarray:
        mask[40:50, 30:60] = 17
        return mask

    return "unknown value", {edit_picture(find_file(root, 12), change).name}


def mix_two_values(root: Path) -> Planted:
    paths = [edit_picture(find_file(root, k), lambda mask: 255 * mask) for k in (1, 16, 17)]
    return "two values for one class", {path.name for path in paths}


def invert_masks(root: Path) -> Planted:
    paths = [edit_picture(find_file(root, k), lambda mask: 1 - mask) for k in (19, 20)]
    return "inverted mask", {path.name for path in paths}


def exchange_masks(root: Path) -> Planted:
    one, two = find_file(root, 12), find_file(root, 13)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    return "mask of another image", {one.name, two.name}


def add_specks(root: Path) -> Planted:
    def change(mask: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(0)
        rows, columns = rng.integers(8, SIZE[1] - 8, 200), rng.integers(8, SIZE[0] - 8, 200)
        for y, x in zip(rows, columns, strict=True):
            mask[y, x] = (mask[y, x] + 1) % 5
        return mask

    return "labels to review", {edit_picture(find_file(root, 15), change).name}


def copy_to_validation(root: Path) -> Planted:
    """Add a training image to the validation split, saved as JPEG."""
    first = find_file(root, 2, "images")
    validation = find_file(root, NUM_PAIRS - 1, "images").parent.parent
    with PIL.Image.open(first) as opened:
        opened.save(validation / "images" / "again.jpg", quality=80)
    shutil.copy(find_file(root, 2), validation / "masks" / "again.png")
    return "near duplicates across splits", {"again.jpg", first.name}


def copy_pair(root: Path) -> Planted:
    for folder in ("images", "masks"):
        path = find_file(root, 2, folder)
        shutil.copy(path, path.with_stem("copy"))
    return "exact duplicate", {"copy.png", find_file(root, 2).name}


def copy_pair_darker(root: Path) -> Planted:
    shutil.copy(find_file(root, 2), find_file(root, 2).with_stem("again"))
    path = find_file(root, 2, "images")
    with PIL.Image.open(path) as opened:
        darker = opened.point(lambda value: value * 0.9 + 10)
    darker.save(path.with_name("again.jpg"), quality=80)
    return "near duplicate", {"again.jpg", path.name}
