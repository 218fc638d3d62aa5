"""Boundary IoU, boundary F-score, recall of thin parts, and the errors of the ISBI 2012 challenge.

A mean IoU hardly reflects errors at the boundaries of objects and on thin objects. The scores here
come from counts of pixels that add up over images in any order or grouping, like a confusion
matrix; a few passes over an image serve all classes. A prediction is ignored where the ground truth
is, so that an ignored region is a boundary of both or of neither.

The membrane errors are those of the ISBI 2012 challenge, on which the U-Net paper reports. The
challenge never published the labels of its test stack, so numbers from other slices are comparable
with the paper's only in kind.
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
from useg.scoring.metrics import class_ious, components, mean_present

# Lengths as shares of the image diagonal. Width of the band along boundaries in which boundary IoU
# is measured (Cheng et al. 2021).
BAND_WIDTH = 0.02
# Distance within which a contour counts as found (DAVIS: Perazzi et al. 2016).
CONTOUR_TOLERANCE = 0.008
# A part is thin if no square of side 2 * THIN_RADIUS + 1 pixel fits into it.
THIN_RADIUS = 0.005

# (9, K) pixels of each class: correct in both bands, in the true band, in the predicted band; of
# the true contour, found of it; of the predicted contour, correct of it; of thin parts, correct of
# them.
BoundaryCounts = NDArray[np.int64]

# Of the probability of cell. The challenge thresholds the map "at 10 different levels"; 0 and 1
# would make everything one class.
THRESHOLDS = tuple(step / 10 for step in range(1, 10))
# (THRESHOLDS, 6): images, warping error, Rand error, and correct, true and predicted cell pixels.
MembraneCounts = NDArray[np.float64]
# Offsets of the 8 neighbours of a pixel, once around it.
_NEIGHBOUR_OFFSETS = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))


@dataclass(frozen=True)
class Edges:
    """Boundary scores of one class; fractions 0..1, ``nan`` if the ground truth has none.

    Args:
        boundary_iou: IoU of the pixels of ground truth and prediction that lie within the band
            along their own boundaries.
        boundary_f: F-score of the contour: precision is the share of the predicted contour near a
            true one of the class, recall the share of the true contour near a predicted one.
        thin_recall: share of the pixels of thin parts that are correct.
        thin_pixels: number of pixels of thin parts.
    """

    boundary_iou: float
    boundary_f: float
    thin_recall: float
    thin_pixels: int


@dataclass(frozen=True)
class Boundaries:
    """Boundary scores of all classes; the means are over the classes that have a value."""

    mean_boundary_iou: float
    mean_boundary_f: float
    classes: tuple[Edges, ...]


def boundary_counts(
    prediction: Label, label: Label, num_classes: int, tolerance: int | None = None
) -> BoundaryCounts:
    """Count pixels along the boundaries of every class of one image.

    - Boundary IoU (Cheng et al., "Boundary IoU", CVPR 2021, section 4) counts only the pixels of
      ground truth and prediction within ``BAND_WIDTH`` of their own boundary (at least 1 pixel, in
      steps of the 8-neighbourhood). The image border is a boundary, as in the authors' code.
    - Boundary F (Perazzi et al., DAVIS, CVPR 2016, section 4) counts contour pixels, which have a
      4-neighbour of another class, within ``tolerance`` (Euclidean) of a contour pixel of the same
      class in the other map. The image border and ignored regions form no contour.
    - Thin parts are the true pixels that a morphological opening of the class removes, with a
      square of ``2 * max(1, THIN_RADIUS * diagonal) + 1`` pixels. Ignored pixels, and those
      outside the image, count as part of the class.

    Args:
        prediction: ``(H, W)`` uint8, 0..K-1.
        label: the same shape, 0..K-1 or ``IGNORE``.
        num_classes: K.
        tolerance: in pixels; by default ``CONTOUR_TOLERANCE`` of the diagonal, rounded up.

    Returns:
        ``(9, K)`` int64.
    """
    diagonal = math.hypot(*label.shape)
    known = label != IGNORE
    prediction = np.where(known, prediction, np.uint8(IGNORE))
    correct = prediction == label
    tolerance = default_tolerance(label.shape) if tolerance is None else tolerance

    band, band_predicted = (
        _band(labels, max(1, round(BAND_WIDTH * diagonal))) for labels in (label, prediction)
    )
    thin = _thin(label, max(1, round(THIN_RADIUS * diagonal)))
    of_truth = _count(
        label, (band, band & band_predicted & correct, thin, thin & correct), num_classes
    )
    true_contour, predicted_contour = (
        np.where(_contour(labels), labels, np.uint8(IGNORE)) for labels in (label, prediction)
    )
    contour, found = _count_near(true_contour, predicted_contour, tolerance, num_classes)
    predicted, predicted_correct = _count_near(
        predicted_contour, true_contour, tolerance, num_classes
    )
    of_prediction = _count(prediction, (band_predicted,), num_classes)
    return np.stack(
        [
            of_truth[1],
            of_truth[0],
            of_prediction[0],
            contour,
            found,
            predicted,
            predicted_correct,
            of_truth[2],
            of_truth[3],
        ]
    )


def default_tolerance(shape: tuple[int, ...]) -> int:
    """Return the distance in pixels within which a contour counts as found, for ``(H, W)``."""
    return math.ceil(CONTOUR_TOLERANCE * math.hypot(*shape))


def score_boundaries(counts: BoundaryCounts) -> Boundaries:
    """Compute the scores from summed counts ``(9, K)``."""
    ious = class_ious(counts[:3])
    contour, found, predicted, predicted_correct, thin, thin_hits = counts[3:].astype(np.float64)
    precision, recall = predicted_correct / np.maximum(predicted, 1), found / np.maximum(contour, 1)
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
    """Compute the minimum or maximum over the square of side ``2 * radius + 1`` at each pixel.

    Each pass doubles the width that is covered.

    Args:
        values: ``(H, W)``.
        radius: in pixels.
        combine: ``np.minimum`` or ``np.maximum``.
        outside: value of the pixels outside the image.
    """
    # Along the rows, then (transposed) along the columns.
    for _ in range(2):
        values = np.pad(values, ((radius, radius), (0, 0)), constant_values=outside)
        covered, width = 1, 2 * radius + 1
        while covered < width:
            step = min(covered, width - covered)
            values = combine(values[:-step], values[step:])
            covered += step
        values = values.T
    return values


def _band(labels: Label, width: int) -> NDArray[np.bool_]:
    """Find pixels with another class, or the image border, within ``width`` steps.

    Steps are those of the 8-neighbourhood.
    """
    band: NDArray[np.bool_] = _slide(labels, width, np.minimum, 255) != _slide(
        labels, width, np.maximum, 0
    )
    band[:width] = band[-width:] = True
    band[:, :width] = band[:, -width:] = True
    return band


def _contour(labels: Label) -> NDArray[np.bool_]:
    """Find pixels with a 4-neighbour of another class; neither of the two is ignored."""
    contour = np.zeros(labels.shape, bool)
    for view, ids in ((contour, labels), (contour.T, labels.T)):
        differ = (ids[1:] != ids[:-1]) & (ids[1:] != IGNORE) & (ids[:-1] != IGNORE)
        view[1:] |= differ
        view[:-1] |= differ
    return contour


def _count(
    labels: Label, masks: Sequence[NDArray[np.bool_]], num_classes: int
) -> NDArray[np.int64]:
    """Count the pixels of each class in each of several masks, ``(len(masks), K)``.

    One pass suffices: the masks are bits above the class id.
    """
    code = labels.astype(np.uint16)
    for bit, mask in enumerate(masks):
        code |= mask.astype(np.uint16) << np.uint16(8 + bit)
    counts = np.bincount(code.ravel(), minlength=256 << len(masks)).reshape(-1, 256)
    with_bit = [
        [index for index in range(1 << len(masks)) if index >> bit & 1] for bit in range(len(masks))
    ]
    return np.stack([counts[rows, :num_classes].sum(0) for rows in with_bit])


def _count_near(contour: Label, other: Label, distance: int, num_classes: int) -> NDArray[np.int64]:
    """Count the contour pixels of each class, and those near the same class in ``other``.

    Contour pixels are few, and most have a partner nearby: the search for each goes outward, and
    ends at the first partner within ``distance``.

    Returns:
        ``(2, K)``.
    """
    padded = np.pad(other, distance, constant_values=IGNORE)
    rows, columns = np.nonzero(contour != IGNORE)
    ids = contour[rows, columns]
    places = (rows + distance) * padded.shape[1] + columns + distance
    counts = np.bincount(ids, minlength=num_classes)
    steps = range(-distance, distance + 1)
    for _, row, column in sorted(
        (row**2 + column**2, row, column)
        for row in steps
        for column in steps
        if row**2 + column**2 <= distance**2
    ):
        missed = padded.ravel()[places + row * padded.shape[1] + column] != ids
        places, ids = places[missed], ids[missed]
        if not ids.size:
            break
    return np.stack([counts, counts - np.bincount(ids, minlength=num_classes)])


def _thin(label: Label, radius: int) -> NDArray[np.bool_]:
    """Find pixels that lie in no square of side ``2 * radius + 1`` of a single class.

    Ignored pixels, and those outside the image, count as part of any class.
    """
    padded = np.pad(label, radius, constant_values=IGNORE)
    lowest = _slide(padded, radius, np.minimum, IGNORE)
    highest = _slide(np.where(padded == IGNORE, 0, padded), radius, np.maximum, 0)
    thick: NDArray[np.bool_] = _slide(lowest == highest, radius, np.maximum, 0)
    return ~thick[radius:-radius, radius:-radius]


@dataclass(frozen=True)
class Membranes:
    """Errors, each at the threshold that suits it best (as in the challenge); 0 is perfect.

    Args:
        warping_error: share of pixels that still differ after the ground truth was warped towards
            the prediction without a change of its topology.
        rand_error: 1 - foreground-restricted Rand F-score.
        pixel_error: 1 - F-score of the pixels of cells. The share of wrong pixels is
            1 - ``pixel_accuracy``.
        thresholds: those of the three errors, on the probability of cell.
    """

    warping_error: float
    rand_error: float
    pixel_error: float
    thresholds: tuple[float, float, float]


def membrane_counts(
    cell: NDArray[np.float32], truth: NDArray[np.bool_], known: NDArray[np.bool_]
) -> MembraneCounts:
    """Compute the membrane errors of one image at every threshold.

    Args:
        cell: probability of cell, that is of not being membrane, ``(H, W)``.
        truth: where the ground truth is cell.
        known: where the ground truth is not ignored.

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
    """Average errors over images, pool pixels, and take the best threshold for each error."""
    images, warping, rand, found, true, predicted = counts.T
    errors = (warping / images, rand / images, 1 - 2 * found / np.maximum(true + predicted, 1))
    best = [THRESHOLDS[int(error.argmin())] for error in errors]
    warping_least, rand_least, pixel_least = (float(error.min()) for error in errors)
    return Membranes(warping_least, rand_least, pixel_least, (best[0], best[1], best[2]))


