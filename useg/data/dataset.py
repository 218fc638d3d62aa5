"""Pairs of images and masks -> samples: what a data set is, and the only readers of its pairs.

A pair's truth is a mask picture, shapes from an annotation file, or one mask per object. Reading it
gives a label map in every case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Color, Label, pack_colors, to_label
from useg.data.annotations.rasterize import draw_shapes, number_shapes
from useg.data.annotations.shapes import BACKGROUND, Drawing
from useg.data.class_mapping import ClassMapping
from useg.errors import DataError
from useg.images.formats import ALL_PAGES, check_declared_size, clear_errors, pixel_limit
from useg.images.image_files import (
    Image,
    Sample,
    read_colors,
    read_image_and_missing,
    read_mask,
    read_mask_and_alpha,
    read_size,
    resize_label,
)
from useg.scoring.metrics import regions

Picked = TypeVar("Picked")


# Folders of these names are official splits.
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training", "trainval", "train_val"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    # German, French, Spanish, Portuguese and Italian.
    **dict.fromkeys(("entrainement", "entraînement", "entrenamiento", "addestramento"), "train"),
    **dict.fromkeys(("treinamento", "treino"), "train"),
    **dict.fromkeys(("validierung", "validación", "validacion", "validazione"), "val"),
    **dict.fromkeys(("validação", "validacao"), "val"),
}

# With this many shapes in an image, on average, the shapes of a class are objects.
MIN_DRAWN_OBJECTS = 4

# Pairs in the split gap are used for nothing.
SPLITS = ("train", "val", "test", "gap")

# (H, W): the codes of a mask. A code is a value, or a colour: ``COLOR_FLAG | 0xRRGGBB``.
CodeMap = NDArray[Any]

# Codes from here on are colours; those below are values.
COLOR_FLAG = 1 << 24

# Stored values that mean no data are negative.
_NO_DATA = -1

_SAME_SIZE = (
    "they must have the same size; check that they belong together, or resize the mask "
    "(nearest neighbour)"
)


# What to do with images without a mask.
MISSING_ADVICE = (
    'if these images show only background, set missing = "background" in dataset.toml, or missing '
    '= "skip" to leave them out'
)


@dataclass(frozen=True)
class Instances:
    """One mask per object: a pixel is foreground if it is not 0 in any of them."""

    masks: tuple[Path, ...]


@dataclass(frozen=True)
class ClassMasks:
    """One mask per class: a pixel has the last class whose mask is not 0 there.

    ``masks`` has (class name, mask file); where all are 0 is the first class of the data set.
    Without any mask, the image is background.
    """

    masks: tuple[tuple[str, Path], ...]


@dataclass(frozen=True)
class Pair:
    """An image and its truth.

    Args:
        image: The image file.
        mask: The file that the truth comes from (for :class:`Instances` their folder), which
            messages name.
        split: ``train``, ``val``, ``test``, ``gap`` (in none of them) or ``""`` (not decided yet).
        page: The page of a TIFF stack, from 0, in image and mask; None for files of one page;
            ALL_PAGES: the image's pages are its bands.
        truth: The truth if ``mask`` is not a mask picture, otherwise None.
        valid: A mask file whose zeros are ignored, such as outside a field of view; or None.
    """

    image: Path
    mask: Path
    split: str = ""
    page: int | None = None
    truth: Drawing | Instances | ClassMasks | None = None
    valid: Path | None = None

    @property
    def identity(self) -> tuple[Path, int | None]:
        """What identifies the pair: its image file, and the page in it."""
        return self.image, self.page


@dataclass(frozen=True)
class SkippedPart:
    """A file, or a part of it, that was not read, and why: a sentence with what to do."""

    file: Path
    reason: str


@dataclass(frozen=True)
class MaskEncoding:
    """How mask files hold their classes, beyond the class table.

    Args:
        objects: Every value or colour but 0 numbers one object: all of them are foreground.
        alpha: The classes are in the transparency; the colours are the same everywhere.
        scale: Width and height of images, as multiples of those of their masks.
        nodata: Values of 0 or more that mark pixels without data in the files.
        ignore_empty: An image without annotations is unfinished, not background: nothing in it
            counts.
    """

    objects: bool = False
    alpha: bool = False
    scale: int = 1
    nodata: tuple[int, ...] = ()
    ignore_empty: bool = False


@dataclass(frozen=True)
class DetectedLayout:
    """What a recognizer found in a folder; fields as in :class:`Dataset`.

    ``classes`` is None if the classes must be inferred from the masks. ``field_of_view`` is a glob
    of masks that show where the images are valid. ``unnamed`` are images beside annotated ones that
    have no annotation, which is usual in the layout.
    """

    layout: str
    pairs: tuple[Pair, ...]
    images: tuple[Path, ...] = ()
    masks: tuple[Path, ...] = ()
    classes: ClassTable | None = None
    recolored: tuple[tuple[Color, int], ...] = ()
    splits_by: str = ""
    notes: tuple[str, ...] = ()
    field_of_view: str = ""
    skipped: tuple[SkippedPart, ...] = ()
    unnamed: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """A data set, as :func:`useg.data.layouts.find_dataset` returns it.

    Args:
        root: The folder.
        layout: The layout's name, such as ``carla``, ``folders``, ``coco`` or ``dataset.toml``.
        pairs: The pairs in natural order.
        classes: The class table, by which masks become labels.
        splits_by: How the splits were made, in words; empty before they are decided.
        images: Images without a mask; empty unless ``find_dataset(..., strict=False)``.
        masks: Masks without an image; likewise.
        recolored: ``(colour, value)``: masks may store these colours instead of the values of
            ``classes``; several colours may share a value.
        notes: What was chosen among several possibilities, and what was left out, in sentences.
        mapping: How masks become labels if ``classes`` are those of a model and not of the data
            set; otherwise None.
        skipped: Annotation files and shapes that were not read.
        encoding: How the mask files hold the classes.
    """

    root: Path
    layout: str
    pairs: tuple[Pair, ...]
    classes: ClassTable
    splits_by: str = ""
    images: tuple[Path, ...] = ()
    masks: tuple[Path, ...] = ()
    recolored: tuple[tuple[Color, int], ...] = ()
    notes: tuple[str, ...] = ()
    mapping: ClassMapping | None = None
    skipped: tuple[SkippedPart, ...] = ()
    encoding: MaskEncoding = MaskEncoding()

    def of(self, split: str) -> tuple[Pair, ...]:
        """Return the pairs of one split, in order."""
        return tuple(pair for pair in self.pairs if pair.split == split)


def pair_name(pair: Pair, root: Path | None = None) -> str:
    """Return a pair's name, which is unique in its data set: ``images/a.png``, ``a.tif#3``.

    It is the image's path below ``root``, with the page of a stack. Without ``root``, or for an
    image elsewhere, it is the whole path.
    """
    is_inside = root is not None and pair.image.is_relative_to(root)
    path = pair.image.relative_to(root) if root is not None and is_inside else pair.image
    return path.as_posix() + ("" if pair.page in (None, ALL_PAGES) else f"#{pair.page}")


def read_pair_size(pair: Pair) -> tuple[int, int]:
    """Read the image's ``(width, height)`` from its header.

    Raises:
        DataError: The image cannot be read.
    """
    return read_size(pair.image, pair.page)


def pick_evenly(items: Sequence[Picked], max_count: int) -> list[Picked]:
    """Return at most ``max_count`` items, such as pairs, evenly spread over all."""
    count = min(len(items), max_count)
    return [items[(2 * k + 1) * len(items) // (2 * count)] for k in range(count)]


def read_pair_image(pair: Pair) -> Image:
    """Read a pair's image: ``(H, W, C)`` uint8, uint16 or float32; its mean where it has no data.

    Raises:
        DataError: The image cannot be read.
    """
    return read_image_and_missing(pair.image, pair.page)[0]


def read_label(pair: Pair, dataset: Dataset) -> Label:
    """Read a pair's truth as a label map ``(H, W)`` uint8: class ids, 255 where ignored.

    An RGB mask with two bands of 0 has its ids in the third, as CARLA's masks have in the red one.

    Raises:
        DataError: A file cannot be read; a value, colour or class name is not in the class table;
            or a mask has colours although the class table has ids.
    """
    label = _read_whole_label(pair, dataset)
    if dataset.encoding.ignore_empty and has_no_shapes(pair):
        label = np.full_like(label, IGNORE)
    if pair.valid is not None:
        label[~read_valid(pair, (label.shape[1], label.shape[0]))] = IGNORE
    return label


def has_no_shapes(pair: Pair) -> bool:
    """Whether the truth is drawn shapes, of which this pair has none."""
    return isinstance(pair.truth, Drawing) and not pair.truth.shapes


def read_valid(pair: Pair, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Read where a pair's labels count: ``(H, W)``, as its ``valid`` mask says.

    Raises:
        DataError: The file cannot be read, or has another size (width, height).
    """
    assert pair.valid is not None
    return _read_inside(pair.valid, pair, size)


