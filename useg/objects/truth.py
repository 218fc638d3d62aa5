"""Numbered objects -> what a network learns to keep them apart, beside the class of each pixel.

The depth of a pixel is its distance to the outline of its object, as a share of the largest such
distance in that object. It is 1 in the middle of an object, falls towards the outline, and so has
a valley wherever two objects touch. As a share it does not depend on the scale, so it can be cut,
flipped and zoomed like a label.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# (H, W): the number of the object of each pixel; 0 for none.
ObjectIds = NDArray[Any]

# Objects at most this number of pixels apart count as touching: a network joins them, too.
MAX_GAP_PIXELS = 1

# Found objects are specks if they have fewer pixels than this share of a small object: of the
# training objects, this percentage is smaller.
SPECK_SHARE, SMALL_PERCENT = 0.5, 1

# Depths are stored in a byte.
_MAX_DEPTH = 255


@dataclass(frozen=True)
class ObjectStatistics:
    """What the masks say about the objects of the training images.

    Args:
        touching: The largest share of an image's objects that touch another one.
        min_pixels: The pixels that an object needs, to be no speck; 0 without objects.
        side: The side of a typical object (:func:`typical_side`) in a typical image; 0 without
            objects.
    """

    touching: float = 0.0
    min_pixels: int = 0
    side: float = 0.0

    @classmethod
    def of(cls, maps: Iterable[ObjectIds]) -> ObjectStatistics:
        """Measure the true objects of some images, each ``(H, W)``."""
        touching, areas = [0.0], []
        for objects in maps:
            touching.append(share_touching(objects))
            areas.append(np.unique(objects[objects > 0], return_counts=True)[1])
        sides = [typical_side(each) for each in areas if each.size]
        return cls(
            max(touching), measure_min_pixels(areas), float(np.median(sides)) if sides else 0.0
        )


def typical_side(areas: NDArray[Any]) -> float:
    """Return the side of a square as large as the middle one of some objects, in pixels.

    Args:
        areas: The pixels of each object ``(n,)``, at least one.

    >>> typical_side(np.array([4, 9, 400]))
    3.0
    """
    return float(np.sqrt(np.median(areas)))


def measure_depth(objects: ObjectIds) -> NDArray[np.uint8]:
    """Return the depth of each pixel ``(H, W)``: 0 outside of objects, 1 to 255 in them.

    The edge of the image is no outline: an object that it cuts goes on.

    >>> measure_depth(np.array([[0, 2, 2, 2, 2, 2, 0]])).tolist()
    [[0, 85, 170, 255, 170, 85, 0]]
    """
    from scipy import ndimage

    depth = np.zeros(objects.shape, np.uint8)
    numbers = np.unique(objects, return_inverse=True)[1].reshape(objects.shape)
    # The numbers of the objects may have gaps, and 0 may be missing.
    numbers = np.where(objects > 0, numbers + 1, 0)
    for number, place in enumerate(ndimage.find_objects(numbers), 1):
        if place is None:
            continue
        own = numbers[place] == number
        # A frame of outside, but for the sides at which the image ends.
        frame = [
            (int(side.start > 0), int(side.stop < length))
            for side, length in zip(place, objects.shape, strict=True)
        ]
        framed = np.pad(own, frame)
        inside = tuple(
            slice(before, before + length)
            for (before, _), length in zip(frame, own.shape, strict=True)
        )
        if framed.all():
            depth[place][own] = _MAX_DEPTH
            continue
        distance = ndimage.distance_transform_edt(framed)[inside]
        share = np.rint(_MAX_DEPTH * distance[own] / distance.max())
        depth[place][own] = np.maximum(1, share).astype(np.uint8)
    return depth


def share_touching(objects: ObjectIds) -> float:
    """Return the share of the objects next to another one, with a gap of at most one pixel.

    >>> share_touching(np.array([[1, 1, 2, 0, 3, 0, 0, 4]]))
    0.75
    """
    found: list[NDArray[Any]] = []
    for axis in (0, 1):
        for step in range(1, MAX_GAP_PIXELS + 2):
            along = np.moveaxis(objects, axis, 0)
            first, second = along[:-step], along[step:]
            near = (first != second) & (first > 0) & (second > 0)
            found += [first[near], second[near]]
    total = np.count_nonzero(np.unique(objects))
    touching = len(np.unique(np.concatenate(found)))
    return float(touching / total) if total else 0.0


def measure_min_pixels(areas: Iterable[NDArray[Any]]) -> int:
    """Return how many pixels a found object needs, to be no speck.

    Args:
        areas: The pixels of each true object, ``(n,)`` for each image.

    >>> measure_min_pixels([np.array([4, 4])])
    2
    """
    found = np.concatenate([np.zeros(0, np.int64), *areas])
    return int(SPECK_SHARE * np.percentile(found, SMALL_PERCENT)) if found.size else 0
