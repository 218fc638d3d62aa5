"""Some label maps of a data set -> the statistics that the plan of a training run depends on.

These are the shares of the classes, how well they survive a smaller size, and how much the position
of a pixel in the image tells about its class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label, count_pixels
from useg.data.dataset import Dataset, pick_evenly, read_label
from useg.images.files import resize_label
from useg.scoring.metrics import class_ious, confusion, tally

# Training masks that are read to plan, evenly spread over the data set.
NUM_MASKS_READ = 16

# Positions are the cells of a grid with this many rows and columns. The information that is due to
# chance is measured on this many random shifts of the grids.
GRID, NUM_SHIFTS = 8, 10


@dataclass(frozen=True)
class LabelStatistics:
    """Some label maps ``(H, W)`` of a data set, and the names of its classes."""

    labels: tuple[Label, ...]
    names: tuple[str, ...]

    def shares(self) -> NDArray[np.float64]:
        """Return each class's share of the counted pixels, ``(K,)``."""
        num_classes = len(self.names)
        counts = np.sum([count_pixels(label, num_classes) for label in self.labels], 0)
        shares: NDArray[np.float64] = counts / max(1, counts.sum())
        return shares

    def iou_after_reduction(self, factor: float) -> NDArray[np.float64]:
        """Return each class's IoU ``(K,)`` between the labels and their reduced and enlarged form.

        A model that works at that size cannot be expected to do better. A class that is absent has
        NaN.

        Args:
            factor: Size of the reduced labels, below 1.
        """
        counts = np.zeros((len(self.names),) * 2, np.int64)
        for label in self.labels:
            height, width = label.shape
            size = max(1, round(width * factor)), max(1, round(height * factor))
            restored = resize_label(resize_label(label, size), (width, height))
            unknown = restored == IGNORE
            counts += confusion(
                np.where(unknown, 0, restored).astype(np.uint8),
                np.where(unknown, IGNORE, label).astype(np.uint8),
                len(self.names),
            )
        return class_ious(tally(counts))

    @cached_property
    def grids(self) -> NDArray[np.float64]:
        """Each class's share of the pixels in each cell, ``(N, GRID, GRID, K)``."""
        num_classes, grids = len(self.names), []
        for label in self.labels:
            rows, columns = (np.arange(side) * GRID // side for side in label.shape)
            cells = rows[:, None] * GRID + columns
            counted = label < num_classes
            numbers = cells[counted] * num_classes + label[counted]
            counts = np.bincount(numbers, minlength=GRID * GRID * num_classes)
            sizes = np.bincount(cells.ravel(), minlength=GRID * GRID)
            shares = counts.reshape(-1, num_classes) / np.maximum(1, sizes)[:, None]
            grids.append(shares.reshape(GRID, GRID, num_classes))
        return np.stack(grids)

    def position_information(self) -> float:
        """Return how much the position of a pixel tells about its class, 0 to 1.

        It is the mutual information of position and class as a share of the classes' entropy, less
        the part that is due to chance; 0 for a single image. It is high if each image shows a whole
        scene or object in its usual orientation, and near 0 if images are cut out of something
        larger, such as tissue or land.
        """
        num_images = len(self.labels)
        if num_images < 2:
            return 0.0
        random = np.random.default_rng(0)
        by_chance = np.mean(
            [_information(_shift_each(self.grids, random)) for _ in range(NUM_SHIFTS)]
        )
        # The chance level includes the information that an image has about itself.
        unbiased = (_information(self.grids) - by_chance) * num_images / (num_images - 1)
        return max(0.0, float(unbiased))

    def vertical_information(self) -> float:
        """Return how much the vertical position of a pixel tells about its class, 0 to 1.

        It is what :meth:`position_information` loses if each image is added upside down.
        """
        both = np.concatenate([self.grids, self.grids[:, ::-1]])
        return max(0.0, float(_information(self.grids) - _information(both)))


def measure_labels(dataset: Dataset) -> LabelStatistics:
    """Read some of the training masks.

    Raises:
        UsageError: A mask cannot be read.
    """
    pairs = pick_evenly(dataset.of("train"), NUM_MASKS_READ)
    labels = tuple(read_label(pair, dataset) for pair in pairs)
    return LabelStatistics(labels, dataset.classes.names)


def _information(grids: Sequence[NDArray[np.float64]] | NDArray[np.float64]) -> float:
    """Return the mutual information of position and class as a share of the classes' entropy."""
    shares = np.mean(grids, axis=0)
    counted = shares.sum(2)
    if not counted.any():
        return 0.0
    in_all = float(_entropy(shares.sum((0, 1)) / counted.sum()))
    in_places = _entropy(shares / np.maximum(1e-12, counted)[..., None])
    in_place = float(np.average(in_places, weights=counted))
    return (in_all - in_place) / in_all if in_all > 0 else 0.0


def _entropy(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    entropy: NDArray[np.float64] = -(shares * np.log(np.maximum(shares, 1e-12))).sum(-1)
    return entropy


def _shift_each(
    grids: NDArray[np.float64], random: np.random.Generator
) -> list[NDArray[np.float64]]:
    """Shift each grid by a random number of rows and columns, around its edges."""
    shifts = random.integers(GRID, size=(len(grids), 2))
    return [np.roll(grid, shift, (0, 1)) for grid, shift in zip(grids, shifts, strict=True)]
