"""Resize images and logits as Pillow and PyTorch do, but without the whole result in memory.

For images larger than memory, one rectangle is computed at a time: :class:`ResizedView` gives
Pillow's pixels to the bit, :func:`resize_logits_part` PyTorch's logits except for rounding.

:func:`label_compiled` resizes logits and chooses classes in one compiled pass, in a sixth of the
time that NumPy and PyTorch need to write and read the logits of every pixel;
:func:`resize_compiled` reduces colour images in a fifth of Pillow's time. ``resampling.c`` is
compiled in a fifth of a second, and used only if its results are theirs. The tests compare all four
with Pillow and PyTorch.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

from useg.models.kernels import compile_sources

# Pixels of the image that are read at a time to resize them.
MAX_READ_PIXELS = 8_000_000

# Pillow resizes columns first; from version 13 on, rows first if much height is lost.
_PILLOW_13 = int(PIL.__version__.split(".")[0]) >= 13

# Fraction bits of the integer weights with which Pillow multiplies 8-bit pixels.
_WEIGHT_BITS = 22

# The functions of ``resampling.c``: logits, K, h, w, height, width, labels; and image, h, w,
# height, width, the taps of columns and of rows (number, first ones, weights), resized image.
_TAPS = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
RESAMPLING_SIGNATURES = {
    "useg_label": [ctypes.c_void_p, *[ctypes.c_int64] * 5, ctypes.c_void_p],
    "useg_resize": [ctypes.c_void_p, *[ctypes.c_int64] * 4, *_TAPS, *_TAPS, ctypes.c_void_p],
}

# PyTorch computes narrower images in another order.
MIN_COMPILED_WIDTH_PIXELS = 8

# Sizes of the probe of those functions, before and after.
PROBE_SIZES = ((40, 50), (90, 131))

# Logits ``(K, h, w)``, height and width -> class ids ``(height, width)``.
LabelFunction = Callable[[NDArray[np.float32], int, int], NDArray[np.uint8]]

# Image ``(H, W, C)`` and (width, height) -> image of that size.
ResizeFunction = Callable[[NDArray[Any], tuple[int, int]], NDArray[Any]]

# The kernels, by the function that they replace; None where they cannot be used.
_kernels: dict[LabelFunction | ResizeFunction, ctypes.CDLL | None] = {}
_compile_lock = threading.Lock()

# A rectangle of an image: rows and columns.
Rectangle = tuple[slice, slice]


@dataclass(frozen=True)
class LogitsPart:
    """A part of the logits of an image.

    Args:
        logits: (K, h, w).
        corner: First row and column of the part in the whole.
        size: (height, width) of the whole.
    """

    logits: NDArray[np.float32]
    corner: tuple[int, int]
    size: tuple[int, int]


class ResizedView:
    """An image ``(H, W, C)`` at another size, computed for the rectangles that are read.

    Equals :func:`useg.images.image_files.resize_image` of the whole.

    Args:
        source: An image that is read by rectangles: ``source[rows, columns]``.
        dtype: Type of its pixels.
        size: New (width, height).
    """

    def __init__(self, source: Any, dtype: np.dtype[Any], size: tuple[int, int]) -> None:
        self.source = source
        self.shape = (size[1], size[0], source.shape[2])
        self._dtype = dtype
        # Pillow computes these images in integers, and rounds between the two axes.
        self._in_integers = dtype == np.uint8 and source.shape[2] in (1, 3)
        self._axes = (0, 1) if _are_rows_first(source.shape, self.shape) else (1, 0)
        self._taps = [
            _triangle_taps(source.shape[axis], self.shape[axis], self._in_integers)
            for axis in (0, 1)
        ]

    def __getitem__(self, place: Rectangle) -> NDArray[Any]:
        """Return the pixels of these rows and columns."""
        if self.shape == self.source.shape:
            return np.asarray(self.source[place])
        rows, columns = place
        shape = rows.stop - rows.start, columns.stop - columns.start, self.shape[2]
        result = np.empty(shape, self._dtype)
        for part in self._row_parts(rows, columns):
            result[part.start - rows.start : part.stop - rows.start] = self._resize(part, columns)
        return result

    def _row_parts(self, rows: slice, columns: slice) -> Iterator[slice]:
        """Split rows into parts for which about ``MAX_READ_PIXELS`` pixels are read."""
        source_columns = _source_range(self._taps[1], columns)
        source_rows = max(1, self.source.shape[0] // self.shape[0])
        pixels_per_row = source_rows * (source_columns.stop - source_columns.start)
        step = max(1, MAX_READ_PIXELS // pixels_per_row)
        return (
            slice(top, min(top + step, rows.stop)) for top in range(rows.start, rows.stop, step)
        )

    def _resize(self, rows: slice, columns: slice) -> NDArray[Any]:
        targets = (rows, columns)
        sources = [_source_range(self._taps[axis], targets[axis]) for axis in (0, 1)]
        pixels = np.asarray(self.source[sources[0], sources[1]])
        if not self._in_integers:
            pixels = pixels.astype(np.float32)
        for axis in self._axes:
            pixels = _apply_taps(pixels, self._taps[axis], targets[axis], sources[axis].start, axis)
        return pixels if self._in_integers or self._dtype.kind == "f" else np.rint(pixels)


def _are_rows_first(source: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Return whether Pillow resizes the rows of an image before its columns."""
    lost_rows, lost_columns = source[0] - target[0], source[1] - target[1]
    return _PILLOW_13 and lost_rows > max(0, 2 * lost_columns)


