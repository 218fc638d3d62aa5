"""Image + mask -> how well the edges between classes lie on edges of the image, for every small shift of the mask.

Where a mask fits, the picture changes more across a class boundary than beside it. A few hundred boundary pixels show that in a
millisecond, at any size of the picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import Label

REACH = 8  # pixels that a fit looks around
_ROWS = 150  # rows of a mask that are searched for boundaries, about
_POINTS = 160  # boundary pixels looked at, in each direction
_FEW = 24  # fewer say nothing

Fit = NDArray[np.float32]  # (2 * REACH + 1, 2 * REACH + 1): edge strength under the boundary moved by (row, column) - REACH, mean 1
Codes = NDArray[Any]  # (H, W): what a mask stores


def fit(image: NDArray[Any], codes: Codes) -> Fit | None:
    """Measure the image's edges under the mask's boundaries.

    Args:
        image: ``(H, W, C)``; one band, the middle one, is looked at.
        codes: ``(H, W)``, equal where the class is.

    Returns:
        Strength of the image's edges for each shift, relative to the mean of all shifts; None where there are too few boundaries.
    """
    if min(codes.shape) < 4 * REACH:
        return None
    band = image[..., image.shape[2] // 2]
    windows = np.lib.stride_tricks.sliding_window_view(band, (2 * REACH + 2, 2 * REACH + 2))
    maps = []
    for axis in (0, 1):
        rows, columns = _boundary(codes, axis)
        if len(rows) < _FEW:
            continue
        patches = windows[rows - REACH, columns - REACH]
        ahead = patches[:, 1:, :-1] if axis == 0 else patches[:, :-1, 1:]
        here = patches[:, :-1, :-1]
        strength = np.sqrt((np.maximum(ahead, here) - np.minimum(ahead, here)).astype(np.float32)).mean(0)  # the root tames single strong edges
        if strength.any():  # a blank image has no edges to lie on
            maps.append(strength / strength.mean())
    return np.mean(maps, axis=0, dtype=np.float32) if maps else None


def _boundary(codes: Codes, axis: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return rows and columns of pixels whose next pixel along ``axis`` is of another class, evenly picked, away from the border."""
    step = max(1, codes.shape[0] // _ROWS)
    inner = codes[REACH : -REACH - 1 : step, REACH : -REACH - 1]
    ahead = codes[REACH + 1 : -REACH : step, REACH : -REACH - 1] if axis == 0 else codes[REACH : -REACH - 1 : step, REACH + 1 : -REACH]
    places = np.flatnonzero(inner != ahead)
    if len(places) > _POINTS:
        places = places[np.linspace(0, len(places) - 1, _POINTS).astype(np.intp)]
    rows, columns = np.divmod(places, inner.shape[1])
    return rows * step + REACH, columns + REACH


def at(fitted: Fit, shift: tuple[int, int] = (0, 0)) -> float:
    """Return the edge strength where the mask is moved by ``shift = (right, down)``, one pixel of play included."""
    x, y = shift[0] + REACH, shift[1] + REACH
    return float(fitted[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].max())


def peak(fitted: Fit) -> tuple[int, int]:
    """Return the shift ``(right, down)`` of the mask that fits best."""
    row, column = np.unravel_index(int(fitted.argmax()), fitted.shape)
    return int(column) - REACH, int(row) - REACH


def clearness(fitted: Fit, shift: tuple[int, int] = (0, 0)) -> float:
    """Return by how many standard deviations the fit at ``shift`` stands out from shifts that are further away."""
    places = np.arange(-REACH, REACH + 1)
    rest = fitted[np.maximum(np.abs(places - shift[1])[:, None], np.abs(places - shift[0])) > 3]
    return (at(fitted, shift) - float(rest.mean())) / max(float(rest.std()), 1e-3)


def moved(label: NDArray[Any], shift: tuple[int, int], fill: int) -> NDArray[Any]:
    """Move a label map ``(H, W)`` right and down; what nothing moved into is ``fill``."""
    right, down = shift
    H, W = label.shape
    result = np.full_like(label, fill)
    result[max(0, down) : H + min(0, down), max(0, right) : W + min(0, right)] = label[
        max(0, -down) : H - max(0, down), max(0, -right) : W - max(0, right)
    ]
    return result


# The ways in which a mask may have been turned or mirrored, in words.
TURNS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "transposed": lambda label: label.T,
    "turned by 90 degrees": lambda label: np.rot90(label, -1),
    "turned by 270 degrees": lambda label: np.rot90(label, 1),
    "transposed and turned by 180 degrees": lambda label: label[::-1, ::-1].T,
    "turned by 180 degrees": lambda label: label[::-1, ::-1],
    "mirrored left to right": lambda label: label[:, ::-1],
    "turned upside down": lambda label: label[::-1],
}


def turner(turn: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[Label], Label]:
    """Return what turns a label map."""
    return lambda label: np.ascontiguousarray(turn(label))
