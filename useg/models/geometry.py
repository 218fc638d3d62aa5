"""Rules for images and their sizes, shared by training, tiles, exports and runtimes (numpy only).

An image passes through them in this order: ``fit_bands`` gives it the bands of the model,
``WorkingSize`` resizes and standardises it for the model, ``reflect_indices`` extends it by
mirroring, and ``Geometry`` says which input sizes the network accepts and how many pixels it loses.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from useg.errors import DataError
from useg.images.image_files import Image, resize_image

# Mean and deviation of standardised images. An image with a smaller deviation than the last is
# treated as if it had that, so that the noise of an empty image does not become large.
STANDARD_MEAN, STANDARD_DEVIATION, MIN_STANDARD_DEVIATION = 120.0, 56.0, 8.0


@dataclass(frozen=True)
class WorkingSize:
    """The size at which a model processes an image, and whether it standardises the image.

    Args:
        frame: (width, height) whose area every whole image gets, with its proportions kept; for
            cameras, where each image shows the whole scene. None for a fixed scale.
        scale: factor for every image if ``frame`` is None; for microscopes and satellites, where a
            pixel has a physical size.
        standardize: whether images get one brightness and contrast (:func:`standardize`).
    """

    frame: tuple[int, int] | None = None
    scale: float = 1.0
    standardize: bool = False

    def of(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) at which the model processes an image of this size.

        >>> WorkingSize(frame=(256, 192)).of(800, 600)
        (256, 192)
        """
        scale = self.scale
        if self.frame is not None:
            scale = (self.frame[0] * self.frame[1] / (width * height)) ** 0.5
        return max(1, round(width * scale)), max(1, round(height * scale))

    def prepare(
        self,
        image: Image,
        size: tuple[int, int] | None = None,
        resize: Callable[[Image, tuple[int, int]], Image] = resize_image,
    ) -> Image:
        """Resize an image to the working size, or ``size``, and standardise it where wanted."""
        resized = resize(image, size or self.of(image.shape[1], image.shape[0]))
        return standardize(resized) if self.standardize else resized


# The sums are integers, so that the page that runs a model in the browser computes the same.
def standardize(image: Image) -> Image:
    """Give an image ``(H, W, C)`` uint8 one brightness and contrast, all bands alike."""
    values, counts = np.arange(256), np.bincount(image.ravel(), minlength=256)
    mean = int(counts @ values) / image.size
    variance = max(0.0, int(counts @ values**2) / image.size - mean * mean)
    gain = STANDARD_DEVIATION / max(MIN_STANDARD_DEVIATION, math.sqrt(variance))
    new = np.floor((values - mean) * gain + (STANDARD_MEAN + 0.5))
    return np.asarray(np.clip(new, 0, 255).astype(np.uint8).take(image))


def fit_bands(image: Image, channels: int, pixels: str, source: str) -> Image:
    """Give an image the bands that a model takes.

    One band is repeated for a model that takes three; no other conversion is made. Non-finite
    values would spread through the whole network, so NaN becomes the mean of its band in this
    image, and infinity the largest or smallest finite value of the band (0 if there is none).

    Args:
        image: ``(H, W, C)``.
        channels: number of bands that the model takes.
        pixels: pixel type that the model takes: ``"uint8"``, ``"uint16"`` or ``"float32"``.
        source: where the image comes from, for error messages.

    Returns:
        ``(H, W, channels)``.

    Raises:
        DataError: the image has another number of bands or another pixel type.

    >>> fit_bands(np.zeros((2, 4, 1), np.uint8), 3, "uint8", "grey.png").shape
    (2, 4, 3)
    """
    if image.dtype != np.dtype(pixels):
        raise DataError(
            f"{source} holds {image.dtype} pixels, but the others (or the model) have {pixels}; "
            f"convert it to {pixels} first"
        )
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        image = np.stack([_replace_nonfinite(band) for band in np.moveaxis(image, 2, 0)], axis=-1)
    if image.shape[2] == 1 and channels == 3:
        return np.repeat(image, 3, axis=2)
    if image.shape[2] != channels:
        plural = "" if image.shape[2] == 1 else "s"
        raise DataError(
            f"{source} has {image.shape[2]} band{plural}, but {channels} are needed; "
            f"give images with {channels}"
        )
    return image