# Each new pixel is a weighted mean of source pixels: their indices and weights, both (n, taps).
Taps = tuple[NDArray[np.intp], NDArray[Any]]


def _triangle_taps(source: int, target: int, in_integers: bool) -> Taps:
    """Return the taps of a triangle filter at least as wide as a pixel of either size."""
    scale = source / target
    support = max(scale, 1.0)
    centers = 0.0 + (np.arange(target) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.intp), 0)
    last = np.minimum((centers + support + 0.5).astype(np.intp), source)
    index = first[:, None] + np.arange((last - first).max())
    triangle = 1 - np.abs((index - centers[:, None] + 0.5) * (1 / support))
    weights = np.maximum(triangle, 0) * (index < last[:, None])
    # Pillow adds the weights one after the other, which rounds like a cumulative sum.
    weights /= weights.cumsum(1)[:, -1:]
    if in_integers:
        weights = (weights * (1 << _WEIGHT_BITS) + 0.5).astype(np.int32)
    return np.minimum(index, source - 1), weights


def _source_range(taps: Taps, target: slice) -> slice:
    index = taps[0][target]
    return slice(int(index[0, 0]), int(index[-1].max()) + 1)


def _apply_taps(
    pixels: NDArray[Any], taps: Taps, target: slice, start: int, axis: int
) -> NDArray[Any]:
    """Return weighted means along one axis; the first of the ``pixels`` has the index ``start``."""
    index, weights = taps[0][target] - start, taps[1][target]
    weights = weights[:, :, None, None] if axis == 0 else weights[:, :, None]
    in_integers = weights.dtype == np.int32
    # Half of the last bit rounds to the nearest integer.
    total: NDArray[Any] = np.array(1 << _WEIGHT_BITS - 1 if in_integers else 0.0, weights.dtype)
    for k in range(index.shape[1]):
        total = total + pixels.take(index[:, k], axis) * weights[:, k]
    return (total >> _WEIGHT_BITS).astype(np.uint8) if in_integers else total.astype(np.float32)


