"""A few of the training masks -> how common each class is, and what a smaller size leaves of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label
from useg.data.dataset import Dataset, read_label, spread
from useg.data.images import resize_label
from useg.scoring.metrics import class_ious, confusion, tally

LOOKED_AT = 8  # masks, evenly spread; the whole set is decoded only when its working size is known


@dataclass(frozen=True)
class Sight:
    """Some label maps ``(H, W)`` of a data set, and the names of its classes."""

    labels: tuple[Label, ...]
    names: tuple[str, ...]

    def shares(self) -> NDArray[np.float64]:
        """Return each class's share of the counted pixels, ``(K,)``."""
        counts = np.sum([np.bincount(label.ravel(), minlength=256)[: len(self.names)] for label in self.labels], 0)
        shares: NDArray[np.float64] = counts / max(1, counts.sum())
        return shares

    def kept(self, factor: float) -> NDArray[np.float64]:
        """Return the IoU of each class ``(K,)`` that labels reach which were reduced by ``factor`` (below 1) and enlarged again; ``nan``: absent.

        No model that works at that size can be expected to find more.
        """
        counts = np.zeros((len(self.names),) * 2, np.int64)
        for label in self.labels:
            height, width = label.shape
            small = resize_label(label, (max(1, round(width * factor)), max(1, round(height * factor))))
            seen = resize_label(small, (width, height))
            unsure = seen == IGNORE
            counts += confusion(np.where(unsure, 0, seen).astype(np.uint8), np.where(unsure, IGNORE, label).astype(np.uint8), len(self.names))
        return class_ious(tally(counts))


def look(dataset: Dataset) -> Sight:
    """Read some of the training masks.

    Raises:
        UsageError: one cannot be read.
    """
    return Sight(tuple(read_label(pair, dataset) for pair in spread(dataset.of("train"), LOOKED_AT)), dataset.classes.names)