def convert_fractions(array: Image, wanted: np.dtype[Any]) -> Image:
    """Convert an image to the number type ``wanted`` of a model, if it holds fractions.

    Floats become float32 for a model of float32 images. For a model of uint8 images, fractions
    from 0 to 1 are multiplied by 255 and rounded, with a warning. Other types do not change:
    :func:`fit_bands` refuses them.

    Raises:
        DataError: the image holds floats that the model does not take.
    """
    if array.dtype.kind != "f":
        return array
    if wanted.kind == "f":
        return array.astype(wanted)
    low, high = float(array.min()), float(array.max())
    if wanted != np.uint8 or not (low >= 0 and high <= 1):
        raise DataError(
            f"the image holds {array.dtype} values from {low:g} to {high:g}, but the model takes "
            f"{wanted}; give the stored {wanted} values"
            + (", or fractions from 0 to 1" if wanted == np.uint8 else "")
        )
    warnings.warn(
        "the image holds fractions from 0 to 1, which are multiplied by 255, because the model "
        "takes uint8",
        UserWarning,
        stacklevel=5,
    )
    scaled: Image = np.rint(array * 255).astype(wanted)
    return scaled


def _replace_nonfinite(band: NDArray[np.float32]) -> NDArray[np.float32]:
    finite = band[np.isfinite(band)]
    finite = finite if finite.size else np.zeros(1, np.float32)
    return np.nan_to_num(
        band,
        nan=float(finite.mean(dtype=np.float64)),
        posinf=float(finite.max()),
        neginf=float(finite.min()),
    )


def reflect_indices(index: NDArray[np.intp], length: int | NDArray[np.intp]) -> NDArray[np.intp]:
    """Map any indices to 0..length-1 by mirroring at both edges, as often as needed.

    The edge pixel is repeated: -1 becomes 0, and ``length`` becomes ``length - 1``.

    >>> reflect_indices(np.arange(-2, 5), 3)
    array([1, 0, 0, 1, 2, 2, 1])
    """
    folded = np.mod(index, 2 * length)
    inside: NDArray[np.intp] = np.minimum(folded, 2 * length - 1 - folded)
    return inside


def round_up(value: int, step: int) -> int:
    """Return the smallest multiple of ``step`` that is at least ``value``.

    >>> round_up(5, 4), round_up(0, 4)
    (8, 0)
    """
    return -(-value // step) * step


def next_multiple(size: int, stride: int) -> int:
    """Return the smallest multiple of ``stride`` that is at least ``size`` and not 0.

    >>> next_multiple(33, 32), next_multiple(0, 32)
    (64, 32)
    """
    return round_up(max(1, size), stride)


class GeometryLike(Protocol):
    """What has a margin and valid sizes: a network, a ``Segmenter``, a ``Geometry``."""

    @property
    def margin(self) -> int:
        """Pixels that the network loses on each side."""

    @property
    def valid_size(self) -> Callable[[int], int]:
        """Function that returns the smallest accepted size of at least the given one."""


def output_size(network: GeometryLike, size: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest (width, height) that one forward pass can produce, at least ``size``."""
    width, height = (
        network.valid_size(side + 2 * network.margin) - 2 * network.margin for side in size
    )
    return width, height


@dataclass(frozen=True)
class Geometry:
    """The integers of a network that tiled prediction needs.

    Args:
        margin: pixels that the network loses on each side; 0 with same padding.
        stride: product of its pooling strides. A shift of the input by a multiple of it shifts the
            output, and changes nothing else far from the edges.
        context: how far the inputs of a block of output pixels aligned to ``stride`` reach beyond
            the block, in pixels.
        valid_size: function that returns the smallest accepted height or width of at least the
            given one.
    """

    margin: int
    stride: int
    context: int
    valid_size: Callable[[int], int]

    @property
    def halo(self) -> int:
        """Pixels at each inner edge of a window whose output zero padding changes.

        It is 0 for a network without padding.
        """
        return 0 if self.margin else round_up(self.context, self.stride)
