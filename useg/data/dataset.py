"""A pair of image and truth -> a sample: what a data set is once its layout is known, and the only readers of its pairs."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import ClassTable, Color, Label, to_label
from useg.data.annotations.rasterize import Drawing, draw_shapes
from useg.errors import DataError
from useg.files import replacing
from useg.images.files import Image, Sample, read_colors, read_image, read_mask, read_size
from useg.images.limits import check_declared_size, clear_errors, pixel_limit


@dataclass(frozen=True)
class Instances:
    """Masks of single things, one file each: a pixel is foreground where any of them is not 0."""

    masks: tuple[Path, ...]


@dataclass(frozen=True)
class Pair:
    """An image and its truth.

    Args:
        image: its file.
        mask: the file that the truth comes from (for :class:`Instances` their folder); the one to name in messages.
        split: ``train``, ``val``, ``test``, ``gap`` (in none of them) or ``""`` (not decided yet).
        page: which page of a stack, from 0, in image and mask; None for files of one picture.
        truth: what there is instead of a mask picture; None where ``mask`` is one.
    """

    image: Path
    mask: Path
    split: str = ""
    page: int | None = None
    truth: Drawing | Instances | None = None


@dataclass(frozen=True)
class DetectedLayout:
    """What a recogniser saw in a folder; fields as in :class:`Dataset`. ``classes`` is None where only a look at the masks can tell."""

    layout: str
    pairs: tuple[Pair, ...]
    images: tuple[Path, ...] = ()
    masks: tuple[Path, ...] = ()
    classes: ClassTable | None = None
    recolored: tuple[tuple[Color, int], ...] = ()


@dataclass(frozen=True)
class Dataset:
    """What :func:`useg.data.layouts.find_dataset` found.

    Args:
        root: the folder.
        layout: its name, such as ``carla``, ``folders``, ``coco`` or ``dataset.toml``.
        pairs: in natural order.
        classes: how masks become labels.
        splits_by: how the splits came about, in words; empty before they are decided.
        images: images without a mask; empty unless ``find(..., strict=False)``.
        masks: masks without an image; likewise.
        recolored: ``(colour, value)``: masks may store these colours in place of the values that ``classes`` has; several may share a value.
    """

    root: Path
    layout: str
    pairs: tuple[Pair, ...]
    classes: ClassTable
    splits_by: str = ""
    images: tuple[Path, ...] = ()
    masks: tuple[Path, ...] = ()
    recolored: tuple[tuple[Color, int], ...] = ()

    def of(self, split: str) -> tuple[Pair, ...]:
        """Return the pairs of one split, in order."""
        return tuple(pair for pair in self.pairs if pair.split == split)


def pair_name(pair: Pair, root: Path | None = None) -> str:
    """Return what a pair is called, no two of a data set alike: its image's path below ``root``, and the page of a stack as in ``a.tif#3``.

    Without ``root`` (or for an image elsewhere) the path is given as it is.
    """
    path = (
        pair.image.relative_to(root)
        if root is not None and pair.image.is_relative_to(root)
        else pair.image
    )
    return path.as_posix() + ("" if pair.page is None else f"#{pair.page}")


def read_pair_size(pair: Pair) -> tuple[int, int]:
    """Return the image's ``(width, height)``, from its header alone.

    Raises:
        DataError: the image cannot be read.
    """
    return read_size(pair.image, pair.page)


def pick_evenly(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """Choose ``most`` of the pairs, evenly spread; all of them, where there are no more."""
    number = min(len(pairs), most)
    return [pairs[(2 * k + 1) * len(pairs) // (2 * number)] for k in range(number)]


def read_pair_image(pair: Pair) -> Image:
    """Read a pair's image: ``(H, W, C)`` uint8, uint16 or float32.

    Raises:
        DataError: the image cannot be read.
    """
    return read_image(pair.image, page=pair.page)


def read_label(pair: Pair, dataset: Dataset) -> Label:
    """Read a pair's truth as a label map ``(H, W)`` uint8: class ids, 255 where ignored.

    An RGB mask whose green and blue are 0 everywhere holds ids in its red channel, as CARLA writes them.

    Raises:
        DataError: an unreadable file, a value, colour or class name outside the class table, colours where ids are expected.
    """
    name = f"mask '{pair.mask}'"
    if isinstance(pair.truth, Drawing):
        size = pair.truth.size or read_pair_size(pair)
        with clear_errors(str(pair.mask)):
            check_declared_size(*size, 1, pixel_limit(None))
        return draw_shapes(pair.truth, size, dataset.classes, f"'{pair.mask}' ({pair.image.name})")
    if isinstance(pair.truth, Instances):
        return to_label(_union(pair.truth, pair), dataset.classes, name)
    if dataset.classes.by_color:
        return to_label(read_colors(pair.mask, page=pair.page), dataset.classes, name)
    mask = read_mask(pair.mask, page=pair.page)
    if mask.ndim == 3 and dataset.recolored:
        mask = _values_of(mask, dataset, name)
    if mask.ndim == 3:
        if mask[..., 1:].any():
            raise DataError(
                f"{name} holds colours, but the class table ({len(dataset.classes)} classes) expects ids; "
                f"list the classes' colours in classes.toml with by_color = true"
            )
        mask = mask[..., 0]
    return to_label(mask, dataset.classes, name)


def _union(instances: Instances, pair: Pair) -> NDArray[np.uint8]:
    """Join the masks of single things: ``(H, W)``, 1 where any of them is not 0."""
    width, height = read_pair_size(pair)
    union = np.zeros((height, width), np.uint8)
    for path in instances.masks:
        mask = read_mask(path)
        if mask.shape[:2] != union.shape:
            raise DataError(
                f"mask '{path}' is {mask.shape[1]}x{mask.shape[0]} pixels, but its image '{pair.image}' is {width}x{height}; "
                f"they must have one size: check that they belong together, or resize the mask (nearest neighbour)"
            )
        union |= mask.any(axis=2) if mask.ndim == 3 else mask != 0
    return union


def _values_of(mask: NDArray[Any], dataset: Dataset, name: str) -> NDArray[Any]:
    """Turn colours ``(H, W, 3)`` into the values ``(H, W)`` that they stand for."""
    table = ClassTable(
        tuple(str(value) for _, value in dataset.recolored),
        tuple(color for color, _ in dataset.recolored),
        by_color=True,
    )
    return np.array([value for _, value in dataset.recolored], np.uint8)[
        to_label(mask, table, name)
    ]


def read_sample(pair: Pair, dataset: Dataset) -> Sample:
    """Read a pair: image ``(H, W, C)`` and label ``(H, W)`` of one size.

    Raises:
        DataError: as :func:`read_label`; also when image and mask differ in size.
    """
    image, label = read_pair_image(pair), read_label(pair, dataset)
    if image.shape[:2] != label.shape:
        raise DataError(
            f"image '{pair.image}' is {image.shape[1]}x{image.shape[0]} pixels, but its mask '{pair.mask}' is {label.shape[1]}x{label.shape[0]}; "
            f"they must have one size: check that they belong together, or resize the mask (nearest neighbour)"
        )
    return Sample(image, label)


SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


SPLITS = ("train", "val", "test", "gap")


def read_split_csv(path: Path, dataset: Dataset) -> Dataset:
    """Give the pairs the splits of a CSV file with the columns ``image`` (path below the root, name or stem) and ``split``.

    Raises:
        DataError: no such file or columns, an unknown split, or an image that is not there, named twice, not clear, or not named.
    """
    names = _pairs_by_name(dataset)
    splits: dict[Pair, str] = {}
    for name, split in _split_rows(path):
        found = names.get(name, set())
        if len(found) != 1:
            say = (
                "more than one image has this name: give its path below the data folder"
                if found
                else "there is no such image with a mask"
            )
            raise DataError(f"'{path}' names '{name}', but {say}")
        if splits.setdefault(next(iter(found)), split) != split:
            raise DataError(f"'{path}' puts '{name}' into two splits; keep one")
    missing = [pair for pair in dataset.pairs if pair not in splits]
    if missing:
        raise DataError(
            f"'{path}' does not name {len(missing)} of {len(dataset.pairs)} images, such as '{missing[0].image}'; add them (gap leaves one out)"
        )
    return replace(
        dataset,
        pairs=tuple(replace(pair, split=splits[pair]) for pair in dataset.pairs),
        splits_by=path.name,
    )


def restore_splits(path: Path, dataset: Dataset, splits_by: str) -> Dataset | None:
    """Give the pairs the splits that a run had, though images may have come or gone since: what it has trained on is never held out now.

    Args:
        path: the CSV file that :func:`write_split_csv` wrote then.
        dataset: as :func:`useg.data.layouts.find_dataset` returns it now.
        splits_by: how the splits came about then, in words.

    Returns:
        The data set; images that came later are in ``gap``, or in ``test`` where their folder says so. None if it has no image of then.

    Raises:
        DataError: no such file or columns, or an unknown split.
    """
    names = _pairs_by_name(dataset)
    splits = {pair: split for name, split in _split_rows(path) for pair in names.get(name, ())}
    if not splits:
        return None
    later = len(dataset.pairs) - len(splits)
    pairs = tuple(
        replace(pair, split=splits.get(pair, "test" if pair.split == "test" else "gap"))
        for pair in dataset.pairs
    )
    return replace(
        dataset,
        pairs=pairs,
        splits_by=f"{splits_by}; {later} images came after training" if later else splits_by,
    )


def _split_rows(path: Path) -> list[tuple[str, str]]:
    """Return a CSV file's images with their splits."""
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig")), restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"'{path}' cannot be read ({error}); it needs the columns image,split"
        ) from error
    if not rows or not {"image", "split"} <= rows[0].keys():
        raise DataError(
            f"'{path}' needs a first line with the columns image,split and one line per image; it has {', '.join(rows[0]) if rows else 'none'}"
        )
    named = [(row["image"], SPLIT_FOLDERS.get(row["split"], row["split"])) for row in rows]
    for name, split in named:
        if split not in SPLITS:
            raise DataError(
                f"'{path}' puts '{name}' into the split {split!r}; known are {', '.join(SPLITS)}"
            )
    return named


def _pairs_by_name(dataset: Dataset) -> dict[str, set[Pair]]:
    """Return the pairs by all that an image may be called: its path below the root, its name, with and without suffix."""
    names: dict[str, set[Pair]] = defaultdict(set)
    for pair in dataset.pairs:
        inside, page = (
            pair_name(replace(pair, page=None), dataset.root),
            "" if pair.page is None else f"#{pair.page}",
        )
        for name in (inside, inside.rpartition(".")[0], pair.image.name, pair.image.stem):
            names[name + page].add(pair)
    return names


def write_split_csv(path: Path, dataset: Dataset) -> None:
    """Write every image's split as CSV (``image,split``); :func:`read_split_csv` gives the same splits back.

    Raises:
        DataError: the file cannot be written.
    """
    target = io.StringIO()
    rows = csv.writer(target, lineterminator="\n")
    rows.writerow(("image", "split"))
    rows.writerows((pair_name(pair, dataset.root), pair.split) for pair in dataset.pairs)
    with replacing(path) as temporary:
        temporary.write_text(target.getvalue(), "utf-8")
