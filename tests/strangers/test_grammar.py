"""Folders made by a grammar of layouts are read as they were meant, or refused in a sentence.

A folder is a choice of names, affixes, folders, splits, encodings and side files. 25 of them are
made here; ``USEG_SOAK=1`` makes 500.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from made_strangers import COLORS, save, yard

from useg.data.dataset import Dataset, Instances, Pair, read_label
from useg.data.layouts import find_dataset
from useg.errors import DataError

NUM_SETS = 500 if os.environ.get("USEG_SOAK") else 25

# Names of the things: the same word, numbered or not, in the ways that cameras and people have.
CORES = {
    "numbers": lambda k, rng: f"{k + 1}",
    "padded": lambda k, rng: f"{k * 7:05}",
    "camera": lambda k, rng: f"IMG_{2040 + k}",
    "brackets": lambda k, rng: f"scan ({k + 1})",
    "grid": lambda k, rng: f"tile_{k // 3}_{k % 3}",
    "hash": lambda k, rng: f"{rng.getrandbits(40):010x}",
    "date": lambda k, rng: f"2021-0{1 + k % 9}-1{k % 7}T{k:02}",
    "words": lambda k, rng: ["ash", "beech", "cedar", "elm", "fir", "oak", "pine", "yew"][k],
    "place": lambda k, rng: f"M-33-20-D-c-4-2_{k}",
    "dots": lambda k, rng: f"site.{k // 4}.view{k % 4}",
}

# (image folder, mask folder); in the last ones no word says which is which.
FOLDERS = [
    *(("images", "masks"), ("Images", "Labels"), ("img", "ann"), ("imgs", "gt"), ("rgb", "seg")),
    *(("input", "target"), ("photos", "truth"), ("JPEGImages", "SegmentationClass")),
    *(("images", "v1.2/labels"), ("images/10k", "labels/sem_seg/ids"), ("images_png", "masks_png")),
    *(("img_dir", "ann_dir"), ("Original", "Ground Truth"), ("images", "1st_manual")),
    *(("pre", "post"), ("a", "b"), ("X", "Y"), ("source", "reference"), ("data", "expert")),
]
# (around the image's name, around the mask's name)
AFFIXES = [
    *(
        (("", ""), ("", "")),
        (("", ""), ("", "_mask")),
        (("", ""), ("", "_P")),
        (("", ""), ("", "_m")),
    ),
    *((("", ""), ("", "_anno")), (("", ""), ("", "_fixedmask")), (("", ""), ("", "_train_id"))),
    *((("", "_0000"), ("", "")), (("img(", ")"), ("target(", ")")), (("", "_sat"), ("", "_mask"))),
    *((("", ""), ("", "-labels")), (("im_", ""), ("lab_", "")), (("", "_rgb"), ("", "_seg_v2"))),
    *((("", "_training"), ("", "_manual1")), (("", ""), ("mask_of_", "")), (("", ""), ("", ".x"))),
]
SPLITS = [
    *(("train", "val", "test"), ("Train", "Valid", "TEST"), ("training", "validation", "testing")),
    *(("train2017", "val2017", "test2017"), ("trainval", "val", "test"), ("tr", "va", "ts")),
]
# What makes a folder unlike its neighbours.
TWISTS = [
    *("same names in groups", "flat masks", "joined groups", "other order", "mixed suffixes"),
    *("an image alone", "a mask alone", "second masks", "folder per image", "figures", "few"),
    *("overlays", "predictions", "large suffix"),
]
JUNK = (".DS_Store", "Thumbs.db", "__MACOSX/._1.png", "README.md", "metadata.csv", "._1.jpg")


@dataclass
class Made:
    """A folder that was made: the masks and the split of each image, and the true label maps."""

    root: Path
    recipe: dict[str, object]
    masks: dict[Path, set[Path]] = field(default_factory=dict)
    splits: dict[Path, str] = field(default_factory=dict)
    labels: dict[Path, np.ndarray] = field(default_factory=dict)
    may_refuse: bool = False
    alone: Path | None = None


def make(root: Path, seed: int) -> Made:
    """Make the folder of a seed."""
    rng = random.Random(seed)
    recipe: dict[str, object] = {
        "core": rng.choice(list(CORES)),
        "folders": rng.choice(FOLDERS),
        "affixes": rng.choice(AFFIXES),
        "place": rng.choice(["two folders"] * 3 + ["one folder"]),
        "split": rng.choice(["", "around", "inside", "compound", "list", "unlabelled test"]),
        "splits": rng.choice(SPLITS[:4]),
        "group": rng.choice(["", "", "around", "inside"]),
        "depth": rng.choice(["", "", "my set", "data/v2"]),
        "image suffix": rng.choice([".jpg", ".jpg", ".png", ".tif"]),
        "mask suffix": rng.choice([".png", ".png", ".tif", ".bmp"]),
        "whole name": rng.random() < 0.1,
        "unpadded": rng.random() < 0.15,
        "capitals": rng.random() < 0.1,
        "encoding": rng.choice(["ids", "ids", "binary", "colors", "palette", "grey rgb"]),
        "beside": rng.choice(["", "", "", "colors", "view", "scribbles", "objects", "small"]),
        "twist": rng.choice([""] * 6 + TWISTS),
    }
    if recipe["place"] == "one folder" and recipe["affixes"][0] == recipe["affixes"][1]:
        recipe["image suffix"], recipe["mask suffix"] = ".jpg", ".png"
        recipe["unpadded"] = recipe["capitals"] = False
    made = Made(root, recipe)
    twist = recipe["twist"]
    if twist in ("same names in groups", "flat masks", "joined groups"):
        recipe |= {"group": "inside", "split": "", "beside": "", "place": "two folders"}
    if twist == "other order":
        recipe |= {"place": "two folders", "split": "around", "beside": ""}
    if twist == "second masks":
        recipe |= {"encoding": "binary", "beside": "", "whole name": False}
    if twist == "mixed suffixes":
        recipe |= {"place": "two folders"}
    if twist == "few":
        recipe |= {"split": ""}
    if twist == "folder per image":
        recipe |= {"split": "", "beside": "", "group": "", "place": "one folder"}
    count = rng.randrange(2, 4) if twist == "few" else rng.randrange(6, 9)
    cores = list(dict.fromkeys(CORES[str(recipe["core"])](k, rng) for k in range(count)))
    for k, core in enumerate(cores):
        _make_pair(made, recipe, k, core, seed)
    _make_side_files(made, recipe, rng)
    _add_strays(made, recipe)
    return made


def _add_strays(made: Made, recipe: dict[str, object]) -> None:
    image = min(made.masks)
    (mask,) = made.masks[image]
    if recipe["twist"] in ("an image alone", "a mask alone"):
        gone = image if recipe["twist"] == "a mask alone" else mask
        gone.unlink()
        del made.masks[image]
        made.alone = mask if gone == image else image
    if recipe["twist"] == "figures":
        save(made.root / "docs" / "figure_1.png", yard(1)[0])
        save(made.root / "docs" / "overview.jpg", yard(2)[0])


def _make_pair(made: Made, recipe: dict[str, object], k: int, core: str, seed: int) -> None:
    split = ("train", "train", "train", "val", "test")[k % 5]
    image, mask = _paths(recipe, k, core, split)
    pixels, label = yard(1000 * seed + k)
    if recipe["encoding"] == "binary":
        label = (label == 3).astype(np.uint8)
    made.splits[made.root / image] = split if recipe["split"] else ""
    save(made.root / image, pixels)
    if recipe["split"] == "unlabelled test" and split == "test":
        del made.splits[made.root / image]
        return
    made.masks[made.root / image] = {made.root / mask}
    if recipe["twist"] == "second masks" and k in (1, 3):
        second = mask.with_name(f"{mask.stem}_{k}{mask.suffix}")
        half = np.arange(label.shape[1]) < label.shape[1] // 2
        _write_mask(made.root / second, label * half, "binary")
        _write_mask(made.root / mask, label * ~half, "binary")
        made.masks[made.root / image].add(made.root / second)
    else:
        _write_mask(made.root / mask, label, str(recipe["encoding"]))
    made.labels[made.root / image] = label
    _write_beside(made, recipe, mask, label, k)


def _paths(recipe: dict[str, object], k: int, core: str, split: str) -> tuple[Path, Path]:
    """The image and the mask of a core, below the root."""
    splits, folders = recipe["splits"], recipe["folders"]
    names = dict(zip(("train", "val", "test"), splits, strict=True))  # type: ignore[call-overload]
    found = []
    for which in (0, 1):
        in_two = recipe["place"] == "two folders"
        folder = folders[which] if in_two else ""  # type: ignore[index]
        before, after = recipe["affixes"][which]  # type: ignore[index]
        text = core
        if which and recipe["unpadded"] and core.isdecimal():
            text = str(int(core))
        stem = before + text + after
        if which and recipe["capitals"]:
            stem = stem.upper()
        suffix = str(recipe["mask suffix"] if which else recipe["image suffix"])
        if which and recipe["whole name"]:
            stem += str(recipe["image suffix"])
        group = f"P{k % 2 + 1}" if recipe["group"] else ""
        twist = recipe["twist"]
        if twist == "same names in groups":
            stem = before + f"{k // 2}" + after
        elif twist == "flat masks" and which:
            group = ""
        elif twist == "joined groups" and which:
            stem, group = f"{group}_{stem}", ""
        elif twist == "folder per image":
            group, stem = core, ("picture", "the_truth")[which]
            suffix = ".png"
        elif twist == "mixed suffixes" and not which:
            suffix = (".jpg", ".png", ".tif")[k % 3]
        elif twist == "large suffix":
            suffix = suffix.upper() if suffix != ".tif" else suffix
        parts = [str(recipe["depth"])]
        if recipe["group"] == "around":
            parts.append(group)
        how = recipe["split"]
        if twist == "other order" and which:
            parts += [folder, names[split]]
        elif how in ("around", "unlabelled test"):
            parts += [names[split], folder]
        elif how == "inside":
            parts += [folder, names[split]]
        elif how == "compound" and folder:
            parts.append(f"{folder}_{names[split]}")
        elif how == "compound":
            parts.append(names[split])
        else:
            parts.append(folder)
        if recipe["group"] == "inside" or twist == "folder per image":
            parts.append(group)
        found.append(Path(*filter(None, parts), stem + suffix))
    return found[0], found[1]


def _write_mask(path: Path, label: np.ndarray, encoding: str) -> None:
    if encoding == "binary":
        save(path, label * 255)
    elif encoding == "colors":
        save(path, COLORS[label])
    elif encoding == "grey rgb":
        save(path, np.repeat(label[..., None], 3, axis=2))
    elif encoding == "palette" and path.suffix in (".png", ".bmp"):
        picture = PIL.Image.fromarray(label)
        picture.putpalette(COLORS.ravel().tolist())
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    else:
        save(path, label)


def _write_beside(
    made: Made, recipe: dict[str, object], mask: Path, label: np.ndarray, k: int
) -> None:
    """Write what could be taken for the masks: the same in colours, a field of view, scribbles."""
    beside = str(recipe["beside"])
    if recipe["twist"] in ("overlays", "predictions"):
        folder = made.root / str(recipe["depth"]) / str(recipe["twist"])
        pixels = COLORS[label] // 2 + yard(k)[0] // 2 if recipe["twist"] == "overlays" else label
        save(folder / f"{mask.stem}.png", np.roll(pixels, 3, axis=1))
        made.may_refuse = True
    if beside in ("", "small"):
        return
    if recipe["place"] == "two folders":
        parts = list(mask.parts)
        old = str(recipe["folders"][1]).split("/")[-1]  # type: ignore[index]
        parts = [
            part.replace(old, f"{old} {beside}") if old in part else part for part in parts[:-1]
        ]
        path = Path(*parts, mask.name)
    else:
        path = mask.with_name(f"{mask.stem}_{beside}.png")
    if path == mask:
        return
    if beside == "colors":
        pixels = COLORS[::-1][label]
    elif beside == "view":
        y, x = np.mgrid[: label.shape[0], : label.shape[1]]
        pixels = (((y - 16) ** 2 / 240 + (x - 24) ** 2 / 500) < 1).astype(np.uint8) * 255
    elif beside == "scribbles":
        pixels = np.zeros_like(label)
        pixels[4::9, 5:40] = label[4::9, 5:40]
    else:
        pixels = label.copy().astype(np.uint8)
        pixels[:, 24:] += 10 * (label[:, 24:] > 0).astype(np.uint8)
    save(made.root / path.with_suffix(".png"), pixels)
    # Objects, or scribbles of two values, may be classes as well.
    made.may_refuse = True


def _make_side_files(made: Made, recipe: dict[str, object], rng: random.Random) -> None:
    for name in rng.sample(JUNK, 2):
        folder = rng.choice(sorted({made.root, *(path.parent for path in made.masks)}))
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\0\0\1Bud1")
    images = sorted(made.splits)
    if recipe["split"] == "list":
        for split in ("train", "val", "test"):
            lines = [path.stem for path in images if made.splits[path] == split]
            (made.root / f"{split}.txt").write_text("\n".join(lines))
    if recipe["beside"] == "small":
        for path in images:
            picture = np.asarray(PIL.Image.open(path))[::2, ::2] if path.suffix != ".tif" else None
            if picture is not None:
                save(made.root / "thumbnails" / f"{path.stem}.png", picture)
        made.may_refuse = True


def explain(made: Made, dataset: Dataset) -> str:
    """Return how a data set differs from what was made, or ``""``."""
    found = {pair.image: _masks_of(pair) for pair in dataset.pairs}
    if found != made.masks:
        missing, extra = made.masks.keys() - found.keys(), found.keys() - made.masks.keys()
        wrong = [
            image for image in made.masks if image in found and found[image] != made.masks[image]
        ]
        return f"missing {sorted(missing)[:1]}, extra {sorted(extra)[:1]}, wrong masks {wrong[:1]}"
    splits = {pair.image: pair.split for pair in dataset.pairs}
    if splits != {image: made.splits[image] for image in splits}:
        return f"splits {sorted(set(splits.values()))}"
    for pair in dataset.pairs[:2]:
        label = read_label(pair, dataset)
        both = np.unique(np.stack([label.ravel(), made.labels[pair.image].ravel()]), axis=1)
        if not both.shape[1] == len(np.unique(label)) == len(np.unique(made.labels[pair.image])):
            return f"classes {dataset.classes.names}"
    return ""


def _masks_of(pair: Pair) -> set[Path]:
    return set(pair.truth.masks) if isinstance(pair.truth, Instances) else {pair.mask}


@pytest.mark.parametrize("seed", range(NUM_SETS))
def test_a_folder_of_the_grammar_is_read_as_meant_or_refused(tmp_path: Path, seed: int) -> None:
    made = make(tmp_path, seed)
    assert judge(made) in ("", "refused"), made.recipe


def judge(made: Made) -> str:
    """Return how a folder is read wrong, ``""`` if it is read right, or ``refused``."""
    try:
        dataset = find_dataset(made.root)
    except DataError as error:
        is_named = made.alone is not None and str(made.alone) in str(error)
        is_right = (made.may_refuse or is_named) and len(str(error)) > 40
        return "refused" if is_right else f"refused without need: {error}"
    is_said = any("left for prediction" in note for note in dataset.notes)
    if made.alone is not None and not is_said:
        return f"{made.alone} is left out without a word"
    return explain(made, dataset)
