"""Any image <-> windows that a network can take, such that the windows' answer equals the whole image's (numpy only).

A U-Net is shift-equivariant only in steps of its pooling stride, so windows start at multiples of ``stride``. Of each window
only those logits are kept that no artificial edge has reached: nothing is blended, and there is no seam to hide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from useg.data.augment import mirrored

Network = Callable[[NDArray[np.generic]], NDArray[np.float32]]  # raw pixels (N, C, H, W) -> logits (N, K, h, w)


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


@dataclass(frozen=True)
class Span:
    """One window along one direction, in pixels of the padded image: its start, and the output kept, from ``first`` to before ``last``."""

    start: int
    first: int
    last: int


def whole_size(length: int, geometry: Geometry) -> int:
    """Return the size to which ``length`` pixels are padded for one pass."""
    return geometry.valid_size(length + 2 * geometry.margin)


def window_size(tile: int, geometry: Geometry) -> int:
    """Return the largest size of at most ``tile`` that the network takes and that keeps some output, or else the smallest such."""
    halo = geometry.margin or _round_up(geometry.context, geometry.stride)
    smallest = geometry.valid_size(2 * halo + geometry.stride)
    return max(smallest, tile - (tile - smallest) % geometry.stride)


def spans(length: int, window: int, geometry: Geometry) -> list[Span]:
    """Cover ``length`` output pixels with windows of ``window`` input pixels.

    The first starts at 0, all start at multiples of the stride, and what they keep follows on without gap or overlap.
    """
    stride, margin = geometry.stride, geometry.margin
    if margin:  # unpadded network: everything that comes out is right
        output = window - 2 * margin
        if length <= output:
            return [Span(0, 0, length)]
        step = output // stride * stride
        count = 1 + -(-(length - output) // step)
        starts = [k * step for k in range(count)]
        return [Span(start, start, length if k == count - 1 else start + step) for k, start in enumerate(starts)]
    padded = whole_size(length, geometry)  # zeros outside: an inner edge spoils what lies within the halo
    if window >= padded:
        return [Span(0, 0, length)]
    halo = _round_up(geometry.context, stride)
    step = window - 2 * halo
    count = 1 + -(-(padded - window) // step)
    starts = [min(k * step, padded - window) for k in range(count)]
    edges = [0, *(start + halo for start in starts[1:]), length]
    return [Span(start, edges[k], edges[k + 1]) for k, start in enumerate(starts)]


def predict(image: NDArray[np.generic], network: Network, geometry: Geometry, tile: int) -> NDArray[np.float32]:
    """Return logits (K, H, W) for an image (H, W, C), in windows of about ``tile`` pixels, or in one pass when ``tile`` is 0.

    Outside the image the network sees its mirror image (overlap-tile strategy, U-Net paper section 2).
    """
    height, width = image.shape[:2]
    windows = [window_size(tile, geometry) if tile else whole_size(length, geometry) for length in (height, width)]
    windows = [min(window, whole_size(length, geometry)) for window, length in zip(windows, (height, width), strict=True)]
    logits: NDArray[np.float32] | None = None
    for row, column in _grid(height, width, windows, geometry):
        pixels = _mirrored_window(image, row.start - geometry.margin, column.start - geometry.margin, windows)
        answer = network(pixels.transpose(2, 0, 1)[None])[0]
        if logits is None:
            logits = np.empty((answer.shape[0], height, width), np.float32)
        logits[:, row.first : row.last, column.first : column.last] = answer[
            :, row.first - row.start : row.last - row.start, column.first - column.start : column.last - column.start
        ]
    assert logits is not None
    return logits


def _grid(height: int, width: int, windows: list[int], geometry: Geometry) -> Iterator[tuple[Span, Span]]:
    columns = spans(width, windows[1], geometry)
    for row in spans(height, windows[0], geometry):
        for column in columns:
            yield row, column


def _mirrored_window(image: NDArray[np.generic], top: int, left: int, size: list[int]) -> NDArray[np.generic]:
    """Cut a window out of an image; where it lies outside, the image is mirrored at its edges, as often as needed."""
    rows = mirrored(np.arange(top, top + size[0]), image.shape[0])
    columns = mirrored(np.arange(left, left + size[1]), image.shape[1])
    return image[rows[:, None], columns[None, :]]


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
