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


@dataclass(frozen=True)
class Window:
    """Which pixels of a sample a crop is made of, flipped and mirrored.

    Args:
        rows, columns: ``(2, height + 2 margin)`` and ``(2, width + 2 margin)``: of the image, the two between which each lies.
        down, right: how near it is to the second, 0 to 1, float32.
        label_rows, label_columns: ``(height,)`` and ``(width,)``: of the label, the nearest.
    """

    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    down: NDArray[np.float32]
    right: NDArray[np.float32]
    label_rows: NDArray[np.intp]
    label_columns: NDArray[np.intp]


def look_through(shape: tuple[int, int], crop: Crop, size: tuple[int, int], margin: int) -> Window:
    """Find the pixels of a crop: of ``size`` (width, height) in the label, of a sample of ``shape`` (height, width)."""
    rows = _positions(crop.top, crop.zoom, size[1], margin, crop.turn)
    columns = _positions(crop.left, crop.zoom, size[0], margin, crop.mirror)
    inner, found = slice(margin, -margin or None), []
    for places, length in ((rows, shape[0]), (columns, shape[1])):
        first = np.floor(places).astype(np.intp)
        pairs = np.stack([mirrored(first, length), mirrored(first + 1, length)])
        found.append((pairs, (places - first).astype(np.float32), mirrored(np.round(places[inner]).astype(np.intp), length)))
    (rows_, down, label_rows), (columns_, right, label_columns) = found
    return Window(rows_, columns_, down, right, label_rows, label_columns)


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
    height, width = sample.label.shape
    window = look_through((height, width), crop, size, margin)
    image = _bilinear(sample.image, window)
    image *= _along(crop.gain, image)
    image += _along(crop.offset, image)
    label = sample.label.take(window.label_rows, 0).take(window.label_columns, 1)
    return image.reshape(window.rows.shape[1], window.columns.shape[1], -1), label


def _along(amount: NDArray[np.float32] | float, image: NDArray[np.float32]) -> NDArray[np.float32] | float:
    """Repeat what there is of each band along a row ``(columns * C)``."""
    return amount if isinstance(amount, float) else np.tile(amount, image.shape[1] // len(amount))


def _positions(start: float, zoom: float, size: int, margin: int, flip: bool) -> NDArray[np.float64]:
    """Pixel centres of a crop in the coordinates of the sample (pixel k has its centre at k)."""
    positions = start + (np.arange(-margin, size + margin, dtype=np.float64) + 0.5) * zoom - 0.5
    return positions[::-1] if flip else positions


def _bilinear(image: NDArray[np.generic], window: Window) -> NDArray[np.float32]:
    """Sample ``image`` (H, W, C) at every pair of a row and a column, linear in each direction.

    Returns:
        ``(rows, columns * C)`` float32: numpy is several times as fast along long rows as along a few bands.
    """
    low, bands = window.rows.shape[1], image.shape[2]
    upper = image.take(window.rows[0], axis=0).astype(np.float32)
    if window.down.any():
        upper += (image.take(window.rows[1], axis=0).astype(np.float32) - upper) * window.down[:, None, None]
    west: NDArray[np.float32] = upper.take(window.columns[0], axis=1).reshape(low, -1)
    if window.right.any():
        east = upper.take(window.columns[1], axis=1).reshape(low, -1)
        east -= west
        east *= np.repeat(window.right, bands)
        west += east
    return west


def mirrored(index: NDArray[np.intp], length: int) -> NDArray[np.intp]:
    """Fold indices into 0..length-1 by mirroring at the edges, as often as needed: -1 -> 0, length -> length - 1."""
    folded = np.mod(index, 2 * length)
    inside: NDArray[np.intp] = np.minimum(folded, 2 * length - 1 - folded)
    return inside
