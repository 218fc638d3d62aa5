"""Pictures of the two sides of a split -> how the held-out ones differ from those that the model learnt from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from useg.data.dataset import Dataset, Pair, read_sample
from useg.data.images import Image
from useg.data.parallel import in_parallel

# What augmentation shows the network of it anyway (data/augment.py); a difference within that is none to it.
_BRIGHTNESS = 0.35  # deviations of the pixels
_CONTRAST = 0.3  # of its logarithm
_ZOOM = 0.5  # of the logarithm of the side
_COLOR = 0.2  # deviations of the pixels; augmentation moves all bands alike
_APART = 1.5  # deviations between pictures of one side: less is within what they differ by among themselves


@dataclass(frozen=True)
class Side:
    """Some pictures of one side of a split.

    Args:
        pixels: of each class in each picture, ``(N, K)``.
        bands: mean of each band in each picture, ``(N, C)``.
        contrast: deviation of the pixels in each picture, mean of the bands, ``(N,)``.
        side: root of the number of its pixels, ``(N,)``.
    """

    pixels: NDArray[np.int64]
    bands: NDArray[np.float64]
    contrast: NDArray[np.float64]
    side: NDArray[np.float64]

    @property
    def shares(self) -> NDArray[np.float64]:
        """Each class's share of the counted pixels in each picture, ``(N, K)``."""
        shares: NDArray[np.float64] = self.pixels / np.maximum(self.pixels.sum(1, keepdims=True), 1)
        return shares


@dataclass(frozen=True)
class Difference:
    """What differs, in words: ``what`` (such as ``"darker"``) and the numbers."""

    what: str
    numbers: str


def look_at_side(dataset: Dataset, pairs: Sequence[Pair]) -> Side:
    """Read pairs, on all cores, and measure what may differ.

    Raises:
        UsageError: an unreadable pair.
    """
    num_classes = len(dataset.classes)

    def look(pair: Pair) -> tuple[NDArray[np.int64], NDArray[np.float64], float, float]:
        sample = read_sample(pair, dataset)
        pixels = np.bincount(sample.label.ravel(), minlength=256)[:num_classes]
        return pixels, *traits(sample.image)

    pixels, bands, contrast, side = zip(*in_parallel(look, pairs), strict=True)
    return Side(np.stack(pixels), np.stack(bands), np.array(contrast), np.array(side))


def traits(image: Image) -> tuple[NDArray[np.float64], float, float]:
    """Return a picture's mean of each band ``(C,)``, the deviation of its pixels, and the root of their number."""
    height, width = image.shape[:2]
    step = max(1, int((height * width / 20_000) ** 0.5))  # so many pixels are enough for a mean
    some = np.nan_to_num(image[::step, ::step].astype(np.float64), posinf=0, neginf=0)
    return some.mean((0, 1)), float(some.std((0, 1)).mean()), (height * width) ** 0.5


def differences(trained: Side, held: Side) -> list[Difference]:
    """Say how held-out pictures differ from training pictures, beyond what augmentation shows and what pictures differ by among themselves."""
    if trained.bands.shape[1] != held.bands.shape[1]:
        return []
    unit = float(np.sqrt(np.mean(trained.contrast**2) + trained.bands.mean(1).var())) or 1.0
    found = []
    grey = [side.bands.mean(1) for side in (trained, held)]
    if change := _moved(grey[0] / unit, grey[1] / unit, _BRIGHTNESS):
        found.append(
            Difference("brighter" if change > 0 else "darker", f"mean brightness {grey[0].mean():.4g} in training, {grey[1].mean():.4g} held out")
        )
    contrasts = [np.log(np.maximum(side.contrast, 1e-6 * unit)) for side in (trained, held)]
    if change := _moved(contrasts[0], contrasts[1], _CONTRAST):
        values = [side.contrast.mean() for side in (trained, held)]
        found.append(
            Difference(
                "richer in contrast" if change > 0 else "flatter",
                f"mean deviation of the pixels {values[0]:.4g} in training, {values[1]:.4g} held out",
            )
        )
    casts = [(side.bands - side.bands.mean(1, keepdims=True)) / unit for side in (trained, held)]
    bands = [band for band in range(casts[0].shape[1]) if _moved(casts[0][:, band], casts[1][:, band], _COLOR)]
    if bands:
        said = (" ".join(f"{value:.4g}" for value in side.bands.mean(0)) for side in (trained, held))
        found.append(Difference("of another colour", f"mean of the bands {next(said)} in training, {next(said)} held out"))
    if change := _moved(np.log(trained.side), np.log(held.side), _ZOOM):
        values = [np.median(side.side) for side in (trained, held)]
        found.append(
            Difference("larger" if change > 0 else "smaller", f"about {values[0]:.0f} pixels each way in training, {values[1]:.0f} held out")
        )
    return found


def _moved(trained: NDArray[np.float64], held: NDArray[np.float64], least: float) -> float:
    """Return by how much the mean moved, or 0 where that is less than ``least`` or than pictures of one side differ by."""
    change = float(held.mean() - trained.mean())
    spread = float(np.sqrt((trained.var() + held.var()) / 2))
    return change if abs(change) > max(least, _APART * spread) else 0.0
