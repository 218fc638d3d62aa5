"""A question offers lines of a ``dataset.toml``: they work, as they are printed."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from made_strangers import save, yard

from useg.data.dataset import read_label
from useg.data.layouts import find_dataset
from useg.data.splits import assign_splits
from useg.errors import UsageError

pytestmark = pytest.mark.wheel

# For each layout, the path of the k-th image, those of its sets of masks, and the offers that it
# has at least. A suffix of numbers says which images have the mask: "a.png @0-3".
LAYOUTS = {
    "raters of some images": (
        "Imgs/slide{k}.jpg",
        ("Maps1/slide{k}.png @0-5", "Maps2/slide{k}.png @2-7"),
        2,
    ),
    "names that change in the middle": (
        "IO STAR/image/STAR {k}_O{DS}C.jpg",
        ("IO STAR/mask_OD/STAR {k}_O{DS}C_OD.tif", "IO STAR/GT/GT_{k}.tif"),
        2,
    ),
    "masks in one folder": (
        "S_{kind}/10/S_{kind}_rgb_{k}.png",
        (
            "Scene_{kind}/10/Scene_{kind}_L2R_cl_{k}.tif",
            "Scene_{kind}/10/Scene_{kind}_L2R_cf_{k}.tif",
        ),
        2,
    ),
    "folders of unequal depth": (
        "S-SEG/{deep}/Frame/case{kind}/{k}.jpg",
        ("S-SEG/{deep}/GT/case{kind}/{k}.png", "S-SEG/{deep}/Polygon/case{kind}/{k}.png"),
        2,
    ),
    "images split, masks together": (
        "images/{split}_set/r{k}.png",
        ("segmentations/r{k}-1-first-T.png", "segmentations/r{k}-1-second-T.png"),
        2,
    ),
    "quotes and brackets": (
        'pic "a" [1]/{k}.png',
        ('truth "a" [1]/{k}.png', 'truth "b" [1]/{k}.png'),
        2,
    ),
    "a backslash": ("images/{k}.png", ("seg \\one/{k}.png", "seg \\two/{k}.png"), 2),
    "all for validation": ("val/images/{k}.png", ("val/gt_a/{k}.png", "val/gt_b/{k}.png"), 2),
    "a line break": ("images/{k}.png", ("seg\na/{k}.png", "seg\nb/{k}.png"), 0),
    "an ending that others have too": ("d/a{k}.jpg", ("d/a{k}_mask.png", "d/a{k}_cut_mask.png"), 2),
    "copies of some masks": ("images/{k}.png", ("seg/{k}.png", "seg/{k} - Copy.png @0-2"), 2),
    "a mask alone": ("images/{k}.png @0-6", ("mask_a/{k}.png @0-6", "mask_b/{k}.png"), 1),
}


def write_layout(root: Path, image: str, masks: tuple[str, ...]) -> None:
    for k in range(8):
        pixels, label = yard(k)
        texts = {
            "k": k + 10,
            "kind": k % 2 + 3,
            "DS": "DS"[k % 2],
            "deep": "Train" if k < 5 else "TestEasy/Seen",
            "split": "training" if k < 5 else "test",
        }
        for n, text in enumerate((image, *masks)):
            name, _, numbers = text.partition(" @")
            first, last = map(int, numbers.split("-")) if numbers else (0, 7)
            if first <= k <= last:
                # No set of masks follows from another one.
                mask = ((label + n) % 3 == 1).astype(np.uint8) * 255 if n else pixels
                save(root / name.format(**texts), mask)


def ask(root: Path) -> tuple[str, list[str]]:
    """Return what useg says about a folder, and the contents of a dataset.toml that it offers."""
    try:
        dataset = assign_splits(find_dataset(root))
        for pair in dataset.pairs:
            read_label(pair, dataset)
    except UsageError as error:
        offered = re.search(r"To choose, write [^\n]*:\n(.*)", str(error), re.DOTALL)
        return str(error), re.split(r"^or$\n", offered[1], flags=re.M) if offered else []
    return "", []


@pytest.mark.parametrize("name", LAYOUTS)
def test_offered_lines_of_a_dataset_toml_work(tmp_path: Path, name: str) -> None:
    image, masks, least = LAYOUTS[name]
    write_layout(tmp_path, image, masks)
    said, offers = ask(tmp_path)
    assert "unclear which of them is the ground truth" in said
    assert len(offers) >= least
    for offer in offers:
        (tmp_path / "dataset.toml").write_text(offer, "utf-8")
        assert tomllib.loads(offer)["images"]
        further, questions = ask(tmp_path)
        assert not further or questions, offer


@pytest.mark.parametrize("name", ["fly_{n}_{k}", "{n}/{k}", "sample{k}_{n}"])
def test_numbers_that_tell_images_from_masks_are_offered(tmp_path: Path, name: str) -> None:
    """AirSim: 0 is the scene, and 5 the segmentation."""
    for k in range(5):
        image, label = yard(k)
        save(tmp_path / f"{name.format(n=0, k=k + 10)}.png", image)
        save(tmp_path / f"{name.format(n=5, k=k + 10)}.png", label)
    said, offers = ask(tmp_path)
    assert "one number: those with 0 look like images, and those with 5 like masks" in said
    (tmp_path / "dataset.toml").write_text(offers[0])
    assert ask(tmp_path) == ("", [])


def test_changes_between_two_images_are_offered_beside_the_classes_of_each(tmp_path: Path) -> None:
    for k in range(8):
        place = ("train", "val")[k > 5]
        for date in (1, 2):
            image, label = yard(k + 20 * date)
            save(tmp_path / f"{place}/Image{date}/{k}.png", image)
            save(tmp_path / f"{place}/label{date}/{k}.png", (label == date).astype(np.uint8) * 255)
        changed = (yard(k + 20)[1] == 3).astype(np.uint8) * 255
        save(tmp_path / f"{place}/label/{k}.png", changed)
    said, offers = ask(tmp_path)
    assert "If masks show what has changed between two images, join the bands" in said
    assert sorted(offer.rstrip() for offer in offers) == [
        'images = "*/Image*/*.png"\nmasks = "*/label[12]/*.png"',
        'images = "*/Image1/*.png"\nmasks = "*/label/*.png"',
        'images = "*/Image2/*.png"\nmasks = "*/label/*.png"',
    ]
    for offer in offers:
        (tmp_path / "dataset.toml").write_text(offer, "utf-8")
        assert ask(tmp_path) == ("", [])


def test_channels_whose_names_end_with_anything_are_offered(tmp_path: Path) -> None:
    """BBBC006: ``a01_s1_w1`` and a random text."""
    rng = np.random.default_rng(0)
    for k in range(8):
        image, label = yard(k)
        for channel in (1, 2):
            name = f"stacks_{'ab'[k % 2]}{k:02}_s1_w{channel}{rng.integers(1 << 40):010x}.tif"
            save(tmp_path / "images_z_16" / name, image[..., channel])
        save(tmp_path / "labels" / f"stacks_{'ab'[k % 2]}{k:02}_s1.png", label)
    said, offers = ask(tmp_path)
    assert "2 sets of images for the same masks" in said
    assert len(offers) == 2
    for offer in offers:
        (tmp_path / "dataset.toml").write_text(offer, "utf-8")
        assert ask(tmp_path) == ("", [])
        pairs = find_dataset(tmp_path).pairs
        assert len(pairs) == 8
        assert all(pair.image.name.startswith(pair.mask.stem) for pair in pairs)
