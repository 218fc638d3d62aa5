"""Split an image of any size into windows whose outputs together equal one pass over the image.

A U-Net is shift-equivariant only in steps of its pooling stride, so windows start at multiples of
``stride``. Of each window only those logits are kept that no artificial edge reaches: nothing is
blended, and there are no seams.

The receptive field of a pretrained encoder reaches 500 pixels and more beyond a block of output.
Windows with such a margin compute most pixels many times, but nearly all that decides a label is
near it. For these networks :func:`overlap_geometry` measures the smallest margin whose labels
agree with one pass. This module needs numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice, product
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from useg.models.geometry import Geometry, reflect_indices, round_up

# Raw pixels (N, C, H, W) -> logits (N, K, h, w).
LogitsFunction = Callable[[NDArray[np.generic]], NDArray[np.float32]]

# Small windows are computed in batches of up to this number of pixels; larger batches are not
# faster and need more memory.
MAX_TILE_BATCH_PIXELS = 400_000

MAX_TILE_SIZES_TRIED = 64

# Networks whose receptive field reaches less far get exact windows, which cost little.
MAX_EXACT_CONTEXT_PIXELS = 256

# For the others the overlap is measured on the middle of the image: side of that sample, and share
# of the labels that must agree with one pass.
OVERLAP_SAMPLE_PIXELS = 1024
MIN_OVERLAP_AGREEMENT = 0.999

# Blocks of this side are compared, in strides: in small ones all pixels are near an edge. They
# start at these fractions of height and width.
COMPARED_BLOCK_STRIDES = 4
COMPARED_POSITIONS = (0.35, 0.65)

# Overlaps tried, in strides. Smaller ones are not tried: the sample can happen to be blank.
MIN_OVERLAP_STRIDES = 4
OVERLAP_STEP_STRIDES = 2


class PixelSource(Protocol):
    """An image ``(H, W, C)`` that can be read by rectangles: an array, or a file on disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C)."""
        ...

    def __getitem__(self, place: tuple[slice, slice], /) -> NDArray[Any]:
        """Return the pixels ``(h, w, C)`` of these rows and columns, which lie inside."""
        ...


@dataclass(frozen=True)
class Span:
    """One window along one axis, in pixels of the image.

    Args:
        start: First output pixel of the window.
        first: First output pixel that is kept.
        last: End of the kept output pixels, exclusive.
    """

    start: int
    first: int
    last: int

    @property
    def in_image(self) -> slice:
        """The kept output, in pixels of the image."""
        return slice(self.first, self.last)

    @property
    def in_window(self) -> slice:
        """The kept output, in pixels of the window's output."""
        return slice(self.first - self.start, self.last - self.start)


@dataclass(frozen=True)
class TileWindow:
    """The input of one forward pass, ``size`` (height, width) pixels of ``image``."""

    image: PixelSource
    rows: Span
    columns: Span
    size: tuple[int, int]


Batch = tuple[list[TileWindow], NDArray[np.generic]]


def predict_tiled(
    image: PixelSource, network: LogitsFunction, geometry: Geometry, tile: int
) -> NDArray[np.float32]:
    """Compute the logits ``(K, H, W)`` of an image ``(H, W, C)`` in windows.

    Outside the image the network sees its mirror image: the overlap-tile strategy (U-Net paper,
    section 2).

    Args:
        image: The image.
        network: Raw pixels in, logits out.
        geometry: The network's.
        tile: About the side of a window in pixels; 0 computes the image in one pass.
    """
    return predict_tiled_many([image], network, geometry, tile)[0]


def predict_tiled_many(
    images: Sequence[PixelSource], network: LogitsFunction, geometry: Geometry, tile: int
) -> list[NDArray[np.float32]]:
    """As :func:`predict_tiled`, for several images.

    Small windows of one size are computed in batches, whichever image they belong to.
    """
    windows_of = [tile_windows(image, geometry, tile) for image in images]
    batches = tile_batches((window for windows in windows_of for window in windows), geometry)
    parts = tile_logits(batches, network)
    return [
        _stitch(image, islice(parts, len(windows)))
        for image, windows in zip(images, windows_of, strict=True)
    ]


