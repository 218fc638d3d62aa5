"""A suspicious pair -> read again and looked at closely: turned, mirrored, moved further, or the mask of another image?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.data.dataset import read_pair_image
from useg.data.doctor.edges import TURNS, at, clearness, fit, moved, peak
from useg.data.doctor.looks import Case, Look, read_codes
from useg.errors import UsageError

_COARSE = 4  # the factor by which pictures are reduced to find large shifts


def read_again(case: Case, look: Look) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Read a pair's image ``(H, W, C)`` and what its mask stores ``(H, W)``; None when that fails now."""
    try:
        return read_pair_image(look.pair), read_codes(look.pair, case.dataset)
    except UsageError:
        return None


def best_turn(case: Case, look: Look, names: Sequence[str]) -> str:
    """Return which of the turns makes the mask fit its image best; the first when nothing shows it."""
    pixels = read_again(case, look)
    if pixels is None:
        return names[0]
    fits = {name: fitted for name in names if (fitted := fit(pixels[0], TURNS[name](pixels[1]))) is not None}
    return max(fits, key=lambda name: at(fits[name])) if fits else names[0]


def best_shift(image: NDArray[Any], codes: NDArray[Any]) -> tuple[tuple[int, int], float]:
    """Return the shift ``(right, down)`` of the mask, up to 32 pixels, with which it fits best, and how well: ``(shift, strength)``."""
    coarse = fit(image[::_COARSE, ::_COARSE], codes[::_COARSE, ::_COARSE])
    starts = {(0, 0)}
    if coarse is not None:
        right, down = peak(coarse)
        starts.add((right * _COARSE, down * _COARSE))
    best = ((0, 0), 0.0)
    for right, down in starts:
        H, W = codes.shape
        rows, columns = slice(abs(down), H - abs(down) or None), slice(abs(right), W - abs(right) or None)
        fitted = fit(image[rows, columns], moved(codes, (right, down), 0)[rows, columns])
        if fitted is not None:
            further = peak(fitted)
            strength = at(fitted, further)
            if strength > best[1] and clearness(fitted, further) > 3:
                best = ((right + further[0], down + further[1]), strength)
    return best


def best_partner(pixels: Sequence[tuple[NDArray[Any], NDArray[Any]] | None], which: int) -> tuple[int, float]:
    """Return which image the mask of pair ``which`` fits best, and how well."""
    own = pixels[which]
    best = (which, 0.0)
    for k, other in enumerate(pixels):
        if own is None or other is None or other[0].shape[:2] != own[1].shape:
            continue
        fitted = fit(other[0], own[1])
        if fitted is not None and at(fitted) > best[1] and clearness(fitted) > 3:
            best = (k, at(fitted))
    return best


def unsupported(image: NDArray[Any], codes: NDArray[Any]) -> NDArray[np.bool_]:
    """Mark class boundaries ``(H, W)`` near which the image does not change: the largest step within 2 pixels is no more than its noise."""
    band = image[..., image.shape[2] // 2].astype(np.float32)
    step = np.zeros(band.shape, np.float32)
    step[:, 1:] = np.abs(np.diff(band, axis=1))
    step[1:] = np.maximum(step[1:], np.abs(np.diff(band, axis=0)))
    boundary = np.zeros(codes.shape, bool)
    boundary[:, 1:] = codes[:, 1:] != codes[:, :-1]
    boundary[1:] |= codes[1:] != codes[:-1]
    nearest = np.lib.stride_tricks.sliding_window_view(np.pad(step, 2), (5, 5)).max((2, 3))
    lost: NDArray[np.bool_] = boundary & (nearest <= np.quantile(nearest, 0.3))
    return lost
