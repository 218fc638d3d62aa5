"""A cached sample -> a crop of it, flipped, scaled and recoloured; all of it a function of (seed, epoch, index).

Pixels outside the picture are its mirror image, as in the paper's overlap-tile strategy. With an unpadded network the crop
of the image is larger than the crop of the label by ``margin`` on each side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from useg.data.samples import CachedSample

ZOOM = 0.6, 1.15  # pixels of the sample per pixel of a crop, from and to
CONTRAST = 0.3  # natural logarithm of the most by which all bands' contrast changes
TINT = 0.08  # and of the most by which each band's changes beside
BRIGHTNESS = 0.35  # deviations by which brightness changes at most


@dataclass(frozen=True)
class Crop:
    """Where and how to look.

    Args:
        top, left: corner of the window in the label, in its pixels; may lie outside.
        zoom: pixels of the sample per pixel of the crop (1 copies, below 1 enlarges).
        mirror, turn: flip left-right, flip top-bottom.
        gain, offset: per band (or one number), applied to the pixels as ``x * gain + offset``.
    """

    top: float
    left: float
    zoom: float = 1.0
    mirror: bool = False
    turn: bool = False
    gain: NDArray[np.float32] | float = 1.0
    offset: NDArray[np.float32] | float = 0.0


def draw_crop(
    rng: np.random.Generator, height: int, width: int, size: tuple[int, int], flips: str, mean: NDArray[np.float32], std: NDArray[np.float32]
) -> Crop:
    """Draw a random crop of ``size`` (width, height) from a sample of ``height`` x ``width``.

    Args:
        rng: source of all randomness.
        height, width: of the sample.
        size: (width, height) of the label's crop.
        flips: ``"horizontal"`` or ``"all"``.
        mean, std: of the pixels, per band; brightness and contrast change relative to them.
    """
    zoom = float(np.exp(rng.uniform(*np.log(ZOOM))))
    top, left = (_corner(rng, have, want * zoom) for have, want in ((height, size[1]), (width, size[0])))
    contrast = np.exp(rng.uniform(-CONTRAST, CONTRAST)) * np.exp(rng.uniform(-TINT, TINT, mean.shape))
    brightness = rng.uniform(-BRIGHTNESS, BRIGHTNESS) * std
    return Crop(
        top,
        left,
        zoom,
        mirror=bool(rng.random() < 0.5),
        turn=flips == "all" and bool(rng.random() < 0.5),
        gain=contrast.astype(np.float32),
        offset=(mean * (1 - contrast) + brightness).astype(np.float32),
    )


def _corner(rng: np.random.Generator, have: int, want: float) -> float:
    """Where a window of ``want`` pixels starts: anywhere inside when it fits, centred with some play when it does not."""
    low, high = sorted((0.0, have - want))
    return float(rng.uniform(low, high))


def take(sample: CachedSample, crop: Crop, size: tuple[int, int], margin: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Cut a crop out of a sample.

    Args:
        sample: what to look at.
        crop: where and how.
        size: (width, height) of the label's crop.
        margin: further pixels on each side of the image's crop.

    Returns:
        Image ``(height + 2 margin, width + 2 margin, C)`` float32 in raw pixel units, and label ``(height, width)`` uint8.
    """
    rows = _positions(crop.top, crop.zoom, size[1], margin, crop.turn)
    columns = _positions(crop.left, crop.zoom, size[0], margin, crop.mirror)
    image = _bilinear(sample.image, rows, columns)
    image *= _along(crop.gain, image)
    image += _along(crop.offset, image)
    inner = slice(margin, -margin or None)
    down, right = (
        mirrored(np.round(place[inner]).astype(np.intp), length) for place, length in zip((rows, columns), sample.label.shape, strict=True)
    )
    return image.reshape(len(rows), len(columns), -1), sample.label.take(down, 0).take(right, 1)


def _along(amount: NDArray[np.float32] | float, image: NDArray[np.float32]) -> NDArray[np.float32] | float:
    """Repeat what there is of each band along a row ``(columns * C)``."""
    return amount if isinstance(amount, float) else np.tile(amount, image.shape[1] // len(amount))


def _positions(start: float, zoom: float, size: int, margin: int, flip: bool) -> NDArray[np.float64]:
    """Pixel centres of a crop in the coordinates of the sample (pixel k has its centre at k)."""
    positions = start + (np.arange(-margin, size + margin, dtype=np.float64) + 0.5) * zoom - 0.5
    return positions[::-1] if flip else positions


def _bilinear(image: NDArray[np.generic], rows: NDArray[np.float64], columns: NDArray[np.float64]) -> NDArray[np.float32]:
    """Sample ``image`` (H, W, C) at every pair of a row and a column: linear in each direction, mirrored outside.

    Returns:
        ``(rows, columns * C)`` float32: numpy is several times as fast along long rows as along a few bands.
    """
    (height, width, bands), low = image.shape, len(rows)
    top, left = np.floor(rows).astype(np.intp), np.floor(columns).astype(np.intp)
    down, right = (rows - top).astype(np.float32)[:, None], (columns - left).astype(np.float32)
    upper = image.take(mirrored(top, height), 0).astype(np.float32)
    if not down.any() and not right.any():  # whole pixels: copy
        return upper.take(mirrored(left, width), 1).reshape(low, -1)
    lower = image.take(mirrored(top + 1, height), 0).astype(np.float32)
    upper += (lower - upper) * down[:, :, None]
    west, east = (upper.take(mirrored(left + k, width), 1).reshape(low, -1) for k in (0, 1))
    east -= west
    east *= np.repeat(right, bands)
    west += east
    return west


def mirrored(index: NDArray[np.intp], length: int) -> NDArray[np.intp]:
    """Fold indices into 0..length-1 by mirroring at the edges, as often as needed: -1 -> 0, length -> length - 1."""
    folded = np.mod(index, 2 * length)
    inside: NDArray[np.intp] = np.minimum(folded, 2 * length - 1 - folded)
    return inside
