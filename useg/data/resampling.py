"""A picture or logits too large for memory -> any part of them at another size, as if the whole had been resized.

Pillow and PyTorch resize whole arrays. What they do is written out here for parts: ``Resized`` gives Pillow's pixels to the bit,
``enlarged`` PyTorch's logits but for rounding; the tests hold both against them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

PIECE = 8_000_000  # pixels of the picture that are read at a time
_DOWN_FIRST = int(PIL.__version__.split(".")[0]) >= 13  # pictures that lose much height, which before went across first as all others
_BITS = 22  # of the whole numbers that Pillow multiplies 8-bit pixels with


class Resized:
    """A picture ``(H, W, C)`` at another size, computed where it is asked for; equal to ``useg.data.images.resize_image`` of the whole.

    Args:
        source: a picture that gives any rectangle of itself: ``source[rows, columns]``.
        dtype: of its pixels.
        size: (width, height) wanted.
    """

    def __init__(self, source: Any, dtype: np.dtype[Any], size: tuple[int, int]) -> None:
        self.source = source
        self.shape = (size[1], size[0], source.shape[2])
        self._dtype = dtype
        self._exact = dtype == np.uint8 and source.shape[2] in (1, 3)  # Pillow computes these in whole numbers
        lost = [before - after for before, after in zip(source.shape[:2], self.shape[:2], strict=True)]
        self._order = (0, 1) if _DOWN_FIRST and lost[0] > max(0, 2 * lost[1]) else (1, 0)  # between the two 8-bit pixels are rounded
        self._taps = [_taps(*lengths, whole=self._exact) for lengths in zip(source.shape[:2], self.shape[:2], strict=True)]

    def __getitem__(self, place: tuple[slice, slice]) -> NDArray[Any]:
        """Return the pixels of these rows and columns."""
        if self.shape == self.source.shape:
            return np.asarray(self.source[place])
        rows, columns = place
        part = np.empty((rows.stop - rows.start, columns.stop - columns.start, self.shape[2]), self._dtype)
        for some in self._pieces(rows, columns):
            part[some.start - rows.start : some.stop - rows.start] = self._computed(some, columns)
        return part

    def _pieces(self, rows: slice, columns: slice) -> Iterator[slice]:
        """Cut rows into pieces for each of which about ``PIECE`` pixels of the picture are read."""
        wide = _reach(self._taps[1], columns)
        pixels = max(1, self.source.shape[0] // self.shape[0]) * (wide.stop - wide.start)
        step = max(1, PIECE // pixels)
        return (slice(top, min(top + step, rows.stop)) for top in range(rows.start, rows.stop, step))

    def _computed(self, rows: slice, columns: slice) -> NDArray[Any]:
        read = [_reach(taps, wanted) for taps, wanted in zip(self._taps, (rows, columns), strict=True)]
        pixels = np.asarray(self.source[read[0], read[1]])
        pixels = pixels if self._exact else pixels.astype(np.float32)
        for axis in self._order:
            pixels = _weighted(pixels, self._taps[axis], (rows, columns)[axis], read[axis].start, axis)
        return pixels if self._exact or self._dtype.kind == "f" else np.rint(pixels)


Taps = tuple[NDArray[np.intp], NDArray[Any]]  # (n, taps): which pixels each new pixel is a mean of, and their weights


def _taps(source: int, target: int, whole: bool) -> Taps:
    """Return where each of ``target`` pixels comes from: a triangle over its place, at least as wide as a pixel of either size."""
    scale = source / target
    support = max(scale, 1.0)
    centers = 0.0 + (np.arange(target) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.intp), 0)
    last = np.minimum((centers + support + 0.5).astype(np.intp), source)
    index = first[:, None] + np.arange((last - first).max())
    weights = np.maximum(1 - np.abs((index - centers[:, None] + 0.5) * (1 / support)), 0) * (index < last[:, None])
    weights /= weights.cumsum(1)[:, -1:]  # added one after the other, as Pillow does
    return np.minimum(index, source - 1), (weights * (1 << _BITS) + 0.5).astype(np.int32) if whole else weights


def _reach(taps: Taps, wanted: slice) -> slice:
    index = taps[0][wanted]
    return slice(int(index[0, 0]), int(index[-1].max()) + 1)


def _weighted(pixels: NDArray[Any], taps: Taps, wanted: slice, start: int, axis: int) -> NDArray[Any]:
    """Return weighted means along one axis of pixels of which the first is number ``start``."""
    index, weights = taps[0][wanted] - start, taps[1][wanted]
    weights = weights[:, :, None, None] if axis == 0 else weights[:, :, None]
    total: NDArray[Any] = np.array(1 << _BITS - 1 if weights.dtype == np.int32 else 0.0, weights.dtype)
    for k in range(index.shape[1]):
        total = total + pixels.take(index[:, k], axis) * weights[:, k]
    return (total >> _BITS).astype(np.uint8) if weights.dtype == np.int32 else total.astype(np.float32)


def neighbours(source: int, target: int, wanted: slice) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Return between which two of ``source`` places each of the wanted ones of ``target`` lies, and how near to the second, 0 to 1.

    As PyTorch's bilinear enlargement with the corners not aligned: in float32, product and difference rounded once.
    """
    scale = np.float32(source) / np.float32(target)
    at = np.maximum((np.arange(wanted.start, wanted.stop) + 0.5) * np.float64(scale) - 0.5, 0).astype(np.float32)
    low = np.minimum(at.astype(np.intp), source - 1)
    return low, np.minimum(low + 1, source - 1), at - low.astype(np.float32)


def needed(source: int, target: int, wanted: slice) -> slice:
    """Return which of ``source`` rows :func:`enlarged` needs for the wanted rows of ``target``."""
    low, high, _ = neighbours(source, target, slice(wanted.start, wanted.stop))
    return slice(int(low[0]), int(high[-1]) + 1)


def enlarged(
    logits: NDArray[np.float32], corner: tuple[int, int], size: tuple[int, int], native: tuple[int, int], rows: slice, columns: slice
) -> NDArray[np.float32]:
    """Return a part of the logits at another size.

    Args:
        logits: (K, h, w), a part that holds all that is :func:`needed`.
        corner: its first row and column in the whole.
        size: (height, width) of the whole.
        native: (height, width) to which the whole is brought.
        rows, columns: which part of that is wanted.
    """
    if size == native:
        return logits[:, rows.start - corner[0] : rows.stop - corner[0], columns.start - corner[1] : columns.stop - corner[1]]
    for axis, wanted in ((0, rows), (1, columns)):
        low, high, near = neighbours(size[axis], native[axis], wanted)
        near = near[:, None] if axis == 0 else near
        before = logits.take(low - corner[axis], axis + 1)
        logits = before * (1 - near) + logits.take(high - corner[axis], axis + 1) * near
    return logits
