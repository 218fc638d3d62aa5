"""The integers that describe a network, and the sizes and bands at which images enter it.

The cache, training, tiles, exports and runtimes share these rules: margin, stride, working size,
bands, mirroring. Needs numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from useg.errors import UsageError
from useg.images.files import Image


@dataclass(frozen=True)
class WorkingSize:
    """At what size a model looks at a picture.

    Args:
        frame: (width, height) to which every whole picture is brought, its proportions kept (a camera: the frame is the scene), or None.
        scale: factor applied to every picture when ``frame`` is None (microscopes, satellites: a pixel has a size in the world).
    """

    frame: tuple[int, int] | None = None
    scale: float = 1.0

    def of(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) at which a picture of ``width`` x ``height`` is looked at."""
        scale = (
            self.scale
            if self.frame is None
            else (self.frame[0] * self.frame[1] / (width * height)) ** 0.5
        )
        return max(1, round(width * scale)), max(1, round(height * scale))


def fit_bands(image: Image, channels: int, pixels: str, source: str) -> Image:
    """Give ``image`` (H, W, C) the bands that a model takes; grey becomes RGB by repeating, nothing else is guessed.

    Float pictures have holes and overflows, and one of them would spread through a whole network: NaN becomes the mean of its band in
    this picture, an infinite pixel the band's largest or smallest finite one (0 where the band has none).

    Raises:
        UsageError: another number of bands, or another number type than ``pixels`` (``"uint8"``, ``"uint16"``, ``"float32"``).
    """
    if image.dtype != np.dtype(pixels):
        raise UsageError(
            f"{source} holds {image.dtype} pixels, but the others (or the model) have {pixels}; convert it to {pixels} first"
        )
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        image = np.stack([_finite(image[..., c]) for c in range(image.shape[2])], axis=-1)
    if image.shape[2] == 1 and channels == 3:
        return np.repeat(image, 3, axis=2)
    if image.shape[2] != channels:
        raise UsageError(
            f"{source} has {image.shape[2]} bands, but {channels} are needed; give pictures with {channels}"
        )
    return image


def _finite(band: NDArray[np.float32]) -> NDArray[np.float32]:
    known = band[np.isfinite(band)]
    known = known if known.size else np.zeros(1, np.float32)
    return np.nan_to_num(
        band,
        nan=float(known.mean(dtype=np.float64)),
        posinf=float(known.max()),
        neginf=float(known.min()),
    )


def reflect_indices(index: NDArray[np.intp], length: int) -> NDArray[np.intp]:
    """Fold indices into 0..length-1 by mirroring at the edges, as often as needed: -1 -> 0, length -> length - 1."""
    folded = np.mod(index, 2 * length)
    inside: NDArray[np.intp] = np.minimum(folded, 2 * length - 1 - folded)
    return inside


def next_multiple(size: int, stride: int) -> int:
    """Return the smallest multiple of ``stride`` that is at least ``size`` and not 0."""
    return max(1, math.ceil(size / stride)) * stride


@dataclass(frozen=True)
class Geometry:
    """What tiles need to know of a network.

    Args:
        margin: pixels that it loses on each side (0 with same padding).
        stride: its pooling stride.
        context: how far outside an aligned block of output pixels its inputs reach.
        valid_size: smallest size of at least the given one that it takes.
    """

    margin: int
    stride: int
    context: int
    valid_size: Callable[[int], int]

    @property
    def halo(self) -> int:
        """How much of a window's output is spoiled at each inner edge: zeros outside reach so far in. None is where the network pads nothing."""
        return 0 if self.margin else round_up(self.context, self.stride)


def round_up(value: int, step: int) -> int:
    """Return the smallest multiple of ``step`` that is at least ``value``."""
    return -(-value // step) * step
