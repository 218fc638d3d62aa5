"""A mask's runs -> its specks: spots of a few pixels with one class all round, which a slip of the mouse or a bad conversion leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SMALL = 3  # pixels: a speck is no wider and no higher
_MOST = 500  # candidates looked at in one mask


@dataclass(frozen=True)
class Specks:
    """``number`` of specks in a mask, and the place (x, y) of the first of them."""

    number: int = 0
    place: tuple[int, int] = (0, 0)


def find_specks(codes: NDArray[Any], starts: NDArray[np.intp], lengths: NDArray[np.intp]) -> Specks:
    """Count spots of at most 3 by 3 pixels that one other class surrounds.

    Args:
        codes: the mask ``(H, W)``.
        starts: where its runs begin, in the flat mask.
        lengths: of the runs.
    """
    H, W = codes.shape
    flat = codes.ravel()
    inner = np.flatnonzero((lengths[1:-1] <= _SMALL) & (flat[starts[:-2]] == flat[starts[2:]])) + 1
    y, x = np.divmod(starts[inner], W)
    reach = _SMALL + 1
    fits = (x >= reach) & (x + lengths[inner] + reach <= W) & (y >= reach) & (y < H - reach)
    inner, y, x = inner[fits], y[fits], x[fits]
    around = flat[starts[inner - 1]]
    lone = (codes[y - 1, x] == around) & (codes[y + _SMALL, x] == around)  # the topmost row of a spot stands for it
    y, x = y[lone][:_MOST], x[lone][:_MOST]
    if not len(y):
        return Specks()
    ring = np.array([(r, c) for r in range(-1, reach + 1) for c in range(-reach + 1, reach + 1) if r in (-1, reach) or c in (-reach + 1, reach)])
    around = codes[np.minimum(y[:, None] + ring[:, 0], H - 1), np.minimum(x[:, None] + ring[:, 1], W - 1)]
    lone = (around == around[:, :1]).all(1) & (around[:, 0] != codes[y, x])
    return Specks(int(lone.sum()), (int(x[lone][0]), int(y[lone][0]))) if lone.any() else Specks()
