"""Label map + truth -> counts at the edges of things and on thin things, where a mean IoU hardly
looks.

All are counts of pixels that add up over images, in any order or grouping, like a confusion matrix;
every class of an image is counted in the same few passes over it. A prediction is taken as ignored
where the truth is, so that an ignored region is an edge of both or of neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label
from useg.scoring.metrics import class_ious, mean_present
from useg.scoring.regions import components

# of the diagonal: width of the band along edges in which boundary IoU is measured (Cheng et al.
# 2021)
BAND = 0.02


# of the diagonal: distance within which a boundary counts as found (DAVIS: Perazzi et al. 2016)
TOLERANCE = 0.008


THIN = 0.005  # of the diagonal: what no square of side 2 * THIN + 1 pixel fits into is thin


BoundaryCounts = NDArray[np.int64]  # (9, K): the rows are those of `_ROWS`


_ROWS = (
    "band hits",
    "band truth",
    "band predicted",
    "contour",
    "contour found",
    "drawn",
    "drawn right",
    "thin",
    "thin hits",
)


@dataclass(frozen=True)
class Edges:
    """How well the edges of one class were met; fractions 0..1, ``nan`` where the truth has none.

    Args:
        boundary_iou: IoU of those pixels of truth and prediction that lie within the band along
            their own edges.
        boundary_f: F-score of the contour: what was drawn lies near a true contour of the class,
            and the true contour near a drawn one.
        thin_recall: share of the pixels of thin parts that were found.
        thin_pixels: how many there are.
    """

    boundary_iou: float
    boundary_f: float
    thin_recall: float
    thin_pixels: int


@dataclass(frozen=True)
class Boundaries:
    """The edges of all classes; means over the classes that have a value."""

    mean_boundary_iou: float
    mean_boundary_f: float
    classes: tuple[Edges, ...]


def boundary_counts(
    prediction: Label, label: Label, num_classes: int, tolerance: int | None = None
) -> BoundaryCounts:
    """Count pixels along the edges of every class of one image.

    - Boundary IoU (Cheng et al., "Boundary IoU", CVPR 2021, section 4): of truth and prediction
      only the pixels within ``BAND`` of the diagonal (at least 1 pixel, in steps of the
      8-neighbourhood) of the own edge; the frame of the image is an edge, as in the authors' code.
    - Boundary F (Perazzi et al., DAVIS, CVPR 2016, section 4): contour pixels, i.e. those with a
      4-neighbour of another class, within ``tolerance`` (Euclidean) of a contour pixel of the same
      class in the other map. The frame and ignored regions make no contour.
    - Thin parts: true pixels that a morphological opening of the class with a square of ``2 *
      max(1, THIN * diagonal) + 1`` pixels removes; what lies outside the frame or is ignored counts
      as fitting.

    Args:
        prediction: ``(H, W)`` uint8, 0..K-1.
        label: the same shape, 0..K-1 or ``IGNORE``.
        num_classes: K.
        tolerance: pixels; by default ``TOLERANCE`` of the diagonal, rounded up.

    Returns:
        ``(9, K)`` int64.
    """
    diagonal = math.hypot(*label.shape)
    known = label != IGNORE
    prediction = np.where(known, prediction, np.uint8(IGNORE))
    right = prediction == label
    tolerance = default_tolerance(label.shape) if tolerance is None else tolerance

    band, band_predicted = (
        _band(labels, max(1, round(BAND * diagonal))) for labels in (label, prediction)
    )
    thin = _thin(label, max(1, round(THIN * diagonal)))
    of_truth = _count(label, (band, band & band_predicted & right, thin, thin & right), num_classes)
    true_contour, drawn_contour = (
        np.where(_contour(labels), labels, np.uint8(IGNORE)) for labels in (label, prediction)
    )
    contour, found = _count_near(true_contour, drawn_contour, tolerance, num_classes)
    drawn, drawn_right = _count_near(drawn_contour, true_contour, tolerance, num_classes)
    of_prediction = _count(prediction, (band_predicted,), num_classes)
    return np.stack(
        [
            of_truth[1],
            of_truth[0],
            of_prediction[0],
            contour,
            found,
            drawn,
            drawn_right,
            of_truth[2],
            of_truth[3],
        ]
    )


def default_tolerance(shape: tuple[int, ...]) -> int:
    """Return how far a drawn boundary may lie from the true one in an image of ``(H, W)``, in
    pixels.
    """
    return math.ceil(TOLERANCE * math.hypot(*shape))


def score_boundaries(counts: BoundaryCounts) -> Boundaries:
    """Compute the scores from summed counts ``(9, K)``."""
    ious = class_ious(counts[:3])
    contour, found, drawn, drawn_right, thin, thin_hits = counts[3:].astype(np.float64)
    precision, recall = drawn_right / np.maximum(drawn, 1), found / np.maximum(contour, 1)
    f = np.where(
        contour > 0,
        2 * precision * recall / np.where(precision + recall > 0, precision + recall, 1),
        math.nan,
    )
    thin_recall = np.where(thin > 0, thin_hits / np.maximum(thin, 1), math.nan)
    classes = tuple(
        Edges(float(ious[k]), float(f[k]), float(thin_recall[k]), int(thin[k]))
        for k in range(len(ious))
    )
    return Boundaries(float(mean_present(ious)), float(mean_present(f)), classes)


def _slide(
    values: NDArray[Any], radius: int, combine: Callable[..., NDArray[Any]], outside: int
) -> NDArray[Any]:
    """Combine (``np.minimum``, ``np.maximum``) the square of side ``2 * radius + 1`` around each
    pixel; each pass doubles the reach.
    """
    for _ in range(2):  # rows, then (transposed) columns
        values = np.pad(values, ((radius, radius), (0, 0)), constant_values=outside)
        have, width = 1, 2 * radius + 1
        while have < width:
            step = min(have, width - have)
            values = combine(values[:-step], values[step:])
            have += step
        values = values.T
    return values


def _band(labels: Label, width: int) -> NDArray[np.bool_]:
    """Tell which pixels have another class, or the outside of the image, within ``width`` steps of
    the 8-neighbourhood.
    """
    band: NDArray[np.bool_] = _slide(labels, width, np.minimum, 255) != _slide(
        labels, width, np.maximum, 0
    )
    band[:width] = band[-width:] = True
    band[:, :width] = band[:, -width:] = True
    return band


def _contour(labels: Label) -> NDArray[np.bool_]:
    """Tell which pixels have a 4-neighbour of another class; neither of the two is ignored."""
    contour = np.zeros(labels.shape, bool)
    for map_, there in ((contour, labels), (contour.T, labels.T)):
        differ = (there[1:] != there[:-1]) & (there[1:] != IGNORE) & (there[:-1] != IGNORE)
        map_[1:] |= differ
        map_[:-1] |= differ
    return contour


def _count(
    labels: Label, marks: Sequence[NDArray[np.bool_]], num_classes: int
) -> NDArray[np.int64]:
    """Count the pixels of each class under each mark, ``(len(marks), K)``, in one pass: the marks
    are bits above the class id.
    """
    code = labels.astype(np.uint16)
    for bit, mark in enumerate(marks):
        code |= mark.astype(np.uint16) << np.uint16(8 + bit)
    counts = np.bincount(code.ravel(), minlength=256 << len(marks)).reshape(-1, 256)
    marked = [
        [index for index in range(1 << len(marks)) if index >> bit & 1] for bit in range(len(marks))
    ]
    return np.stack([counts[rows, :num_classes].sum(0) for rows in marked])


def _count_near(contour: Label, other: Label, distance: int, num_classes: int) -> NDArray[np.int64]:
    """Count the contour pixels of each class, and those with one of the same class in ``other``
    within ``distance``: ``(2, K)``.

    Contour pixels are few, and most find their partner at once: those that have not look ever
        further away.
    """
    framed = np.pad(other, distance, constant_values=IGNORE)
    rows, columns = np.nonzero(contour != IGNORE)
    ids = contour[rows, columns]
    places = (rows + distance) * framed.shape[1] + columns + distance
    counts = np.bincount(ids, minlength=num_classes)
    steps = range(-distance, distance + 1)
    for _, row, column in sorted(
        (row**2 + column**2, row, column)
        for row in steps
        for column in steps
        if row**2 + column**2 <= distance**2
    ):
        missed = framed.ravel()[places + row * framed.shape[1] + column] != ids
        places, ids = places[missed], ids[missed]
        if not ids.size:
            break
    return np.stack([counts, counts - np.bincount(ids, minlength=num_classes)])


def _thin(label: Label, radius: int) -> NDArray[np.bool_]:
    """Tell which pixels lie in no square of side ``2 * radius + 1`` that holds one class and
    nothing else but ignored or outside pixels.
    """
    framed = np.pad(label, radius, constant_values=IGNORE)
    lowest = _slide(framed, radius, np.minimum, IGNORE)
    highest = _slide(np.where(framed == IGNORE, 0, framed), radius, np.maximum, 0)
    thick: NDArray[np.bool_] = _slide(lowest == highest, radius, np.maximum, 0)
    return ~thick[radius:-radius, radius:-radius]


THRESHOLDS = tuple(
    step / 10 for step in range(1, 10)
)  # the paper thresholds its map "at 10 different levels"; 0 and 1 decide nothing


MembraneCounts = NDArray[
    np.float64
]  # (THRESHOLDS, 6): images, warping error, Rand error, cell pixels found, true, predicted


@dataclass(frozen=True)
class Membranes:
    """The errors, each at the threshold that suits it best (as the challenge did): 0 is perfect.

    Args:
        warping_error: share of pixels that still differ after the truth was warped towards the
            prediction without changing its topology.
        rand_error: 1 - foreground-restricted Rand F-score.
        pixel_error: 1 - F-score of the cells' pixels. The share of wrong pixels is 1 -
            ``pixel_accuracy``.
        thresholds: of the three, on the probability of cell.
    """

    warping_error: float
    rand_error: float
    pixel_error: float
    thresholds: tuple[float, float, float]


def membrane_counts(
    cell: NDArray[np.float32], truth: NDArray[np.bool_], known: NDArray[np.bool_]
) -> MembraneCounts:
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
        rows.append(
            (1.0, warping_error(predicted, truth), rand_error(predicted, truth & known), *pixels)
        )
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

    Of two pixels that are cell in the truth: does it hold them to be of one cell, and does the
        prediction? F-score of the pairs, a pixel
    with itself included, as in Arganda-Carreras et al., "Crowdsourcing the creation of image
    segmentation algorithms for connectomics", 2015, equations 1-3 with alpha = 0.5. Cells are
    4-connected regions; true membrane does not count; predicted membrane is one segment.

    Args:
        predicted: where the prediction sees cell, ``(H, W)``.
        truth: where cell truly is.
    """
    cells, segments = components(truth)[truth], components(predicted)[truth]
    together = np.unique(cells * (segments.max(initial=0) + 1) + segments, return_counts=True)[1]
    pairs = [
        float((sizes.astype(np.float64) ** 2).sum())
        for sizes in (together, np.bincount(cells), np.bincount(segments))
    ]
    return 1 - 2 * pairs[0] / (pairs[1] + pairs[2]) if cells.size else 0.0


