"""Duplicates, and leaks between splits by copies, crops and neighbouring frames, are found."""

import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from made_doctor import (
    MERGED_IDS,
    NUM_PAIRS,
    SIZE,
    STREET_CLASSES,
    Defect,
    Planted,
    assert_found_and_repaired,
    copy_pair,
    copy_pair_darker,
    copy_to_validation,
    edit_picture,
    find_file,
    finding_of_kind,
    name_of,
    save_picture,
    survey_folder,
    write_noise_video,
    write_trees,
)

from useg.classes import write_classes
from useg.data import duplicates
from useg.doctor import leaks
from useg.doctor.survey import Survey
from useg.scenes.generate import make_scene


def crop_to_validation(root: Path) -> Planted:
    """Add a crop of a training image to the validation split."""
    validation = find_file(root, NUM_PAIRS - 1, "images").parent.parent
    for folder in ("images", "masks"):
        with PIL.Image.open(find_file(root, 2, folder)) as opened:
            opened.crop((31, 9, 118, 86)).save(validation / folder / "part.png")
    return "overlap across splits", {"part.png", find_file(root, 2).name}


def mirror_to_validation(root: Path) -> Planted:
    """Add a mirrored training image to the validation split."""
    validation = find_file(root, NUM_PAIRS - 1, "images").parent.parent
    for folder in ("images", "masks"):
        with PIL.Image.open(find_file(root, 2, folder)) as opened:
            mirrored = opened.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        mirrored.save(validation / folder / "again.png")
    return "turned copies across splits", {"again.png", find_file(root, 2).name}


def copy_pair_with_another_mask(root: Path) -> Planted:
    copy_pair(root)
    copied = find_file(root, 2).with_stem("copy")
    edit_picture(copied, lambda pixels: np.where(pixels == 2, 1, pixels))
    return "same image, different masks", {"copy.png", find_file(root, 2, "images").name}


def write_video(root: Path) -> Planted:
    """Replace the data set by a camera's path over one large scene."""
    shutil.rmtree(root)
    scene = make_scene(77, (256, 192))
    for k in range(24):
        window = slice(k // 2, k // 2 + 96), slice(2 * k, 2 * k + 128)
        save_picture(root / "images" / f"f{k:03}.png", scene.image[window])
        save_picture(root / "masks" / f"f{k:03}.png", MERGED_IDS[scene.label[window]])
    write_classes(root / "classes.toml", STREET_CLASSES)
    return "looks like a film", set()


def continue_training_in_validation(root: Path) -> Planted:
    write_video(root)
    rows = "".join(f"f{k:03},{'val' if k >= 18 else 'train'}\n" for k in range(24))
    (root / "split.csv").write_text("image,split\n" + rows)
    return "validation beside training", {"f018.png"}


DEFECTS = {
    "exact duplicate": Defect("streets", copy_pair),
    "near duplicate": Defect("streets", copy_pair_darker),
    "near duplicates across splits": Defect("streets", copy_to_validation),
    "crop of a training image held out": Defect(
        "streets", crop_to_validation, frozenset({"odd size"})
    ),
    "mirrored training image held out": Defect("streets", mirror_to_validation),
    "same image with different masks": Defect("streets", copy_pair_with_another_mask),
    "video": Defect("streets", write_video),
    "validation continues where training stops": Defect(
        "streets", continue_training_in_validation, frozenset({"looks like a film"})
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defect_alone_is_found_and_repaired(
    name: str, clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    assert_found_and_repaired(DEFECTS[name], clean_sets, tmp_path)


def test_random_split_of_a_video_is_a_warning_and_blocks_are_not(tmp_path: Path) -> None:
    write_noise_video(tmp_path)
    blocks = survey_folder(tmp_path)
    assert finding_of_kind(blocks, "looks like a film").severity == "note"
    assert all(finding.kind != "validation beside training" for finding in blocks.findings)
    leak = finding_of_kind(survey_folder(tmp_path, "random"), "validation beside training")
    assert leak.severity == "warning"
    assert "next to a training image of the same sequence" in leak.message


def duplicates_in(survey: Survey) -> dict[str, set[str]]:
    """Kind -> names of the files, of all findings of duplicates."""
    found: dict[str, set[str]] = {}
    for finding in survey.findings:
        if "duplicate" in finding.kind or "different masks" in finding.kind:
            found.setdefault(finding.kind, set()).update(path.name for path in finding.files)
    return found


def test_splits_keep_together_what_is_reported_as_duplicates(tmp_path: Path) -> None:
    names = tuple(name_of(k) for k in range(40))
    write_trees(tmp_path, names, SIZE)
    for k, name in enumerate(names):
        image = make_scene(k % 20, SIZE).image
        save_picture(tmp_path / "images" / f"{name}.png", image if k < 20 else image // 2)
    survey = survey_folder(tmp_path)
    assert survey.splits["val"] > 0
    assert "kept together" in survey.splits_by
    assert duplicates_in(survey).keys() == {"near duplicate"}


def test_duplicates_are_found_by_the_definition_that_splits_use(
    clean_sets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert leaks.find_near_duplicates is duplicates.find_near_duplicates
    assert leaks.MIN_REPORTED_CORRELATION > duplicates.NEAR_DUPLICATE_CORRELATION
    monkeypatch.setattr(leaks, "MIN_REPORTED_CORRELATION", -1.0)
    survey = survey_folder(clean_sets["streets"])
    assert len(duplicates_in(survey)["near duplicates across splits"]) == NUM_PAIRS


def test_cropped_copy_with_another_mask_is_found(
    clean_sets: dict[str, Path], tmp_path: Path
) -> None:
    """The earlier definition saw it as another image: its details are too far out of place."""
    root = tmp_path / "data"
    shutil.copytree(clean_sets["streets"], root)
    image = find_file(root, 2, "images")
    edit_picture(Path(shutil.copy(image, image.with_stem("copy"))), lambda p: p[1:-1, 1:-1])
    mask = find_file(root, 2)
    copied = Path(shutil.copy(mask, mask.with_stem("copy")))
    edit_picture(copied, lambda p: np.where(p == 2, 1, p)[1:-1, 1:-1])
    found = duplicates_in(survey_folder(root))
    assert found == {"same image, different masks": {"copy.png", image.name}}


def make_retina(seed: int) -> np.ndarray:
    """A bright disc that fills the image, with dark lines where other seeds do not have them."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:120, :160] - np.array([60, 80])[:, None, None]
    is_inside = np.hypot(x + rng.uniform(-2, 2), y + rng.uniform(-2, 2)) < 55
    image = np.where(is_inside, 150.0, 10.0)
    for _ in range(12):
        angle, offset = rng.uniform(0, np.pi), rng.uniform(-45, 45)
        is_line = abs(x * np.cos(angle) + y * np.sin(angle) - offset) < 1.5
        image[is_line & (image > 100)] -= 50
    return np.clip(image[..., None] + rng.normal(0, 4, (120, 160, 3)), 0, 255).astype(np.uint8)


def test_different_images_of_one_shape_are_not_reported(tmp_path: Path) -> None:
    names = tuple(name_of(k) for k in range(22))
    write_trees(tmp_path, names, (160, 120))
    images = [make_retina(k) for k in range(22)]
    for name, image in zip(names, images, strict=True):
        save_picture(tmp_path / "images" / f"{name}.png", image)
    signatures = np.stack([duplicates.compute_signature(image) for image in images])
    assert len(set(duplicates.group_near_duplicates(signatures))) < 5
    assert duplicates_in(survey_folder(tmp_path)) == {}