def tile_windows(image: PixelSource, geometry: Geometry, tile: int) -> list[TileWindow]:
    """Cover an image with windows of one size, about ``tile`` pixels, or with one if it is 0."""
    height, width = image.shape[:2]
    size = _window_length(height, tile, geometry), _window_length(width, tile, geometry)
    columns = tile_spans(width, size[1], geometry)
    return [
        TileWindow(image, row, column, size)
        for row in tile_spans(height, size[0], geometry)
        for column in columns
    ]


def tile_batches(windows: Iterable[TileWindow], geometry: Geometry) -> Iterator[Batch]:
    """Group neighbours of one size into batches and read their pixels ``(N, C, H, W)``.

    Only one batch is in memory at a time.
    """
    for size, group in groupby(windows, lambda window: window.size):
        count = max(1, MAX_TILE_BATCH_PIXELS // (size[0] * size[1]))
        while batch := list(islice(group, count)):
            pixels = [_read_window(window, geometry.margin) for window in batch]
            yield batch, np.stack([each.transpose(2, 0, 1) for each in pixels])


def tile_logits(
    batches: Iterable[Batch], network: LogitsFunction
) -> Iterator[tuple[TileWindow, NDArray[np.float32]]]:
    """Compute windows and yield each with the logits ``(K, h, w)`` that it keeps, in order."""
    for windows, x in batches:
        for window, logits in zip(windows, network(x), strict=True):
            yield window, logits[:, window.rows.in_window, window.columns.in_window]


def _stitch(
    image: PixelSource, parts: Iterable[tuple[TileWindow, NDArray[np.float32]]]
) -> NDArray[np.float32]:
    logits: NDArray[np.float32] | None = None
    for window, part in parts:
        if part.shape[1:] == image.shape[:2]:
            return part
        if logits is None:
            logits = np.empty((len(part), *image.shape[:2]), np.float32)
        logits[:, window.rows.in_image, window.columns.in_image] = part
    assert logits is not None
    return logits


def _read_window(window: TileWindow, margin: int) -> NDArray[Any]:
    """Read the pixels of a window; outside the image it is mirrored at its edges, repeatedly."""
    starts, lengths = (window.rows.start, window.columns.start), window.image.shape[:2]
    index = [
        reflect_indices(np.arange(start - margin, start - margin + size), length)
        for start, size, length in zip(starts, window.size, lengths, strict=True)
    ]
    rows, columns = (slice(int(axis.min()), int(axis.max()) + 1) for axis in index)
    pixels = window.image[rows, columns]
    if pixels.shape[:2] == window.size:
        # The whole window lies inside the image.
        return pixels
    mirrored: NDArray[Any] = pixels[(index[0] - rows.start)[:, None], index[1] - columns.start]
    return mirrored


def padded_size(length: int, geometry: Geometry) -> int:
    """Return the size to which ``length`` pixels are padded for one pass."""
    return geometry.valid_size(length + 2 * geometry.margin)


def window_size(tile: int, geometry: Geometry) -> int:
    """Return the largest valid window size up to ``tile`` that keeps some output.

    If no size up to ``tile`` keeps output, return the smallest size that does.
    """
    smallest = geometry.valid_size(2 * (geometry.margin + geometry.halo) + geometry.stride)
    return max(smallest, tile - (tile - smallest) % geometry.stride)


def _window_length(length: int, tile: int, geometry: Geometry) -> int:
    whole = padded_size(length, geometry)
    return min(window_size(tile, geometry), whole) if tile else whole


def tile_spans(length: int, window: int, geometry: Geometry) -> list[Span]:
    """Cover ``length`` output pixels with windows of ``window`` input pixels.

    The first window starts at 0, all start at multiples of the stride, and the kept outputs follow
    each other without gap or overlap.
    """
    if geometry.margin:
        return _unpadded_spans(length, window, geometry)
    # Zeros outside a window spoil its output within the halo of an inner edge.
    padded = padded_size(length, geometry)
    if window >= padded:
        return [Span(0, 0, length)]
    step = window - 2 * geometry.halo
    count = 1 + -(-(padded - window) // step)
    starts = [min(k * step, padded - window) for k in range(count)]
    edges = [0, *(start + geometry.halo for start in starts[1:]), length]
    return [Span(start, edges[k], edges[k + 1]) for k, start in enumerate(starts)]


def _unpadded_spans(length: int, window: int, geometry: Geometry) -> list[Span]:
    """As :func:`tile_spans`, for a network without padding: its whole output is exact."""
    output = window - 2 * geometry.margin
    if length <= output:
        return [Span(0, 0, length)]
    step = output // geometry.stride * geometry.stride
    count = 1 + -(-(length - output) // step)
    starts = [k * step for k in range(count)]
    ends = [*starts[1:], length]
    return [Span(start, start, end) for start, end in zip(starts, ends, strict=True)]


def choose_tile(height: int, width: int, geometry: Geometry, most_pixels: int) -> int:
    """Choose the ``tile`` for which the fewest pixels of an image are computed in all.

    Larger windows overlap less, but windows that just fail to fit an image compute much beyond its
    edges.

    Args:
        height: Height of the image in pixels.
        width: Its width.
        geometry: The network's.
        most_pixels: Largest number of pixels in a window, so that the activations fit in memory.

    Returns:
        0 for one pass, if it has at most ``most_pixels``; else the side of a window. If no window
        is small enough, the smallest possible one.
    """
    if padded_size(height, geometry) * padded_size(width, geometry) <= most_pixels:
        return 0

    def window_pixels(tile: int) -> int:
        return _window_length(height, tile, geometry) * _window_length(width, tile, geometry)

    def computed_pixels(tile: int) -> int:
        rows, columns = (
            len(tile_spans(length, _window_length(length, tile, geometry), geometry))
            for length in (height, width)
        )
        return window_pixels(tile) * rows * columns

    smallest = window_size(1, geometry)
    largest = max(padded_size(length, geometry) for length in (height, width))
    while largest > smallest and window_pixels(largest) > most_pixels:
        largest = max(smallest, min(largest - geometry.stride, largest * 31 // 32))
    step = round_up(max(1, (largest - smallest) // MAX_TILE_SIZES_TRIED), geometry.stride)
    tiles = range(window_size(largest, geometry), smallest - 1, -step)
    return min(tiles, key=computed_pixels)


def block_size(extent: int, length: int, geometry: Geometry) -> int:
    """Return the window size for any ``extent`` neighbouring output pixels out of ``length``.

    The output of such a window is exact there, wherever the pixels start.
    """
    context = geometry.margin + geometry.halo
    window = geometry.valid_size(extent + 2 * context + geometry.stride - 1)
    return min(window, padded_size(length, geometry))


def block_span(first: int, last: int, window: int, length: int, geometry: Geometry) -> Span:
    """Place a window of :func:`block_size` for the output pixels from ``first`` to ``last``."""
    start = max(0, first - geometry.halo) // geometry.stride * geometry.stride
    return Span(min(start, padded_size(length, geometry) - window), first, last)


@dataclass(frozen=True)
class MeasuredOverlap:
    """How well windows with some overlap agree with one pass.

    Args:
        context: Pixels around the kept output of a window.
        agreement: Share of labels, 0 to 1, that equal those of one pass.
        difference: Largest difference between logits.
    """

    context: int
    agreement: float
    difference: float


def overlap_geometry(
    network: LogitsFunction,
    image: PixelSource,
    geometry: Geometry,
) -> Geometry:
    """Replace a very large receptive field by a measured overlap of windows.

    Networks and images for which exact windows are affordable keep their geometry.

    Args:
        network: Raw pixels in, logits out.
        image: The image that will be computed in windows.
        geometry: The network's.
    """
    if (
        geometry.context <= MAX_EXACT_CONTEXT_PIXELS
        or max(image.shape[:2]) <= OVERLAP_SAMPLE_PIXELS
    ):
        return geometry
    overlap = find_sufficient_overlap(network, crop_center(image, OVERLAP_SAMPLE_PIXELS), geometry)
    return replace(geometry, context=overlap.context)


def find_sufficient_overlap(
    network: LogitsFunction,
    image: PixelSource,
    geometry: Geometry,
    least: float = MIN_OVERLAP_AGREEMENT,
) -> MeasuredOverlap:
    """Return the smallest overlap that agrees with one pass on at least the share ``least``.

    The other arguments are those of :func:`measure_overlaps`.
    """
    stride = geometry.stride
    contexts = range(MIN_OVERLAP_STRIDES * stride, geometry.context, OVERLAP_STEP_STRIDES * stride)
    measured = measure_overlaps(network, image, geometry, list(contexts), least)
    if measured and measured[-1].agreement >= least:
        return measured[-1]
    return MeasuredOverlap(geometry.context, 1.0, 0.0)


def measure_overlaps(
    network: LogitsFunction,
    image: PixelSource,
    geometry: Geometry,
    contexts: list[int],
    least: float = 2.0,
) -> list[MeasuredOverlap]:
    """Compare small blocks of an image with one pass over it, for one overlap after another.

    Args:
        network: Raw pixels in, logits out; with same padding.
        image: (H, W, C), best a few times as large as the largest overlap.
        geometry: The network's.
        contexts: Overlaps in pixels.
        least: Stop at the first overlap with this share of equal labels; above 1: measure all.
    """
    whole = predict_tiled(image, network, geometry, 0)
    measured: list[MeasuredOverlap] = []
    for context in contexts:
        windows = _sample_blocks(image, replace(geometry, context=context))
        pairs = [
            (part, whole[:, window.rows.in_image, window.columns.in_image])
            for window, part in tile_logits(tile_batches(windows, geometry), network)
        ]
        equal = float(np.mean([part.argmax(0) == exact.argmax(0) for part, exact in pairs]))
        difference = float(max(np.abs(part - exact).max() for part, exact in pairs))
        measured.append(MeasuredOverlap(context, equal, difference))
        if equal >= least:
            break
    return measured


def _sample_blocks(image: PixelSource, geometry: Geometry) -> list[TileWindow]:
    side = COMPARED_BLOCK_STRIDES * geometry.stride
    height, width = image.shape[:2]
    rows, size_y = _sample_spans(side, height, geometry)
    columns, size_x = _sample_spans(side, width, geometry)
    return [
        TileWindow(image, row, column, (size_y, size_x)) for row, column in product(rows, columns)
    ]


def _sample_spans(side: int, length: int, geometry: Geometry) -> tuple[list[Span], int]:
    """Return windows for blocks of ``side`` pixels along one axis, and the size of a window."""
    side = min(side, length)
    size = block_size(side, length, geometry)
    stride = geometry.stride
    starts = [
        min(int(length * position) // stride * stride, length - side)
        for position in COMPARED_POSITIONS
    ]
    return [block_span(start, start + side, size, length, geometry) for start in starts], size


def crop_center(image: PixelSource, side: int) -> NDArray[np.generic]:
    """Return the middle of an image, at most ``side`` pixels each way."""
    starts = [max(0, (length - side) // 2) for length in image.shape[:2]]
    rows, columns = (
        slice(start, min(start + side, length))
        for start, length in zip(starts, image.shape[:2], strict=True)
    )
    return image[rows, columns]
