"""Label map -> the same without small holes and small regions, by exact rules; both are off unless asked for (numpy only).

A **hole** of a class is a 4-connected set of pixels of other classes that is enclosed: it reaches no edge of the picture, and all pixels next
to it are of that class. One of fewer than N pixels is filled with the class, whatever lies in it, unless an ignored pixel does. Holes are those
of the map as given; where several overlap the largest counts, of equals that of the lowest class.

A **region** is a 4-connected set of pixels of one class. One of fewer than N pixels takes the class with which it shares the longest border,
counted in pixel sides, among its neighbours of at least N pixels; of equals the lowest class. All such regions change at once; then those are
looked at that only now have such a neighbour, until none is left. So no region below N pixels remains, but where all that lies together is
small: a picture of fewer pixels, or an island among ignored ones. Ignored pixels are never changed and never spread.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label
from useg.scoring.components import components, regions


def tidy(label: Label, min_region: int = 0, max_hole: int = 0) -> Label:
    """Fill holes, then merge regions; 0 leaves out a step.

    Args:
        label: class ids ``(H, W)``; it is not changed.
        min_region: smallest number of pixels that a region keeps its class with.
        max_hole: number of pixels from which on a hole stays.
    """
    if max_hole > 1:
        label = fill_holes(label, max_hole)
    return merge_regions(label, min_region) if min_region > 1 else label


def fill_holes(label: Label, below: int) -> Label:
    """Fill every hole of fewer than ``below`` pixels with the class around it."""
    filled, largest = label.copy(), np.zeros(label.shape, np.int64)
    for value in np.setdiff1d(label, [IGNORE]).tolist():
        numbers = components(label != value)
        sizes = np.bincount(numbers.ravel())
        reaching = (numbers[[0, -1]].ravel(), numbers[:, [0, -1]].ravel(), numbers[label == IGNORE])
        sizes[np.concatenate(reaching)] = 0
        sizes[(sizes >= below) | (np.arange(len(sizes)) == 0)] = 0
        hole = sizes[numbers]
        wins = hole > largest
        filled[wins], largest[wins] = value, hole[wins]
    return filled


def merge_regions(label: Label, below: int) -> Label:
    """Give every region of fewer than ``below`` pixels the class of its surroundings."""
    while True:
        numbers = regions(label)
        sizes = np.bincount(numbers.ravel())
        values = np.empty(len(sizes), np.uint8)
        values[numbers] = label
        small, known = sizes < below, values != IGNORE
        own, other = _sides(numbers)
        takes = (small & known)[own] & (~small & known)[other]
        if not takes.any():
            return label
        pairs, lengths = np.unique(own[takes] * 256 + values[other[takes]], return_counts=True)
        region, value = np.divmod(pairs, 256)
        order = np.lexsort((-value, lengths))  # of what a region may take, the last one written stays
        values[region[order]] = value[order]
        label = values[numbers]


def _sides(numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the regions on both sides of every pixel side that is a border, both ways round."""
    across, down = numbers[:, 1:] != numbers[:, :-1], numbers[1:] != numbers[:-1]
    first = np.concatenate([numbers[:, 1:][across], numbers[1:][down]])
    second = np.concatenate([numbers[:, :-1][across], numbers[:-1][down]])
    return np.concatenate([first, second]), np.concatenate([second, first])