def bilinear_neighbours(
    source: int, target: int, places: slice
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Find the two source positions between which each target position is interpolated.

    As PyTorch's bilinear interpolation with ``align_corners=False``, in float32, where product and
    difference are rounded once.

    Args:
        source: Number of source positions.
        target: Number of target positions.
        places: Which target positions.

    Returns:
        First neighbour, second neighbour, and weight of the second, 0 to 1.
    """
    scale = np.float32(source) / np.float32(target)
    centers = (np.arange(places.start, places.stop) + 0.5) * np.float64(scale) - 0.5
    position = np.maximum(centers, 0).astype(np.float32)
    low = np.minimum(position.astype(np.intp), source - 1)
    return low, np.minimum(low + 1, source - 1), position - low.astype(np.float32)


def bilinear_source(source: int, target: int, places: slice) -> slice:
    """Return the source positions from which these target positions are interpolated."""
    low, high, _ = bilinear_neighbours(source, target, places)
    return slice(int(low[0]), int(high[-1]) + 1)


def resize_logits_part(
    part: LogitsPart, native: tuple[int, int], rows: slice, columns: slice
) -> NDArray[np.float32]:
    """Return a rectangle of the logits that the whole has at another size.

    Args:
        part: Contains everything that :func:`bilinear_source` names.
        native: (height, width) to which the whole is resized.
        rows: Rows of the rectangle at that size.
        columns: Its columns.
    """
    logits, (top, left) = part.logits, part.corner
    if part.size == native:
        return logits[
            :, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
        ]
    for axis, places in ((0, rows), (1, columns)):
        low, high, weight = bilinear_neighbours(part.size[axis], native[axis], places)
        weight = weight[:, None] if axis == 0 else weight
        first = logits.take(low - part.corner[axis], axis + 1)
        second = logits.take(high - part.corner[axis], axis + 1)
        logits = first * (1 - weight) + second * weight
    return logits


def label_compiled(
    logits: NDArray[np.float32], height: int, width: int, reference: LabelFunction
) -> NDArray[np.uint8]:
    """Return the most probable classes of logits at another size.

    Args:
        logits: ``(K, h, w)``.
        height: Height of the label map.
        width: Its width.
        reference: Computes the same without a compiler, and where the kernel does not apply.

    Returns:
        Class ids ``(height, width)``.
    """
    kernel = _find_kernel(reference, _label_probe)
    if kernel is None or logits.shape[1:] == (height, width) or width < MIN_COMPILED_WIDTH_PIXELS:
        return reference(logits, height, width)
    return _label(kernel, logits, height, width)


def resize_compiled(
    image: NDArray[Any], size: tuple[int, int], reference: ResizeFunction
) -> NDArray[Any]:
    """Return an image ``(H, W, C)`` at another size, to the bit as ``reference`` does.

    Args:
        image: 8-bit images of three channels are resized by the kernel.
        size: New (width, height).
        reference: Computes the same without a compiler, and where the kernel does not apply.
    """
    height_and_width = size[::-1]
    if (
        image.dtype != np.uint8
        or image.shape[2] != 3
        or image.shape[:2] == height_and_width
        or _are_rows_first(image.shape, height_and_width)
        or not (kernel := _find_kernel(reference, _resize_probe))
    ):
        return reference(image, size)
    return _resize(kernel, image, size)


# A probe runs a kernel, or its reference if there is none, on an example.
Probe = Callable[[ctypes.CDLL | None, Any], NDArray[np.uint8]]


def _find_kernel(reference: LabelFunction | ResizeFunction, probe: Probe) -> ctypes.CDLL | None:
    """Return the kernel; None where it cannot be used, and while another thread compiles it.

    No thread waits for another one: in a busy service, that one may have a low priority.
    """
    if reference not in _kernels and _compile_lock.acquire(blocking=False):
        try:
            kernel = _compile()
            _kernels[reference] = kernel if kernel and _agrees(kernel, reference, probe) else None
        finally:
            _compile_lock.release()
    return _kernels.get(reference)


@cache
def _compile() -> ctypes.CDLL | None:
    return compile_sources([Path(__file__).with_name("resampling.c")], RESAMPLING_SIGNATURES)


def _agrees(kernel: ctypes.CDLL, reference: LabelFunction | ResizeFunction, probe: Probe) -> bool:
    """Return whether the kernel rounds as the reference does."""
    return np.array_equal(probe(kernel, reference), probe(None, reference))


def _label_probe(kernel: ctypes.CDLL | None, reference: LabelFunction) -> NDArray[np.uint8]:
    """Label classes that differ in their last bits alone: other rounding gives other labels."""
    random, ((h, w), (height, width)) = np.random.default_rng(0), PROBE_SIZES
    logits = np.repeat(random.standard_normal((1, h, w), np.float32), 3, 0)
    logits.view(np.int32)[:] += random.integers(-1, 2, logits.shape, np.int32)
    if kernel is None:
        return reference(logits, height, width)
    return _label(kernel, logits, height, width)


def _resize_probe(kernel: ctypes.CDLL | None, reference: ResizeFunction) -> NDArray[np.uint8]:
    """Reduce noise: other rounding gives other pixels."""
    random, (small, large) = np.random.default_rng(0), PROBE_SIZES
    noise = random.integers(0, 256, (*large, 3), np.uint8)
    return reference(noise, small) if kernel is None else _resize(kernel, noise, small)


def _resize(
    kernel: ctypes.CDLL, image: NDArray[np.uint8], size: tuple[int, int]
) -> NDArray[np.uint8]:
    image, (width, height), (h, w, _) = np.ascontiguousarray(image), size, image.shape
    resized = np.empty((height, width, 3), np.uint8)
    sizes, taps = (h, w, height, width), [_integer_taps(w, width), _integer_taps(h, height)]
    axes = [(weights.shape[1], firsts.ctypes.data, weights.ctypes.data) for firsts, weights in taps]
    if kernel.useg_resize(image.ctypes.data, *sizes, *axes[0], *axes[1], resized.ctypes.data):
        raise MemoryError("there is not enough memory for a resized image")
    return resized


@lru_cache(maxsize=16)
def _integer_taps(source: int, target: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the first index ``(n,)`` and the weights ``(n, taps)`` of each new pixel."""
    index, weights = _triangle_taps(source, target, in_integers=True)
    return np.ascontiguousarray(index[:, 0], np.int32), np.ascontiguousarray(weights)


def _label(
    kernel: ctypes.CDLL, logits: NDArray[np.float32], height: int, width: int
) -> NDArray[np.uint8]:
    labels, logits = np.empty((height, width), np.uint8), np.ascontiguousarray(logits)
    if kernel.useg_label(logits.ctypes.data, *logits.shape, height, width, labels.ctypes.data):
        raise MemoryError("there is not enough memory for a label map")
    return labels
