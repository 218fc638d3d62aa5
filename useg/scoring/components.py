"""Mask -> its connected regions, label map -> its regions of one class, numbered (numpy only).

Rows are cut into runs, and runs that touch are joined: each round hooks every region onto a lower-numbered neighbour, which leaves at most
half of those that still have one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


def components(mask: NDArray[np.bool_]) -> Numbers:
    """Number the 4-connected regions of a mask ``(H, W)``: 1, 2, ... in the order of their first pixels, 0 outside.

    >>> components(np.array([[1, 0, 1], [1, 0, 0], [0, 1, 1]], bool))
    array([[1, 0, 2],
           [1, 0, 0],
           [0, 3, 3]])
    """
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    numbered = _joined(starts, mask[1:] & mask[:-1])
    return np.where(mask, numbered + 1, 0)


def regions(label: NDArray[Any]) -> Numbers:
    """Number the 4-connected regions of equal values of a label map ``(H, W)``: 0, 1, ... in the order of their first pixels.

    >>> regions(np.array([[7, 2, 7], [7, 2, 2]]))
    array([[0, 1, 2],
           [0, 1, 1]])
    """
    starts = np.ones(label.shape, bool)
    starts[:, 1:] = label[:, 1:] != label[:, :-1]
    return _joined(starts, label[1:] == label[:-1])


def _joined(starts: NDArray[np.bool_], touching: NDArray[np.bool_]) -> Numbers:
    """Number runs of pixels along rows, given where they start and which pixels ``(H - 1, W)`` belong together with the one below."""
    run = (np.cumsum(starts) - 1).reshape(starts.shape)
    new = touching & (starts[1:] | starts[:-1])  # elsewhere the same two runs touch as one pixel further left
    upper, lower = run[:-1][new], run[1:][new]
    parent = np.arange(np.count_nonzero(starts))
    while True:
        first, second = parent[upper], parent[lower]
        apart = first != second
        if not apart.any():
            break
        np.minimum.at(parent, np.maximum(first, second)[apart], np.minimum(first, second)[apart])
        while not np.array_equal(parent, above := parent[parent]):
            parent = above
    numbers = np.unique(parent, return_inverse=True)[1]
    return numbers[run] if numbers.size else run
