"""Pictures -> which of them are nearly the same one: frames of a film, resaved or resized copies, a still camera."""

from __future__ import annotations

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from useg.data.images import Image

SIDE = 16
NEAR = 0.93  # correlation of two signatures from which on their pictures count as nearly the same
_ROWS = 1024  # signatures that are compared with all others at once


def signature(image: Image) -> NDArray[np.uint8]:
    """Return what a picture looks like from afar: ``(SIDE * SIDE,)`` uint8, 128 on average; all 128 for one that shows nothing.

    The picture's brightness on a grid of 16 x 16 fields, less the mean of each 4 x 4 of them, in units of its own deviation. So exposure
    and size do not matter, and neither does what all pictures of a kind share, such as a bright sky over a dark road.

    Args:
        image: ``(H, W, C)`` of any number type and size.
    """
    if image.dtype == np.uint8 and image.shape[2] == 3:
        fields = np.asarray(PIL.Image.fromarray(image).resize((SIDE, SIDE), PIL.Image.Resampling.BOX), np.float32).mean(2)
    else:
        step = max(1, min(image.shape[:2]) // (8 * SIDE))
        grey = np.nan_to_num(image[::step, ::step].astype(np.float32), posinf=0, neginf=0).mean(2)
        fields = np.asarray(PIL.Image.fromarray(grey).resize((SIDE, SIDE), PIL.Image.Resampling.BOX))
    blocks = fields.reshape(4, SIDE // 4, 4, SIDE // 4).astype(np.float64)
    detail = (blocks - blocks.mean((1, 3), keepdims=True)).ravel()
    deviation = detail.std()
    if deviation <= 1e-3 * max(1e-30, float(np.abs(fields).max())):  # blank: nothing to remember, and so no twin of other blank ones
        return np.full(SIDE * SIDE, 128, np.uint8)
    units: NDArray[np.uint8] = np.clip(np.rint(128 + 32 * detail / deviation), 0, 255).astype(np.uint8)
    return units


def clusters(signatures: NDArray[np.uint8], near: float = NEAR) -> NDArray[np.intp]:
    """Group pictures: two whose signatures correlate by at least ``near`` are in one group, and so are the twins of twins.

    Measured: copies resaved as JPEG, halved, noisy or cropped by a percent 0.95 and more. On a street drive (CARLA) nine of ten
    neighbouring frames 0.95 and more, frames over 30 apart 0.92 at most. On CamVid, whose frames are a second apart, 0.99 where the car
    stands, 0.8 where it moves, and 0.81 at most between scenes.

    Args:
        signatures: ``(N, S)`` as :func:`signature` gives them.
        near: 1 for copies alone, lower for more.

    Returns:
        ``(N,)``: for each picture, the index of the first one of its group.
    """
    vectors = signatures.astype(np.float32) - 128
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.maximum(lengths, 1)  # a blank one stays 0: near to nothing
    groups = np.arange(len(vectors))
    for first in range(0, len(vectors), _ROWS):
        alike = vectors[first : first + _ROWS] @ vectors[: first + _ROWS].T >= near
        for row, others in enumerate(alike, first):
            joined = np.append(groups[: len(others)][others], groups[row])
            if joined.min() < joined.max():
                groups[np.isin(groups, joined)] = joined.min()
    return groups