def rand_error(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Return 1 - the F-score of the foreground-restricted Rand index, 0..1.

    For each pair of pixels that are cell in the ground truth: are they in one cell, and does the
    prediction put them into one? This is the F-score of those pairs, with each pixel also paired
    with itself (Arganda-Carreras et al., "Crowdsourcing the creation of image segmentation
    algorithms for connectomics", 2015, equations 1-3 with alpha = 0.5). Cells are 4-connected
    regions; true membrane does not count; predicted membrane is one segment.

    Args:
        predicted: where the prediction is cell, ``(H, W)``.
        truth: where the ground truth is cell.
    """
    cells, segments = components(truth)[truth], components(predicted)[truth]
    together = np.unique(cells * (segments.max(initial=0) + 1) + segments, return_counts=True)[1]
    pairs = [
        float((sizes.astype(np.float64) ** 2).sum())
        for sizes in (together, np.bincount(cells), np.bincount(segments))
    ]
    return 1 - 2 * pairs[0] / (pairs[1] + pairs[2]) if cells.size else 0.0


def warping_error(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Return the share of pixels that differ after the ground truth was warped to the prediction.

    Warping (Jain et al., "Boundary learning by optimization with topological constraints", CVPR
    2010, section 3) flips single pixels that differ, as long as this joins, cuts, creates or fills
    no region. Cells are 4-connected, membranes 8-connected. It stops at the first local optimum, so
    the error is an upper bound, as in other implementations.

    Args:
        predicted: where the prediction is cell, ``(H, W)``.
        truth: where the ground truth is cell.
    """
    return float((warp(truth, predicted) != predicted).mean())


def warp(truth: NDArray[np.bool_], towards: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Flip simple points of ``truth`` to their value in ``towards`` until none is left.

    Pixels outside the image are membrane. Membranes grow as far as they can before they shrink
    where they should not be; in the other order, thin ones are left behind in pieces.
    """
    image = np.pad(truth, 1)
    inside = image[1:-1, 1:-1]
    while True:
        before = inside.copy()
        for value in (False, True):
            while _flip_simple_points(image, (inside != value) & (towards == value)):
                pass
        if np.array_equal(inside, before):
            return inside


def _flip_simple_points(image: NDArray[np.bool_], wanted: NDArray[np.bool_]) -> bool:
    """Flip the ``wanted`` points of a padded image that are simple; return whether there were any.

    Pixels two apart are not neighbours, so a quarter of the image can be flipped at once.
    """
    flipped = False
    for top, left in ((0, 0), (0, 1), (1, 0), (1, 1)):
        part = wanted[top::2, left::2]
        height, width = part.shape
        code = np.zeros(part.shape, np.uint8)
        for bit, (row, column) in enumerate(_NEIGHBOUR_OFFSETS):
            neighbour = image[1 + top + row :: 2, 1 + left + column :: 2][:height, :width]
            code |= neighbour.astype(np.uint8) << np.uint8(bit)
        flip = part & _simple_points()[code]
        image[1:-1, 1:-1][top::2, left::2] ^= flip
        flipped = flipped or bool(flip.any())
    return flipped


@cache
def _simple_points() -> NDArray[np.bool_]:
    """Return for the 256 neighbourhoods whether a flip of the central pixel keeps the topology.

    It does if exactly one 4-connected region of cell in the neighbourhood touches the pixel by an
    edge, and membrane touches it too. Then its connectivity number is 1: the number of edge
    neighbours of cell that are not followed by two more cell pixels on the way around (Yokoi,
    Toriwaki and Fukumura, "An analysis of topological properties of digitized binary pictures",
    1975, for 4-connected objects).
    """
    simple = np.zeros(256, bool)
    for code in range(256):
        ring = [bool(code >> bit & 1) for bit in range(8)]
        simple[code] = (
            sum(ring[k] and not (ring[(k + 1) % 8] and ring[(k + 2) % 8]) for k in (1, 3, 5, 7))
            == 1
        )
    return simple
