"""Mask -> its connected regions, numbered (numpy only)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def components(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Number the 4-connected regions of a mask ``(H, W)``: 1, 2, ... in the order of their first pixels, 0 outside.

    Rows are cut into runs, and runs that touch are joined: each round hooks every region onto a lower-numbered neighbour, which leaves at
    most half of those that still have one.

    >>> components(np.array([[1, 0, 1], [1, 0, 0], [0, 1, 1]], bool))
    array([[1, 0, 2],
           [1, 0, 0],
           [0, 3, 3]])
    """
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    run = (np.cumsum(starts) - 1).reshape(mask.shape)
    touching = mask[1:] & mask[:-1]
    upper, lower = run[:-1][touching], run[1:][touching]
    parent = np.arange(np.count_nonzero(starts))
    while True:
        first, second = parent[upper], parent[lower]
        apart = first != second
        if not apart.any():
            break
        np.minimum.at(parent, np.maximum(first, second)[apart], np.minimum(first, second)[apart])
        while not np.array_equal(parent, above := parent[parent]):
            parent = above
    numbers = np.unique(parent, return_inverse=True)[1] + 1
    return np.where(mask, numbers[run] if numbers.size else 0, 0)