def _read_inside(path: Path, pair: Pair, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Read where a mask is not 0: ``(H, W)``."""
    mask = read_mask(path)
    if mask.shape[1::-1] != size:
        raise DataError(
            f"mask '{path}' is {mask.shape[1]}x{mask.shape[0]} pixels, but its image "
            f"'{pair.image}' is {size[0]}x{size[1]}; {_SAME_SIZE}"
        )
    return np.asarray(mask.any(axis=2) if mask.ndim == 3 else mask != 0, np.bool_)


def _read_whole_label(pair: Pair, dataset: Dataset) -> Label:
    if dataset.mapping:
        stored = replace(dataset, classes=dataset.mapping.stored, mapping=None)
        return dataset.mapping.apply(read_label(pair, stored))
    name = f"mask '{pair.mask}'"
    if isinstance(pair.truth, Drawing):
        return _draw_label(pair, pair.truth, dataset)
    if isinstance(pair.truth, Instances):
        return to_label(_join_masks(pair.truth, pair), dataset.classes, name)
    if isinstance(pair.truth, ClassMasks):
        return _stack_classes(pair.truth, pair, dataset.classes)
    if dataset.classes.by_color:
        colors = read_colors(pair.mask, page=pair.page)
        label = to_label(colors, dataset.classes, name)
        is_empty = dataset.encoding.ignore_empty and not colors.any()
        return np.full_like(label, IGNORE) if is_empty else label
    mask = read_stored_mask(pair, dataset.encoding)
    if mask.ndim == 3 and dataset.recolored:
        mask = _colors_to_values(mask, dataset, name)
    if mask.ndim == 3:
        band = find_only_band(mask)
        if band is None:
            raise DataError(
                f"{name} has colours, but the {len(dataset.classes)} classes are defined by ids; "
                "list the classes' colours in classes.toml with by_color = true"
            )
        mask = mask[..., band]
    return to_label(mask, dataset.classes, name)


def _draw_label(pair: Pair, drawing: Drawing, dataset: Dataset) -> Label:
    """Draw the shapes of a pair, after a check that they belong to an image of its size."""
    size = read_pair_size(pair)
    if drawing.size not in (None, size):
        width, height = drawing.size or size
        raise DataError(
            f"image '{pair.image}' is {size[0]}x{size[1]} pixels, but its mask '{pair.mask}' is "
            f"{width}x{height}; {_SAME_SIZE}"
        )
    with clear_errors(str(pair.image)):
        check_declared_size(*size, 1, pixel_limit(None))
    return draw_shapes(drawing, size, dataset.classes, f"'{pair.mask}' ({pair.image.name})")


def find_only_band(mask: NDArray[Any]) -> int | None:
    """Return the band of an RGB mask ``(H, W, 3)`` that alone is not 0; None if there are more."""
    # Whole rows are joined first: single bands lie apart in memory, which is ten times as slow.
    used = np.flatnonzero(np.bitwise_or.reduce(mask, axis=0).any(axis=0))
    if len(used) > 1:
        return None
    return int(used[0]) if len(used) else 0


def to_codes(mask: NDArray[Any]) -> tuple[CodeMap, int | None]:
    """Turn what a mask stores into codes ``(H, W)``, and the only band of RGB that is not 0."""
    if mask.ndim == 2:
        return mask, None
    band = find_only_band(mask)
    if band is not None:
        return np.ascontiguousarray(mask[..., band]), band
    return pack_colors(mask) | COLOR_FLAG, None


def read_stored_mask(pair: Pair, encoding: MaskEncoding) -> NDArray[Any]:
    """Read what a mask file stores, as :func:`useg.images.image_files.read_mask` does.

    With ``encoding.alpha`` it is the transparency, and with ``encoding.objects`` every object
    becomes 1.

    Raises:
        DataError: The file cannot be read, or it has no transparency.
    """
    mask = _read_values(pair, encoding)
    if encoding.objects:
        mask = _number_objects(mask)
        mask = np.where(mask > 0, 1, mask).astype(np.int16)
    if encoding.ignore_empty and not mask.any():
        mask = np.full(mask.shape[:2], _NO_DATA, np.int16)
    return mask


def _read_values(pair: Pair, encoding: MaskEncoding) -> NDArray[Any]:
    if not encoding.alpha:
        return read_mask(pair.mask, page=pair.page)
    _, alpha = read_mask_and_alpha(pair.mask, page=pair.page)
    if alpha is None:
        raise DataError(
            f"mask '{pair.mask}' has no transparency, but the other masks store the classes in "
            "theirs; save it like the others, or set alpha = false in dataset.toml"
        )
    return alpha


def _number_objects(mask: NDArray[Any]) -> NDArray[Any]:
    """Return the number of the object at each pixel ``(H, W)``; a colour becomes one number."""
    return mask if mask.ndim == 2 else pack_colors(mask)


def read_objects(pair: Pair, dataset: Dataset) -> NDArray[np.int32]:
    """Read which object each pixel belongs to: ``(H, W)`` int32, numbers from 1, 0 for none.

    The masks number their objects (``dataset.encoding.objects``), or there is one mask for each
    (:class:`Instances`), or each drawn shape is one. In other data sets, they are the connected
    regions of the classes that ``classes.toml`` says consist of objects.

    Raises:
        DataError: The data set has no objects, or a file cannot be read.
    """
    if isinstance(pair.truth, Instances):
        return _stack_objects(pair.truth, pair)
    if isinstance(pair.truth, Drawing):
        numbers = number_shapes(pair.truth, read_pair_size(pair), f"'{pair.mask}'")
        return _keep_object_classes(numbers, pair, dataset)
    if not dataset.encoding.objects or pair.truth is not None:
        if dataset.classes.objects:
            connected = regions(read_label(pair, dataset)).astype(np.int32) + np.int32(1)
            return _keep_object_classes(connected, pair, dataset)
        raise DataError(
            f"mask '{pair.mask}' stores classes, not objects; set objects = true in dataset.toml "
            "if each of its values is an object, or in classes.toml for the classes whose "
            "connected regions are objects"
        )
    numbered = _number_objects(_read_values(pair, dataset.encoding))
    objects: NDArray[np.int32] = np.maximum(numbered, 0).astype(np.int32)
    connected = np.where(objects > 0, regions(objects) + 1, 0).astype(np.int32)
    owners = np.unique(np.stack([objects, connected])[:, objects > 0], axis=1)[0]
    num_regions = np.unique(owners, return_counts=True)[1]
    # If most values have several regions, they only distinguish neighbours.
    return connected if 2 * (num_regions > 1).sum() > len(num_regions) else objects


def _keep_object_classes(
    objects: NDArray[np.int32], pair: Pair, dataset: Dataset
) -> NDArray[np.int32]:
    kept = np.isin(read_label(pair, dataset), object_classes(dataset))
    return np.where(kept, objects, np.int32(0))


def object_classes(dataset: Dataset) -> tuple[int, ...]:
    """Return the classes whose objects the truth distinguishes.

    ``classes.toml`` decides. Otherwise they are all classes but the background, if the masks number
    objects or if there is one mask for each; and those of drawn shapes of which an image that has
    any has ``MIN_DRAWN_OBJECTS`` on average, because few shapes could be pieces of a road.
    """
    names = dataset.classes.names
    if dataset.classes.objects is not None:
        return dataset.classes.objects
    if dataset.encoding.objects or any(isinstance(p.truth, Instances) for p in dataset.pairs):
        return tuple(k for k, name in enumerate(names) if name != BACKGROUND)
    shapes: Counter[str] = Counter()
    images: Counter[str] = Counter()
    for pair in dataset.pairs:
        if isinstance(pair.truth, Drawing):
            drawn = Counter(shape.name for shape in pair.truth.shapes)
            shapes.update(drawn)
            images.update(drawn.keys())
    return tuple(
        k
        for k, name in enumerate(names)
        if name != BACKGROUND and shapes[name] >= MIN_DRAWN_OBJECTS * max(1, images[name])
    )


def _stack_objects(instances: Instances, pair: Pair) -> NDArray[np.int32]:
    width, height = read_pair_size(pair)
    objects = np.zeros((height, width), np.int32)
    for number, path in enumerate(instances.masks, 1):
        objects[_read_inside(path, pair, (width, height))] = number
    return objects


def _join_masks(instances: Instances, pair: Pair) -> NDArray[np.uint8]:
    """Join the masks of all objects: ``(H, W)``, 1 where any of them is not 0."""
    size = read_pair_size(pair)
    union = np.zeros(size[::-1], np.uint8)
    for path in instances.masks:
        union |= _read_inside(path, pair, size)
    return union


def _stack_classes(truth: ClassMasks, pair: Pair, classes: ClassTable) -> Label:
    """Join the masks of all classes to one label map."""
    size = read_pair_size(pair)
    background = 0 if truth.masks else find_background(classes)
    if background is None:
        raise DataError(
            'dataset.toml has missing = "background", but none of the classes '
            f"{', '.join(classes.names)} is the background; give it this name in classes.toml"
        )
    label = np.full(size[::-1], background, np.uint8)
    for name, path in truth.masks:
        # A class that does not count may be missing from the table.
        label[_read_inside(path, pair, size)] = (
            classes.names.index(name) if name in classes.names else IGNORE
        )
    return label


def find_background(classes: ClassTable) -> int | None:
    """Return the class called background, or else that of the value 0 or of black, if any."""
    if BACKGROUND in classes.names:
        return classes.names.index(BACKGROUND)
    return classes.stored.index(0) if 0 in classes.stored else None


def _colors_to_values(mask: NDArray[Any], dataset: Dataset, name: str) -> NDArray[Any]:
    """Replace colours ``(H, W, 3)`` by the values ``(H, W)`` that they stand for."""
    table = ClassTable(
        tuple(str(value) for _, value in dataset.recolored),
        tuple(color for color, _ in dataset.recolored),
        by_color=True,
    )
    values = np.array([value for _, value in dataset.recolored], np.uint8)
    return values[to_label(mask, table, name)]


def read_sample(pair: Pair, dataset: Dataset) -> Sample:
    """Read a pair.

    Returns:
        The image ``(H, W, C)`` uint8, uint16 or float32 as stored, and the label ``(H, W)`` uint8:
        class ids, and 255 where pixels are ignored or the image has no data.

    Raises:
        DataError: As :func:`read_label`; also if image and mask differ in size.
    """
    image, missing = read_image_and_missing(pair.image, pair.page)
    label = read_label(pair, dataset)
    size = image.shape[1], image.shape[0]
    if is_reduced((label.shape[1], label.shape[0]), size, dataset.encoding.scale):
        label = resize_label(label, size)
    if image.shape[:2] != label.shape:
        raise DataError(
            f"image '{pair.image}' is {image.shape[1]}x{image.shape[0]} pixels, but its mask "
            f"'{pair.mask}' is {label.shape[1]}x{label.shape[0]}; {_SAME_SIZE}"
        )
    if missing is not None:
        label = np.where(missing, np.uint8(IGNORE), label)
    return Sample(image, label, missing)


def is_reduced(mask: tuple[int, int], image: tuple[int, int], scale: int) -> bool:
    """Return whether a mask of this size is that of the image, ``scale`` (2 or more) times reduced.

    >>> is_reduced((50, 33), (101, 67), 2), is_reduced((50, 33), (50, 33), 1)
    (True, False)
    """
    return scale > 1 and all(
        abs(large - scale * small) < scale for small, large in zip(mask, image, strict=True)
    )
