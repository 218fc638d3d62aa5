"""What is in each of many units -> which of them to hold out, so that both sides have their share of everything."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SLACK = 2.0  # factor by which a class's share may miss the wanted one
_SIZE_SLACK = 1.25  # and the number of pictures


def hold_out(contents: NDArray[np.int64], sizes: NDArray[np.int64], draws: NDArray[np.float64], holdout: float) -> NDArray[np.bool_]:
    """Choose units: by lot first, then as few as possible change sides until shares fit.

    Since the lot is each unit's own and shares may miss by a factor, a further unit moves few others.

    Args:
        contents: ``(N, K)`` how much of each class a unit (a picture, or pictures that belong together) holds; classes in a single unit are
            passed over. K may be 0.
        sizes: ``(N,)`` pictures in each unit.
        draws: ``(N,)`` 0..1, each unit's lot: below ``holdout`` it is held out. It also settles ties.
        holdout: share of the pictures, and of each class, to hold out.

    Returns:
        ``(N,)`` true where held out; never all, never none. N is at least 2.
    """
    known = contents[:, (contents > 0).sum(0) > 1]
    shares = np.column_stack((known, sizes)).astype(np.float64)
    shares /= shares.sum(0)
    slack = np.log([_SLACK] * known.shape[1] + [_SIZE_SLACK])
    held = draws < holdout
    held[np.argmin(draws)], held[np.argmax(draws)] = True, False
    for _ in range(len(held)):
        now = shares[held].sum(0)
        moved = now + np.where(held, -1, 1)[:, None] * shares
        costs = _misses(moved, holdout, slack)
        if held.sum() == 1:
            costs[held] = np.inf
        if (~held).sum() == 1:
            costs[~held] = np.inf
        best = np.lexsort((draws, costs))[0]
        if costs[best] >= _misses(now[None], holdout, slack)[0] - 1e-9:
            break
        held[best] = not held[best]
    return held


def _misses(shares: NDArray[np.float64], wanted: float, slack: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how badly the held out shares ``(N, K)`` miss, ``(N,)``; a share of nothing is as bad as one of a hundredth of the wanted."""
    off = np.zeros(len(shares))
    for side, aim in ((shares, wanted), (1 - shares, 1 - wanted)):
        ratio = np.abs(np.log((np.maximum(side, 0) + 0.01 * aim) / (1.01 * aim)))
        off += (np.maximum(0, ratio - slack) ** 2).sum(1)
    return off