def warping_error(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Return the share of pixels in which the prediction differs from the truth although the truth
    was warped towards it.

    Warping (Jain et al., "Boundary learning by optimization with topological constraints", CVPR
    2010, section 3) turns single pixels, as long as some differ and can be turned without joining,
    cutting, making or filling any region: cells are 4-connected, membranes 8-connected. It stops at
    the first local optimum, so that this is an upper bound, as it is elsewhere.

    Args:
        predicted: where the prediction sees cell, ``(H, W)``.
        truth: where cell truly is.
    """
    return float((warped(truth, predicted) != predicted).mean())


def warped(truth: NDArray[np.bool_], towards: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Turn simple points of ``truth`` to their value in ``towards`` until none is left; what lies
    outside is membrane.

    Membranes grow as far as they can before they shrink where they should not be: the other way
        round, thin ones are left behind in pieces.
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


_AROUND = (
    (-1, -1),
    (-1, 0),
    (-1, 1),
    (0, 1),
    (1, 1),
    (1, 0),
    (1, -1),
    (0, -1),
)  # once around a pixel


@cache
def _simple() -> NDArray[np.bool_]:
    """Tell for the 256 neighbourhoods whether the pixel in the middle can be turned without a
    change of topology.

    It can where exactly one 4-connected region of cell in the neighbourhood touches it by an edge,
    and membrane touches it too: where its connectivity number, the count of edge neighbours of cell
    that the next two on the way around do not continue, is 1 (Yokoi, Toriwaki and Fukumura, "An
    analysis of topological properties of digitized binary pictures", 1975, for 4-connected
    objects).
    """
    simple = np.zeros(256, bool)
    for code in range(256):
        ring = [bool(code >> bit & 1) for bit in range(8)]
        simple[code] = (
            sum(ring[k] and not (ring[(k + 1) % 8] and ring[(k + 2) % 8]) for k in (1, 3, 5, 7))
            == 1
        )
    return simple
