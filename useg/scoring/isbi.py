"""Probability of cell + true membranes -> the three errors of the ISBI 2012 challenge, with which the U-Net paper was measured.

The challenge kept the labels of its test stack, so that numbers from other slices compare with the paper's only in kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from useg.scoring.components import components

THRESHOLDS = tuple(step / 10 for step in range(1, 10))  # the paper thresholds its map "at 10 different levels"; 0 and 1 decide nothing

MembraneCounts = NDArray[np.float64]  # (THRESHOLDS, 6): images, warping error, Rand error, cell pixels found, true, predicted


@dataclass(frozen=True)
class Membranes:
    """The errors, each at the threshold that suits it best (as the challenge did): 0 is perfect.

    Args:
        warping_error: share of pixels that still differ after the truth was warped towards the prediction without changing its topology.
        rand_error: 1 - foreground-restricted Rand F-score.
        pixel_error: 1 - F-score of the cells' pixels. The share of wrong pixels is 1 - ``pixel_accuracy``.
        thresholds: of the three, on the probability of cell.
    """

    warping_error: float
    rand_error: float
    pixel_error: float
    thresholds: tuple[float, float, float]


def membrane_counts(cell: NDArray[np.float32], truth: NDArray[np.bool_], known: NDArray[np.bool_]) -> MembraneCounts:
    """Measure one image.

    Args:
        cell: probability of not being membrane, ``(H, W)``.
        truth: where there is truly none.
        known: where the truth counts.

    Returns:
        ``(9, 6)``; images add up.
    """
    rows = []
    for threshold in THRESHOLDS:
        predicted = np.where(known, cell > threshold, truth)
        pixels = [np.count_nonzero(part & known) for part in (predicted & truth, truth, predicted)]
        rows.append((1.0, warping_error(predicted, truth), rand_error(predicted, truth & known), *pixels))
    return np.array(rows, np.float64)


def score_membranes(counts: MembraneCounts) -> Membranes:
    """Average the errors over the images, pool the pixels, and take the best threshold for each."""
    images, warping, rand, found, true, predicted = counts.T
    errors = (warping / images, rand / images, 1 - 2 * found / np.maximum(true + predicted, 1))
    best = [THRESHOLDS[int(error.argmin())] for error in errors]
    warping_least, rand_least, pixel_least = (float(error.min()) for error in errors)
    return Membranes(warping_least, rand_least, pixel_least, (best[0], best[1], best[2]))


def rand_error(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Return 1 - the F-score of the foreground-restricted Rand index, 0..1.

    Of two pixels that are cell in the truth: does it hold them to be of one cell, and does the prediction? F-score of the pairs, a pixel
    with itself included, as in Arganda-Carreras et al., "Crowdsourcing the creation of image segmentation algorithms for connectomics",
    2015, equations 1-3 with alpha = 0.5. Cells are 4-connected regions; true membrane does not count; predicted membrane is one segment.

    Args:
        predicted: where the prediction sees cell, ``(H, W)``.
        truth: where cell truly is.
    """
    cells, segments = components(truth)[truth], components(predicted)[truth]
    together = np.unique(cells * (segments.max(initial=0) + 1) + segments, return_counts=True)[1]
    pairs = [float((sizes.astype(np.float64) ** 2).sum()) for sizes in (together, np.bincount(cells), np.bincount(segments))]
    return 1 - 2 * pairs[0] / (pairs[1] + pairs[2]) if cells.size else 0.0


def warping_error(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Return the share of pixels in which the prediction differs from the truth although the truth was warped towards it.

    Warping (Jain et al., "Boundary learning by optimization with topological constraints", CVPR 2010, section 3) turns single pixels, as long
    as some differ and can be turned without joining, cutting, making or filling any region: cells are 4-connected, membranes 8-connected.
    It stops at the first local optimum, so that this is an upper bound, as it is elsewhere.

    Args:
        predicted: where the prediction sees cell, ``(H, W)``.
        truth: where cell truly is.
    """
    return float((warped(truth, predicted) != predicted).mean())


def warped(truth: NDArray[np.bool_], towards: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Turn simple points of ``truth`` to their value in ``towards`` until none is left; what lies outside is membrane.

    Membranes grow as far as they can before they shrink where they should not be: the other way round, thin ones are left behind in pieces.
    """
    image = np.pad(truth, 1)
    inside = image[1:-1, 1:-1]
    while True:
        before = inside.copy()
        for value in (False, True):
            while _turn(image, (inside != value) & (towards == value)):
                pass
        if np.array_equal(inside, before):
            return inside


def _turn(image: NDArray[np.bool_], wanted: NDArray[np.bool_]) -> bool:
    """Turn those ``wanted`` points of a framed image that are simple; tell whether there were any.

    Pixels two apart do not see each other, so a quarter of the image can be turned at once.
    """
    turned = False
    for top, left in ((0, 0), (0, 1), (1, 0), (1, 1)):
        part = wanted[top::2, left::2]
        height, width = part.shape
        code = np.zeros(part.shape, np.uint8)
        for bit, (row, column) in enumerate(_AROUND):
            seen = image[1 + top + row :: 2, 1 + left + column :: 2][:height, :width]
            code |= seen.astype(np.uint8) << np.uint8(bit)
        turn = part & _simple()[code]
        image[1:-1, 1:-1][top::2, left::2] ^= turn
        turned = turned or bool(turn.any())
    return turned


_AROUND = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))  # once around a pixel


@cache
def _simple() -> NDArray[np.bool_]:
    """Tell for the 256 neighbourhoods whether the pixel in the middle can be turned without a change of topology.

    It can where exactly one 4-connected region of cell in the neighbourhood touches it by an edge, and membrane touches it too: where its
    connectivity number, the count of edge neighbours of cell that the next two on the way around do not continue, is 1 (Yokoi, Toriwaki and
    Fukumura, "An analysis of topological properties of digitized binary pictures", 1975, for 4-connected objects).
    """
    simple = np.zeros(256, bool)
    for code in range(256):
        ring = [bool(code >> bit & 1) for bit in range(8)]
        simple[code] = sum(ring[k] and not (ring[(k + 1) % 8] and ring[(k + 2) % 8]) for k in (1, 3, 5, 7)) == 1
    return simple
