"""A TIFF, DICOM or .npy file -> how many images it holds, and which of its pages are an image.

A file of several images of one size is a stack; its images are its pages. An array ``(N, H, W)``
does not say whether it holds N images, or one image of N or W bands: the number of the model's
bands, or the mask beside it, decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from useg.images.decode import decode, read_container
from useg.images.formats import ALL_PAGES, is_tiff, open_image_file
from useg.images.other_formats import find_npy_shape
from useg.images.tiff import open_tiff

# Two arrays of the same shape are stacks of grey images and masks if they have at least this many
# images, whose sides have at least this many pixels.
MIN_GREY_PAGES, _MIN_GREY_SIDE = 5, 16
# Three bands with values up to this are ids of three masks; colours have higher values.
_MAX_FEW_IDS = 31


@dataclass(frozen=True)
class Stack:
    """What the header of a file says about its images.

    Args:
        num_pages: Number of images of one size; 1 if the file is not a stack. The channels of an
            ImageJ stack are bands of one image. An array ``(N, H, W, C)`` is a stack.
        are_pages_grey: Whether it is a TIFF whose pages have one band each.
        npy_shape: Shape of the array in a ``.npy`` file; ``()`` for other files.
    """

    num_pages: int
    are_pages_grey: bool = False
    npy_shape: tuple[int, ...] = ()

    def find_images(self, num_bands: int) -> Sequence[int | None]:
        """Return the pages that are images for a model of ``num_bands`` bands.

        These are None for a file of one image, and all pages of a stack. A TIFF that has one page
        for each of several bands is one image: ALL_PAGES. For a model of one band, an array ``(N,
        H, W)`` is a stack of N if both sides and N are as large as in :func:`count_pages`.
        """
        if self.are_pages_grey and self.num_pages == num_bands > 1:
            return [ALL_PAGES]
        shape, count = self.npy_shape, self.num_pages
        if num_bands == 1 and len(shape) == 3 and shape[0] <= shape[2] and _are_pages(shape):
            count = shape[0]
        return range(count) if count > 1 else [None]


def read_stack(path: Path) -> Stack:
    """Read from a file's header which images it holds.

    Raises:
        DataError: The file is missing or not an image.
    """
    with open_image_file(path) as file:
        if not is_tiff(file):
            return Stack(read_container(file).pages, npy_shape=find_npy_shape(file))
        with open_tiff(file) as tiff:
            are_grey = tiff.first.samplesperpixel == tiff.planes.shape[1] == 1
            return Stack(tiff.num_pages, are_pages_grey=bool(are_grey))


def count_pages(image: Path, mask: Path) -> tuple[int, int]:
    """Return how many images the file of an image holds, and how many masks that of its mask.

    An array ``(N, H, W)`` may be a stack of N, or an image of N or W bands. It is a stack if the
    other file is one of N or of this height and width, or has the same shape, as images without
    colours and their masks do; but not if the first two axes look like height and width.

    Raises:
        DataError: A file is missing or not an image.
    """
    stacks = [read_stack(path) for path in (image, mask)]
    counts, shapes = [stack.num_pages for stack in stacks], [stack.npy_shape for stack in stacks]
    are_alike = shapes[0] == shapes[1] and len(shapes[0]) == 3
    if are_alike and (_are_pages(shapes[0]) or _are_few_masks(mask, shapes[1])):
        return shapes[0][0], shapes[0][0]
    for own, other in ((0, 1), (1, 0)):
        shape, same = shapes[own], (shapes[other][1:3], shapes[other][2:4])
        fits = shape[:1] == (counts[other],) or shape[1:] in same
        if counts[own] == 1 < counts[other] and len(shape) == 3 and fits:
            counts[own] = shape[0]
    return counts[0], counts[1]


def _are_few_masks(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether an array of two to four bands has ids that no mask of one image stores in bands.

    Such a mask stores two values in a band for each class, equal bands, or three of colours.
    """
    count, height, width = shape
    if not 2 <= count < MIN_GREY_PAGES or min(height, width) < _MIN_GREY_SIDE:
        return False
    with open_image_file(path) as file:
        pixels = decode(file).pixels
    are_two = len(np.unique(pixels)) <= 2
    are_equal = (pixels == pixels[..., :1]).all()
    are_ids = pixels.dtype.kind in "bui" and (count != 3 or pixels.max() <= _MAX_FEW_IDS)
    return bool(are_ids and not are_two and not are_equal)


def _are_pages(shape: tuple[int, ...]) -> bool:
    """Whether an array of three axes looks like grey images, and not like the bands of one."""
    pages, *sides = shape
    are_sides = 2 * min(sides) >= max(sides) and (pages != sides[0] or sides[0] == sides[1])
    return pages >= MIN_GREY_PAGES and min(sides) >= _MIN_GREY_SIDE and are_sides
