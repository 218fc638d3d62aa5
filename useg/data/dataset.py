"""A pair of files -> a sample: what a data set is once its layout is known, and how its masks become labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from useg.classes import ClassTable, Label, to_label
from useg.data.images import Sample, read_colors, read_image, read_mask
from useg.errors import UsageError


@dataclass(frozen=True)
class Pair:
    """An image file and its mask file; ``split`` is ``train``, ``val``, ``test``, ``gap`` (in none of them) or ``""`` (not decided yet)."""

    image: Path
    mask: Path
    split: str = ""


@dataclass(frozen=True)
class Dataset:
    """What :func:`useg.data.layouts.find` found.

    Args:
        root: the folder.
        layout: ``carla``, ``camvid``, ``cityscapes``, ``voc``, ``folders``, ``one folder`` or ``dataset.toml``.
        pairs: in natural order.
        classes: how masks become labels.
        splits_by: how the splits came about, in words; empty before they are decided.
        images: images without a mask; empty unless ``find(..., strict=False)``.
        masks: masks without an image; likewise.
    """

    root: Path
    layout: str
    pairs: tuple[Pair, ...]
    classes: ClassTable
    splits_by: str = ""
    images: tuple[Path, ...] = ()
    masks: tuple[Path, ...] = ()

    def of(self, split: str) -> tuple[Pair, ...]:
        """Return the pairs of one split, in order."""
        return tuple(pair for pair in self.pairs if pair.split == split)


def read_label(pair: Pair, dataset: Dataset) -> Label:
    """Read a pair's mask as a label map ``(H, W)`` uint8: class ids, 255 where ignored.

    An RGB mask whose green and blue are 0 everywhere holds ids in its red channel, as CARLA writes them.

    Raises:
        UsageError: an unreadable file, a value or colour outside the class table, colours where ids are expected.
    """
    name = f"mask '{pair.mask}'"
    if dataset.classes.by_color:
        return to_label(read_colors(pair.mask), dataset.classes, name)
    mask = read_mask(pair.mask)
    if mask.ndim == 3:
        if mask[..., 1:].any():
            raise UsageError(
                f"{name} holds colours, but the class table ({len(dataset.classes)} classes) expects ids; "
                f"list the classes' colours in classes.toml with by_color = true"
            )
        mask = mask[..., 0]
    return to_label(mask, dataset.classes, name)


def read_sample(pair: Pair, dataset: Dataset) -> Sample:
    """Read a pair: image ``(H, W, C)`` and label ``(H, W)`` of one size.

    Raises:
        UsageError: as :func:`read_label`; also when image and mask differ in size.
    """
    image, label = read_image(pair.image), read_label(pair, dataset)
    if image.shape[:2] != label.shape:
        raise UsageError(
            f"image '{pair.image}' is {image.shape[1]}x{image.shape[0]} pixels, but its mask '{pair.mask}' is {label.shape[1]}x{label.shape[0]}; "
            f"they must have one size: check that they belong together, or resize the mask (nearest neighbour)"
        )
    return Sample(image, label)
