"""Cached samples -> batches on the device: batch number s is a function of (seed, s) alone, whichever process asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from useg.data.augment import Crop, draw_crop, take
from useg.data.parallel import ahead
from useg.data.samples import CachedSample
from useg.ranks import rank, world
from useg.training.resident import Resident


@dataclass(frozen=True)
class Batches:
    """Endless batches of crops.

    Args:
        samples: the training samples; each is seen once in an epoch, in an order drawn anew.
        size: (width, height) of a crop of the label.
        batch: crops in a batch, of all processes together; a batch may reach from one epoch into the next.
        seed: of all randomness.
        flips: ``"horizontal"`` or ``"all"``, or None for crops that are only cut out, not flipped, scaled or recoloured.
        mean, std: of the pixels per band: what changes of colour are relative to.
        margin: pixels by which the crop of the image is larger on each side.
        device: where the batches go.
        resident: the samples on that device, where they fit; crops are then cut there.
        coarse_size: of crops that show everything at half the size.
    """

    samples: Sequence[CachedSample]
    size: tuple[int, int]
    batch: int
    seed: int
    flips: str | None
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    margin: int
    device: torch.device
    resident: Resident | None = None
    coarse_size: tuple[int, int] = (0, 0)

    @property
    def per_epoch(self) -> float:
        """Batches in an epoch, not rounded."""
        return len(self.samples) / self.batch

    def stream(self, first: int, coarse: Callable[[int], bool] = lambda number: False) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches from ``first`` on, without end; the next one is cut while the network works on this one.

        Args:
            first: number of the first batch.
            coarse: whether a batch shows everything at half the size.
        """
        yield from ahead(self.at(number, coarse(number)) for number in count(first))

    def at(self, number: int, coarse: bool = False) -> tuple[Tensor, Tensor]:
        """Cut one batch, or of it what is this process's part: raw pixels (N, C, H, W) float32 and ids (N, h, w) int64."""
        part = self.batch // world()
        first = number * self.batch + rank() * part
        size, zoom = (self.coarse_size, 2) if coarse else (self.size, 1)
        drawn = [self._draw(*divmod(place, len(self.samples)), size, zoom) for place in range(first, first + part)]
        if self.resident:
            seen = [self.resident.take(index, crop, size, self.margin) for index, crop in drawn]
            return torch.stack([image for image, _ in seen]).permute(0, 3, 1, 2), torch.stack([label for _, label in seen])
        crops = [take(self.samples[index], crop, size, self.margin) for index, crop in drawn]
        x = torch.from_numpy(np.stack([image for image, _ in crops])).permute(0, 3, 1, 2)  # channels last as it is
        target = torch.from_numpy(np.stack([label for _, label in crops]).astype(np.int64))
        return x.to(self.device, non_blocking=True), target.to(self.device, non_blocking=True)

    def _draw(self, epoch: int, position: int, size: tuple[int, int], zoom: int) -> tuple[int, Crop]:
        """Return which sample it is, and the crop of it: of ``size`` (width, height) after it was reduced ``zoom`` times."""
        index = int(_order(self.seed, epoch, len(self.samples))[position])
        rng = np.random.default_rng((self.seed, epoch, index))
        wide, high = zoom * size[0], zoom * size[1]
        height, width = self.samples[index].label.shape
        if self.flips:
            crop = draw_crop(rng, height, width, (wide, high), self.flips, self.mean, self.std)
        else:
            top, left = (int(rng.integers(min(0, room), max(0, room) + 1)) for room in (height - high, width - wide))
            crop = Crop(top, left)
        return index, replace(crop, zoom=zoom * crop.zoom)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.intp]:
    """The order in which an epoch visits the samples."""
    return np.random.default_rng((seed, epoch)).permutation(count)
