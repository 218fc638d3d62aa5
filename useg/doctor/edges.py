"""Image and mask -> how well the mask's class boundaries lie on the image's edges.

Masks that are shifted, turned or of another image are found by it (:mod:`useg.doctor.alignment`),
and so are masks that a model learned one pixel off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.data.dataset import CodeMap
from useg.errors import format_count

# Edge alignment is measured for shifts of the mask up to this far, in each direction.
MAX_SHIFT_PIXELS = 8

# Boundaries are searched in about this many rows of a mask.
_MAX_SEARCHED_ROWS = 150

# Boundary pixels in each direction: more do not help, and fewer than the minimum are too few.
_MAX_BOUNDARY_PIXELS = 160
_MIN_BOUNDARY_PIXELS = 24

# (2 * MAX_SHIFT_PIXELS + 1, 2 * MAX_SHIFT_PIXELS + 1), mean 1: strength of the image's edges under
# the boundaries of a mask that is moved by (row, column) - MAX_SHIFT_PIXELS
EdgeAlignment = NDArray[np.float32]


def measure_edge_alignment(image: NDArray[Any], codes: CodeMap) -> EdgeAlignment | None:
    """Measure the image's edges under the mask's class boundaries, for every small shift.

    If a mask fits, the image changes more across a class boundary than next to it. A few hundred
    boundary pixels are enough to measure this, in a millisecond, for any image size.

    Args:
        image: ``(H, W, C)``; only the middle band is used.
        codes: ``(H, W)``, equal where the class is equal.

    Returns:
        Strength of the image's edges for each shift, relative to the mean of all shifts; None if
        there are too few boundaries.
    """
    if min(codes.shape) < 4 * MAX_SHIFT_PIXELS:
        return None
    band = image[..., image.shape[2] // 2]
    side = 2 * MAX_SHIFT_PIXELS + 2
    windows = np.lib.stride_tricks.sliding_window_view(band, (side, side))
    alignments = []
    for axis in (0, 1):
        rows, columns = _sample_boundary(codes, axis)
        if len(rows) < _MIN_BOUNDARY_PIXELS:
            continue
        patches = windows[rows - MAX_SHIFT_PIXELS, columns - MAX_SHIFT_PIXELS]
        here = patches[:, :-1, :-1]
        ahead = patches[:, 1:, :-1] if axis == 0 else patches[:, :-1, 1:]
        steps = (np.maximum(ahead, here) - np.minimum(ahead, here)).astype(np.float32)
        # The root keeps a single strong edge from deciding alone.
        strength = np.sqrt(steps).mean(0)
        # A blank image has no edges.
        if strength.any():
            alignments.append(strength / strength.mean())
    return np.mean(alignments, axis=0, dtype=np.float32) if alignments else None


def _sample_boundary(codes: CodeMap, axis: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return rows and columns of pixels whose next pixel along ``axis`` has another code.

    They are spread evenly over the mask and keep away from its border.
    """
    step = max(1, codes.shape[0] // _MAX_SEARCHED_ROWS)
    near, far = MAX_SHIFT_PIXELS, -MAX_SHIFT_PIXELS
    inner = codes[near : far - 1 : step, near : far - 1]
    if axis == 0:
        ahead = codes[near + 1 : far : step, near : far - 1]
    else:
        ahead = codes[near : far - 1 : step, near + 1 : far]
    places = np.flatnonzero(inner != ahead)
    if len(places) > _MAX_BOUNDARY_PIXELS:
        chosen = np.linspace(0, len(places) - 1, _MAX_BOUNDARY_PIXELS).astype(np.intp)
        places = places[chosen]
    rows, columns = np.divmod(places, inner.shape[1])
    return rows * step + near, columns + near


def strength_at(alignment: EdgeAlignment, shift: tuple[int, int] = (0, 0)) -> float:
    """Return the edge strength at ``shift = (right, down)``, with a tolerance of one pixel."""
    x, y = shift[0] + MAX_SHIFT_PIXELS, shift[1] + MAX_SHIFT_PIXELS
    return float(alignment[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].max())


def find_strongest_shift(alignment: EdgeAlignment) -> tuple[int, int]:
    """Return the shift ``(right, down)`` of the mask with the strongest edges."""
    row, column = np.unravel_index(int(alignment.argmax()), alignment.shape)
    return int(column) - MAX_SHIFT_PIXELS, int(row) - MAX_SHIFT_PIXELS


def shift_z_score(alignment: EdgeAlignment, shift: tuple[int, int] = (0, 0)) -> float:
    """Return by how many standard deviations ``shift`` exceeds shifts over 3 pixels from it."""
    places = np.arange(-MAX_SHIFT_PIXELS, MAX_SHIFT_PIXELS + 1)
    distance = np.maximum(np.abs(places - shift[1])[:, None], np.abs(places - shift[0]))
    others = alignment[distance > 3]
    return (strength_at(alignment, shift) - float(others.mean())) / max(float(others.std()), 1e-3)


def shift_label(label: NDArray[Any], shift: tuple[int, int], fill: int) -> NDArray[Any]:
    """Move a label map ``(H, W)`` right and down; pixels that become free get ``fill``."""
    right, down = shift
    H, W = label.shape
    result = np.full_like(label, fill)
    target = (
        slice(max(0, down), H + min(0, down)),
        slice(max(0, right), W + min(0, right)),
    )
    source = (
        slice(max(0, -down), H - max(0, down)),
        slice(max(0, -right), W - max(0, right)),
    )
    result[target] = label[source]
    return result


def find_unsupported_boundaries(image: NDArray[Any], codes: CodeMap) -> NDArray[np.bool_]:
    """Mark class boundaries ``(H, W)`` near which the image does not change.

    There the largest step of the image within 2 pixels is among the smallest 30 % of all places.
    """
    band = image[..., image.shape[2] // 2].astype(np.float32)
    step = np.zeros(band.shape, np.float32)
    step[:, 1:] = np.abs(np.diff(band, axis=1))
    step[1:] = np.maximum(step[1:], np.abs(np.diff(band, axis=0)))
    boundary = np.zeros(codes.shape, bool)
    boundary[:, 1:] = codes[:, 1:] != codes[:, :-1]
    boundary[1:] |= codes[1:] != codes[:-1]
    nearby = np.lib.stride_tricks.sliding_window_view(np.pad(step, 2), (5, 5)).max((2, 3))
    unsupported: NDArray[np.bool_] = boundary & (nearby <= np.quantile(nearby, 0.3))
    return unsupported


def describe_shift(shift: tuple[int, int]) -> str:
    """``(3, -2)`` -> ``"3 pixels right and 2 pixels up"``."""
    right, down = shift
    parts = []
    if right:
        parts.append(format_count(abs(right), "pixel") + (" right" if right > 0 else " left"))
    if down:
        parts.append(format_count(abs(down), "pixel") + (" down" if down > 0 else " up"))
    return " and ".join(parts)
